# SPDX-License-Identifier: Apache-2.0
"""Mini-GenEval: scenes of coloured shapes, the prompts they are drawn from, and an exact scorer.

A scene is 16 x 16 pixels, four cells of 8 x 8 pixels; a cell is empty (grey) or holds one shape of
one colour. As in GenEval a prompt asks for one of six things, and an image is right or
wrong: nothing is graded, and no network judges. Here the whole picture has to be right, so an
object that nobody asked for is a mistake in every column.

    single     a square
    two        a square and a cross
    count      three crosses                         two to four, of any colours
    colour     a red square
    position   a square left of a cross              side by side, or one below the other
    attribute  a red square and a blue cross
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import permutations, product
from typing import NamedTuple

import torch
from torch import Tensor

CELL, GRID = 8, 2
SIZE = CELL * GRID
COLOURS = {
    "red": (1.0, -1.0, -1.0),
    "green": (-1.0, 1.0, -1.0),
    "blue": (-1.0, -1.0, 1.0),
}
# Of 2 x 2 pixels each; at least 24 of the 64 pixels differ between any two shapes.
SHAPES = {
    "square": ("####", "####", "####", "####"),
    "triangle": ("#...", "##..", "###.", "####"),
    "cross": ("#..#", ".##.", ".##.", "#..#"),
}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLURALS = {name: "crosses" if name == "cross" else f"{name}s" for name in SHAPES}
# Row and column of the second object minus those of the first, as signs of the leading direction.
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
PLACES = ("left", "right", "above", "below")
_COLOUR_NAMES = tuple(COLOURS)
# What a cell holds: nothing, or a shape of a colour.
_KINDS: tuple[tuple[str, str] | None, ...] = (None, *product(SHAPES, COLOURS))
COLUMNS = ("single", "two", "count", "colour", "position", "attribute")


class Object(NamedTuple):
    """One shape in a cell; row and column count from the top left."""

    shape: str
    colour: str
    row: int
    column: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One kind of object that a prompt names.

    Attributes:
        colour: None leaves it open.
        place: the half of the picture that it is in, one of `PLACES`; None leaves it open.
    """

    shape: str
    colour: str | None = None
    count: int = 1
    place: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenePrompt:
    """What a picture is asked for.

    Attributes:
        column: of the score.
        parts: what is in the picture, and nothing else is.
        relation: where the first part is, seen from the second; a key of `RELATIONS` or None.
    """

    column: str
    parts: tuple[Part, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        """Returns the prompt in words."""
        names = [_name(part) for part in self.parts]
        return f" {self.relation or 'and'} ".join(names)

    def draw(self, generator: torch.Generator) -> list[Object]:
        """Draws a scene that fulfils the prompt: what it leaves open is uniform."""
        while True:
            cells = torch.randperm(GRID * GRID, generator=generator).tolist()
            objects = []
            for part in self.parts:
                for _ in range(part.count):
                    row, column = divmod(cells.pop(), GRID)
                    drawn = int(torch.randint(len(COLOURS), (), generator=generator))
                    colour = part.colour or _COLOUR_NAMES[drawn]
                    objects.append(Object(part.shape, colour, row, column))
            if self._are_in_place(objects):
                return objects

    def holds(self, objects: Sequence[Object | None]) -> bool:
        """Tells whether a scene is what was asked for; None is a cell that holds no known object.

        A part without a colour accepts all; parts of a prompt have different shapes.
        """
        found = [item for item in objects if item is not None]
        if len(found) < len(objects):
            return False
        if Counter(item.shape for item in found) != Counter(
            {part.shape: part.count for part in self.parts}
        ):
            return False
        colours = {part.shape: part.colour for part in self.parts}
        if any(colours[item.shape] not in (None, item.colour) for item in found):
            return False
        return self._are_in_place(found)

    def _are_in_place(self, objects: Sequence[Object]) -> bool:
        """Tells whether objects of the right shapes are where they were asked for."""
        for part in self.parts:
            if part.place is not None and any(
                item.shape == part.shape and part.place not in places_of(item) for item in objects
            ):
                return False
        if self.relation is None:
            return True
        first, second = objects if objects[0].shape == self.parts[0].shape else objects[::-1]
        return relation_of(first, second) == self.relation


def relation_of(first: Object, second: Object) -> str | None:
    """Returns where the first object is, seen from the second; None on a diagonal."""
    rows, columns = second.row - first.row, second.column - first.column
    if abs(rows) == abs(columns):
        return None
    if abs(columns) > abs(rows):
        return "left of" if columns > 0 else "right of"
    return "above" if rows > 0 else "below"


def places_of(item: Object) -> tuple[str, str]:
    """Returns the halves of the picture that an object is in: left or right, above or below."""
    return ("right" if item.column else "left", "below" if item.row else "above")


def placed_prompts() -> list[ScenePrompt]:
    """Returns prompts that say in which half of the picture objects are, for training alone.

    Such as "a red square left" and "a square left and a cross": steps on the way to "a square left
    of a cross", which the shipped model did not take (docs/miniature.md).
    """
    alone = [
        (Part(shape=shape, colour=colour, place=place),)
        for shape, colour, place in product(SHAPES, (None, *COLOURS), PLACES)
    ]
    pairs = [
        (Part(shape=first, place=one), Part(shape=second, place=other))
        for first, second in permutations(SHAPES, 2)
        for one, other in product((None, *PLACES), repeat=2)
        if one or other
    ]
    return [ScenePrompt(column="place", parts=parts) for parts in (*alone, *pairs)]


def all_prompts() -> list[ScenePrompt]:
    """Returns every prompt there is, column by column, in a fixed order."""
    pairs = [tuple(Part(shape=s) for s in shapes) for shapes in permutations(SHAPES, 2)]
    columns: dict[str, Iterable[tuple[Part, ...]]] = {
        "single": [(Part(shape=s),) for s in SHAPES],
        "two": pairs,
        "count": [(Part(shape=s, count=n),) for s, n in product(SHAPES, (2, 3, 4))],
        "colour": [(Part(shape=s, colour=c),) for s, c in product(SHAPES, COLOURS)],
        "position": pairs,
        "attribute": [
            tuple(Part(shape=s, colour=c) for s, c in zip(*both, strict=True))
            for both in product(permutations(SHAPES, 2), permutations(COLOURS, 2))
        ],
    }
    return [
        ScenePrompt(column=column, parts=parts, relation=relation)
        for column, every in columns.items()
        for parts in every
        for relation in (RELATIONS if column == "position" else (None,))
    ]


def split_prompts() -> tuple[list[ScenePrompt], list[ScenePrompt]]:
    """Returns the prompts to train on and those to test on, which training never sees.

    A quarter of the columns two to attribute is held out; of the three prompts of `single` none can
    be, since the others need the words, so they are in both lists, tested with other noise.
    """
    train: list[ScenePrompt] = []
    test: list[ScenePrompt] = []
    for column in COLUMNS:
        own = [prompt for prompt in all_prompts() if prompt.column == column]
        if column == "single":
            train += own
            test += own
            continue
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(len(own)))
        held = set(order[: len(own) // 4].tolist())
        train += [prompt for i, prompt in enumerate(own) if i not in held]
        test += [prompt for i, prompt in enumerate(own) if i in held]
    return train, test


def render(objects: Sequence[Object]) -> Tensor:
    """Paints a scene: pixels [3, 16, 16] fp32 in [-1, 1], grey (0) where nothing is."""
    kinds = [0] * GRID**2
    for shape, colour, row, column in objects:
        kinds[GRID * row + column] = _KINDS.index((shape, colour))
    cells = _templates()[kinds].unflatten(0, (GRID, GRID))  # [2, 2, 3, 8, 8]
    return cells.permute(2, 0, 3, 1, 4).reshape(3, SIZE, SIZE)


def read_scene(pixels: Tensor) -> list[Object | None]:
    """Reads the objects off a picture: pixels [3, 16, 16] in [-1, 1].

    Every cell is compared with the empty one and with each shape in each colour. It is the nearest
    of these, if no channel of no pixel is farther from it than 1 (half of the range) and the root
    mean square distance is at most 0.35; otherwise it is None, an object that nobody asked for.
    Empty cells are left out.
    """
    cells = pixels.unfold(1, CELL, CELL).unfold(2, CELL, CELL)  # [3, 2, 2, 8, 8]
    flat = cells.permute(1, 2, 0, 3, 4).reshape(GRID * GRID, -1)
    difference = (flat[:, None] - _templates().flatten(1)).abs()  # [cells, kinds, 192]
    distance = difference.square().mean(-1).sqrt()
    found: list[Object | None] = []
    for cell, nearest in enumerate(distance.argmin(dim=1).tolist()):
        clear = distance[cell, nearest] <= 0.35 and difference[cell, nearest].max() <= 1
        kind = _KINDS[nearest]
        if not clear:
            found.append(None)
        elif kind is not None:
            row, column = divmod(cell, GRID)
            found.append(Object(kind[0], kind[1], row, column))
    return found


def score(prompts: Sequence[ScenePrompt], pictures: Sequence[Tensor]) -> dict[str, float]:
    """Scores pictures [3, 16, 16] in [-1, 1], one for each prompt.

    Returns:
        For each column that occurs the share of right pictures; `overall` is the mean of the
        columns, as in GenEval.

    Raises:
        ValueError: there is not one picture for each prompt, or none at all.
    """
    if len(prompts) != len(pictures) or not prompts:
        raise ValueError(
            f"score: pictures must be one for each of {len(prompts)} prompts, got {len(pictures)}"
        )
    right: dict[str, list[bool]] = {}
    for prompt, picture in zip(prompts, pictures, strict=True):
        right.setdefault(prompt.column, []).append(prompt.holds(read_scene(picture)))
    shares = {
        column: sum(right[column]) / len(right[column]) for column in COLUMNS if column in right
    }
    return shares | {"overall": sum(shares.values()) / len(shares)}


class Question(NamedTuple):
    """A question about a scene.

    Attributes:
        kind: one of `QUESTION_KINDS`, or "place", which is for training alone.
        answer: one word.
    """

    kind: str
    objects: tuple[Object, ...]
    text: str
    answer: str


def draw_question(kind: str, generator: torch.Generator) -> Question:
    """Draws a scene and a question about it; see `draw_questions`."""
    return draw_questions(kind, generator)[0]


def draw_questions(kind: str, generator: torch.Generator) -> list[Question]:
    """Draws a scene and returns every question about it.

    The first one is of `kind`; its answers are equally frequent.

    Raises:
        ValueError: there is no such kind.
    """

    def pick(values: Sequence[str]) -> str:
        return values[int(torch.randint(len(values), (), generator=generator))]

    first = pick(tuple(SHAPES))
    second = pick([shape for shape in SHAPES if shape != first])
    asked_of = [(first, 1), (second, 1)]
    relation = None
    if kind == "count":
        number = 1 + int(torch.randint(GRID * GRID, (), generator=generator))
        most = min(2, GRID * GRID - number)
        other = int(torch.randint(most + 1, (), generator=generator))
        asked_of = [(first, number), (second, other)] if other else [(first, number)]
    elif kind == "position":
        relation = pick(tuple(RELATIONS))
    elif kind == "place":
        asked_of = [(first, 1)]
    elif kind != "colour":
        raise ValueError(
            f"draw_question: kind must be 'count', 'colour', 'position' or 'place', got {kind!r}"
        )
    scene = _scene(kind, tuple(asked_of), relation).draw(generator)
    asked = list(questions_about(tuple(scene)))
    # The first question of its kind is about the first part.
    chosen = next(i for i, question in enumerate(asked) if question.kind == kind)
    return [asked.pop(chosen), *asked]


@lru_cache(maxsize=4096)
def questions_about(scene: tuple[Object, ...]) -> tuple[Question, ...]:
    """Returns every question that has an answer; those about the first object come first.

    Counts are asked of every shape that is there, colours and places of shapes that are there once,
    and positions of two objects of different shapes that are not on a diagonal.
    """
    counts = Counter(item.shape for item in scene)
    alone = [item for item in scene if counts[item.shape] == 1]
    asked = [("count", f"how many {PLURALS[s]} ?", NUMBERS[count]) for s, count in counts.items()]
    asked += [("colour", f"what colour is the {item.shape} ?", item.colour) for item in alone]
    asked += [
        ("place", f"where is the {item.shape} seen from {side} ?", place)
        for item in alone
        for side, place in zip(("above", "the left"), places_of(item), strict=True)
    ]
    if len(scene) == len(counts) == 2:
        for first, second in (scene, scene[::-1]):
            if relation := relation_of(first, second):
                text = f"where is the {first.shape} seen from the {second.shape} ?"
                asked.append(("position", text, relation.split()[0]))
    return tuple(Question(kind, scene, text, answer) for kind, text, answer in asked)


QUESTION_KINDS = ("count", "colour", "position")


def _name(part: Part) -> str:
    colour = f"{part.colour} " if part.colour else ""
    if part.count > 1:
        return f"{NUMBERS[part.count]} {colour}{PLURALS[part.shape]}"
    return f"a {colour}{part.shape}" + (f" {part.place}" if part.place else "")


@cache
def _scene(kind: str, counts: tuple[tuple[str, int], ...], relation: str | None) -> ScenePrompt:
    """Returns what a scene of a question is drawn from."""
    parts = tuple(Part(shape=shape, count=count) for shape, count in counts)
    return ScenePrompt(column=kind, parts=parts, relation=relation)


@cache
def _templates() -> Tensor:
    """Returns a cell of each of `_KINDS`, [10, 3, 8, 8]: always one tensor, to be read only."""
    cells = [torch.zeros(3, CELL, CELL)]
    for shape, colour in product(SHAPES, COLOURS.values()):
        mask = torch.tensor([[char == "#" for char in line] for line in SHAPES[shape]])
        mask = mask.repeat_interleave(CELL // 4, 0).repeat_interleave(CELL // 4, 1)
        cells.append(torch.tensor(colour)[:, None, None] * mask)
    return torch.stack(cells)

# SPDX-License-Identifier: Apache-2.0
"""Pictures of patterned shapes in nine cells, with prompts, questions and an exact judge.

The columns of the score are those of GenEval:

    single     a star                              or with pattern and cell: a striped star top left
    two        a square and a dotted cross
    count      three blue crosses                  two to five, of any colours unless one is named
    colour     a red star                          or with a pattern: a red striped star
    position   a square left of a cross            nearer to that direction than to any other
    attribute  a red square and a blue cross
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_unified.mini.model import BACKGROUND

CELL, GRID = 16, 3
SIZE = CELL * GRID
CELLS = GRID * GRID
# Red, green and blue of 1.
COLOURS = {
    "red": (0.86, 0.13, 0.16),
    "green": (0.13, 0.62, 0.26),
    "blue": (0.12, 0.35, 0.85),
    "yellow": (0.97, 0.76, 0.05),
    "purple": (0.60, 0.20, 0.72),
    "black": (0.13, 0.13, 0.16),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "heart")
TEXTURES = ("plain", "striped", "dotted")
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
PLURALS = {name: "crosses" if name == "cross" else f"{name}s" for name in SHAPES}
# Row and column of the second object minus those of the first, as signs of the leading direction.
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
ROWS, COLUMNS_OF_CELLS = ("top", "middle", "bottom"), ("left", "centre", "right")
_COLOUR_NAMES = tuple(COLOURS)
COLUMNS = ("single", "two", "count", "colour", "position", "attribute")


class Object(NamedTuple):
    """One shape in a cell; row and column count from the top left."""

    shape: str
    colour: str
    texture: str
    row: int
    column: int


# What a cell holds: nothing, or a shape of a colour and a texture.
_KINDS: tuple[tuple[str, str, str] | None, ...] = (None, *product(SHAPES, COLOURS, TEXTURES))
_NUMBER_OF_KIND = {kind: number for number, kind in enumerate(_KINDS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One kind of object that a prompt names; None leaves a property open.

    Attributes:
        place: row and column.
    """

    shape: str
    colour: str | None = None
    texture: str | None = None
    count: int = 1
    place: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenePrompt:
    """What a picture is asked for.

    Attributes:
        column: of the score.
        parts: what is in the picture, and nothing else is; each of another shape.
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

    @property
    def meaning(self) -> Hashable:
        """Returns what is equal for prompts that ask for the same scenes in other words."""
        if self.relation is None:
            return frozenset(self.parts)
        (first, second), (row, column) = self.parts, RELATIONS[self.relation]
        return frozenset([(first, row, column), (second, -row, -column)])

    def draw(self, generator: torch.Generator, *, apart: bool = False) -> list[Object]:
        """Draws a scene that fulfils the prompt: what it leaves open is uniform.

        Args:
            apart: the objects of a relation are at both ends of a row or column.
        """
        taken = {part.place for part in self.parts}
        while True:
            cells = [divmod(i, GRID) for i in torch.randperm(CELLS, generator=generator).tolist()]
            free = iter([cell for cell in cells if cell not in taken])
            drawn = iter(torch.randint(2**30, (2 * CELLS,), generator=generator).tolist())
            objects = [
                Object(
                    part.shape,
                    part.colour or _COLOUR_NAMES[next(drawn) % len(COLOURS)],
                    part.texture or TEXTURES[next(drawn) % len(TEXTURES)],
                    *(part.place or next(free)),
                )
                for part in self.parts
                for _ in range(part.count)
            ]
            if self.relation is None:
                return objects
            first, second = objects
            distances = {abs(first.row - second.row), abs(first.column - second.column)}
            is_legal = not apart or distances == {0, GRID - 1}
            if is_legal and relation_of(first, second) == self.relation:
                return objects

    def holds(self, objects: Sequence[Object | None]) -> bool:
        """Tells whether a scene is what was asked for; None is an object that is not known."""
        found = [item for item in objects if item is not None]
        parts = {part.shape: part for part in self.parts}
        if len(found) < len(objects) or Counter(item.shape for item in found) != Counter(
            {part.shape: part.count for part in self.parts}
        ):
            return False
        for item in found:
            part = parts[item.shape]
            if part.colour not in (None, item.colour) or part.texture not in (None, item.texture):
                return False
            if part.place not in (None, (item.row, item.column)):
                return False
        if self.relation is None:
            return True
        first, second = found if found[0].shape == self.parts[0].shape else found[::-1]
        return relation_of(first, second) == self.relation


def relation_of(first: Object, second: Object) -> str | None:
    """Returns where the first object is, seen from the second; None on a diagonal."""
    rows, columns = second.row - first.row, second.column - first.column
    if abs(rows) == abs(columns):
        return None
    if abs(columns) > abs(rows):
        return "left of" if columns > 0 else "right of"
    return "above" if rows > 0 else "below"


def draw_placed_prompt(generator: torch.Generator) -> ScenePrompt:
    """Draws a prompt that says in which cells one to three objects are, for training alone.

    Such as "a red star top left and a heart middle right": what the cells are called is learned
    from these, and with it "a star left of a heart". It is none that is held out.
    """
    while True:
        drawn = iter(torch.randint(2**30, (10,), generator=generator).tolist())
        shapes = torch.randperm(len(SHAPES), generator=generator).tolist()
        cells = torch.randperm(CELLS, generator=generator).tolist()
        parts = []
        for shape, cell in list(zip(shapes, cells, strict=False))[: 1 + next(drawn) % 3]:
            colour = next(drawn) % (2 * len(COLOURS))
            texture = next(drawn) % (2 * len(TEXTURES))
            parts.append(
                Part(
                    shape=SHAPES[shape],
                    colour=_COLOUR_NAMES[colour] if colour < len(COLOURS) else None,
                    texture=TEXTURES[texture] if texture < len(TEXTURES) else None,
                    place=divmod(cell, GRID),
                )
            )
        prompt = ScenePrompt(column="place", parts=tuple(parts))
        if prompt.meaning not in _held_out_meanings():
            return prompt


@cache
def all_prompts() -> tuple[ScenePrompt, ...]:
    """Returns every prompt of the columns, column by column, in a fixed order."""
    pairs = list(permutations(SHAPES, 2))
    colours, textures = (None, *COLOURS), (None, *TEXTURES)
    places = (None, *product(range(GRID), range(GRID)))
    columns: dict[str, Iterable[tuple[Part, ...]]] = {
        "single": [
            (Part(shape=s, texture=t, place=at),) for s, t, at in product(SHAPES, textures, places)
        ],
        "two": [
            tuple(Part(shape=s, texture=t) for s, t in zip(pair, both, strict=True))
            for pair, both in product(pairs, product(textures, repeat=2))
        ],
        "count": [
            (Part(shape=s, count=n, colour=c),)
            for s, n, c in product(SHAPES, (2, 3, 4, 5), colours)
        ],
        "colour": [
            (Part(shape=s, colour=c, texture=t),) for s, c, t in product(SHAPES, COLOURS, textures)
        ],
        "position": [tuple(Part(shape=s) for s in pair) for pair in pairs],
        "attribute": [
            tuple(Part(shape=s, colour=c) for s, c in zip(*both, strict=True))
            for both in product(pairs, permutations(COLOURS, 2))
        ],
    }
    return tuple(
        ScenePrompt(column=column, parts=parts, relation=relation)
        for column, every in columns.items()
        for parts in every
        for relation in (RELATIONS if column == "position" else (None,))
    )


@cache
def split_prompts() -> tuple[list[ScenePrompt], list[ScenePrompt]]:
    """Returns the prompts to train on and those to test on.

    A quarter of each column is held out, with all that mean the same ("a star above a circle" and
    "a circle below a star"): 60 of single, 120 of two, 42 of count, 36 of colour, 30 of position
    and 224 of attribute.
    """
    train: list[ScenePrompt] = []
    test: list[ScenePrompt] = []
    for column in COLUMNS:
        own = [prompt for prompt in all_prompts() if prompt.column == column]
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(len(own)))
        own = [own[i] for i in order.tolist()]
        meanings = list(dict.fromkeys(prompt.meaning for prompt in own))
        held = set(meanings[: len(meanings) // 4])
        for prompt in own:
            (test if prompt.meaning in held else train).append(prompt)
    return train, test


@cache
def _held_out_meanings() -> frozenset[Hashable]:
    return frozenset(prompt.meaning for prompt in split_prompts()[1])


def is_held_out(objects: Sequence[Object]) -> bool:
    """Tells whether questions about this scene are for the test alone: one scene of eight."""
    return zlib.crc32(bytes(kinds_of(objects))) % 8 == 0


def render(objects: Sequence[Object]) -> Tensor:
    """Paints a scene: pixels [3, 48, 48] fp32 in [-1, 1], anti-aliased."""
    return picture_of(templates()[kinds_of(objects)])


def picture_of(cells: Tensor) -> Tensor:
    """Puts nine cells [..., 9, C, h, w] together to pictures [..., C, 3 h, 3 w]."""
    rows = cells.unflatten(-4, (GRID, GRID))  # [..., 3, 3, C, h, w]
    return rows.movedim(-3, -5).movedim(-3, -2).flatten(-4, -3).flatten(-2, -1)


def properties() -> list[tuple[str, ...]]:
    """Returns shape, colour and texture of each kind of cell; the empty one has a name instead."""
    return [kind or ("empty",) for kind in _KINDS]


def kinds_of(objects: Sequence[Object]) -> list[int]:
    """Returns the kind of each of the nine cells, an index of `templates`."""
    kinds = [0] * CELLS
    for shape, colour, texture, row, column in objects:
        kinds[GRID * row + column] = _NUMBER_OF_KIND[shape, colour, texture]
    return kinds


def read_scene(pixels: Tensor) -> list[Object | None]:
    """Reads the objects off a picture: pixels [3, 48, 48] in [-1, 1].

    Every cell is compared with the empty one and with each shape in each colour and texture. It is
    the nearest of these, if the root mean square distance is at most `CLEAR`; otherwise it is None,
    an object that nobody asked for. Empty cells are left out.
    """
    cells = pixels.unfold(1, CELL, CELL).unfold(2, CELL, CELL)  # [3, 3, 3, 16, 16]
    flat = cells.permute(1, 2, 0, 3, 4).reshape(CELLS, -1)
    known = templates().flatten(1)
    distance = torch.cdist(flat, known) / math.sqrt(known.shape[1])  # [cells, kinds]
    found: list[Object | None] = []
    for cell, nearest in enumerate(distance.argmin(dim=1).tolist()):
        kind = _KINDS[nearest]
        if distance[cell, nearest] > CLEAR:
            found.append(None)
        elif kind is not None:
            row, column = divmod(cell, GRID)
            shape, colour, texture = kind
            found.append(Object(shape, colour, texture, row, column))
    return found


CLEAR = 0.12


def judge(prompts: Sequence[ScenePrompt], pictures: Iterable[Tensor]) -> list[bool]:
    """Tells which pictures [3, 48, 48] in [-1, 1], one for each prompt, are right."""
    return [p.holds(read_scene(x)) for p, x in zip(prompts, pictures, strict=True)]


class Question(NamedTuple):
    """A question about a scene; its answer is one word, but for `PLACE`."""

    kind: str
    objects: tuple[Object, ...]
    text: str
    answer: str


QUESTION_KINDS = ("count", "colour", "texture", "position")
PLACE = "place"  # of questions about a cell, for training alone


def draw_questions(kind: str, generator: torch.Generator, *, held_out: bool) -> list[Question]:
    """Draws a scene that is held out, or none of those, and returns every question about it.

    The first one is of `kind`; its answers are equally frequent.

    Raises:
        ValueError: `kind` is none of `QUESTION_KINDS`, nor `PLACE`.
    """
    if kind not in (*QUESTION_KINDS, PLACE):
        legal = ", ".join((*QUESTION_KINDS, PLACE))
        raise ValueError(f"draw_questions: kind must be one of {legal}, got {kind!r}")
    first, second, third = torch.randperm(len(SHAPES), generator=generator).tolist()[:3]
    drawn = torch.randint(2**30, (3,), generator=generator).tolist()
    relation, counts = None, [1, 1]
    if kind == "position":
        relation = tuple(RELATIONS)[drawn[0] % len(RELATIONS)]
    elif kind == "count":
        counts = [1 + drawn[0] % len(NUMBERS), drawn[1] % 3, drawn[2] % 3]
    elif kind == PLACE:  # often of one object alone: then it need not be found to be known
        counts = [1, drawn[0] % 2, drawn[0] % 4 // 3]
    else:
        counts = [1, 1, drawn[0] % 3]
    parts = tuple(
        Part(shape=SHAPES[shape], count=count)
        for shape, count in zip((first, second, third), counts, strict=False)
        if count
    )
    prompt = ScenePrompt(column=kind, parts=parts, relation=relation)
    while is_held_out(scene := prompt.draw(generator)) != held_out:
        pass
    asked = questions_about(scene)
    # The first question of its kind is about the first part.
    chosen = next(i for i, question in enumerate(asked) if question.kind == kind)
    return [asked.pop(chosen), *asked]


def questions_about(scene: Sequence[Object]) -> list[Question]:
    """Returns every question that has an answer; those about the first object come first.

    Counts are asked of every shape that is there, colours and textures of shapes that are there
    once, and positions of two such shapes that are not on a diagonal. What is in a cell, and where
    an object is, is asked to teach what the others are made of.
    """
    objects = tuple(scene)
    counts = Counter(item.shape for item in scene)
    alone = [item for item in scene if counts[item.shape] == 1]
    asked = [("count", f"how many {PLURALS[s]} ?", NUMBERS[n]) for s, n in counts.items()]
    for item in alone:
        asked.append(("colour", f"what colour is the {item.shape} ?", item.colour))
        asked.append(("texture", f"what pattern is the {item.shape} ?", item.texture))
        asked.append((PLACE, f"where is the {item.shape} ?", _place_name(item.row, item.column)))
    for item in scene:
        name = _place_name(item.row, item.column)
        asked += [
            (PLACE, f"what shape is {name} ?", item.shape),
            (PLACE, f"what colour is {name} ?", item.colour),
            (PLACE, f"what pattern is {name} ?", item.texture),
        ]
    for first, second in permutations(alone, 2):
        if relation := relation_of(first, second):
            text = f"where is the {first.shape} seen from the {second.shape} ?"
            asked.append(("position", text, relation.split()[0]))
    return [Question(kind, objects, text, answer) for kind, text, answer in asked]


def _name(part: Part) -> str:
    noun = PLURALS[part.shape] if part.count > 1 else part.shape
    words = [NUMBERS[part.count] if part.count > 1 else "a", part.colour, part.texture, noun]
    if part.place is not None:
        words.append(_place_name(*part.place))
    return " ".join(word for word in words if word)


def _place_name(row: int, column: int) -> str:
    return f"{ROWS[row]} {COLUMNS_OF_CELLS[column]}"


@cache
def templates() -> Tensor:
    """Returns a cell of each kind, [109, 3, 16, 16]: always one tensor, to be read only."""
    fine = 4  # samples of a pixel along a side
    at = (torch.arange(CELL * fine) + 0.5) / (CELL * fine) * 2 - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    striped = ((x + y) * 2.2 % 1) < 0.5
    dots = torch.stack([(x * 1.75 + 0.5) % 1 - 0.5, (y * 1.75 + 0.5) % 1 - 0.5])
    dotted = dots.square().sum(0).sqrt() > 0.3
    filled = {"plain": torch.ones_like(striped), "striped": striped, "dotted": dotted}
    background = torch.tensor(BACKGROUND)[:, None, None].expand(3, CELL, CELL)
    cells = [background]
    for kind in _KINDS[1:]:
        assert kind is not None
        shape, colour, texture = kind
        inside = _inside(shape, x, y).float() * (0.25 + 0.75 * filled[texture])
        mask = torch.nn.functional.avg_pool2d(inside[None], fine)
        ink = torch.tensor(COLOURS[colour])[:, None, None]
        cells.append(background + (ink - background) * mask)
    return torch.stack(cells) * 2 - 1


def _inside(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Tells which points of [-1, 1] x [-1, 1] a shape covers; y points down."""
    if shape == "circle":
        return x * x + y * y < 0.78**2
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) < 0.7
    if shape == "triangle":
        return (y < 0.68) & (y > 1.75 * x.abs() - 0.8)
    if shape == "cross":
        return (torch.minimum(x.abs(), y.abs()) < 0.27) & (torch.maximum(x.abs(), y.abs()) < 0.8)
    if shape == "heart":
        u, v = x / 0.72, -(y - 0.08) / 0.72
        return (u * u + v * v - 1) ** 3 < u * u * v**3
    angle = torch.remainder(torch.atan2(x, -y) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5
    radius = (x * x + (y - 0.06) ** 2).sqrt()
    inner, outer = 0.38, 0.92
    # The edge from a tip (angle 0) to the next notch (angle pi / 5).
    tip, notch = (outer, 0.0), (inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5))
    px, py = radius * angle.cos(), radius * angle.sin().abs()
    dx, dy = notch[0] - tip[0], notch[1] - tip[1]
    return dx * (py - tip[1]) - dy * (px - tip[0]) > 0

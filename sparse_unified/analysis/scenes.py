# SPDX-License-Identifier: Apache-2.0
"""Pictures to edit for those who have none at hand: a few flat shapes, drawn pixel by pixel.

They are integers alone and written uncompressed, so that the files are the same everywhere, and
with them the fingerprints of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparse_unified._common import optional

SIZE = 256  # pixels, height and width

Colour = tuple[int, int, int]
WHITE, BLACK, GREY = (255, 255, 255), (20, 20, 20), (128, 128, 128)
RED, GREEN, BLUE = (210, 30, 30), (50, 150, 60), (40, 80, 200)
YELLOW, BROWN, SKY = (250, 210, 40), (130, 85, 45), (150, 205, 250)


@dataclass(frozen=True, slots=True)
class Disc:
    """The pixels nearer than `radius` to a centre."""

    colour: Colour
    row: int
    column: int
    radius: int

    def covers(self, rows: Tensor, columns: Tensor) -> Tensor:
        """rows [H, 1], columns [1, W] -> bool [H, W]."""
        return (rows - self.row) ** 2 + (columns - self.column) ** 2 < self.radius**2


@dataclass(frozen=True, slots=True)
class Box:
    """The pixels from (top, left) up to, without, (bottom, right)."""

    colour: Colour
    top: int
    left: int
    bottom: int
    right: int

    def covers(self, rows: Tensor, columns: Tensor) -> Tensor:
        """rows [H, 1], columns [1, W] -> bool [H, W]."""
        inside = (rows >= self.top) & (rows < self.bottom)
        return inside & (columns >= self.left) & (columns < self.right)


@dataclass(frozen=True, slots=True)
class Roof:
    """A triangle that stands on a line from `left` to `right`, `height` pixels high."""

    colour: Colour
    base: int
    left: int
    right: int
    height: int

    def covers(self, rows: Tensor, columns: Tensor) -> Tensor:
        """rows [H, 1], columns [1, W] -> bool [H, W]."""
        width = self.right - self.left
        up = self.base - rows
        from_edge = torch.minimum(columns - self.left, self.right - columns)
        return (up > 0) & (2 * self.height * from_edge >= up * width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture, and what is to be done with it.

    Attributes:
        instruction: the prompt.
        background: of the whole picture; shapes: drawn over it one after the other.
    """

    instruction: str
    background: Colour
    shapes: Sequence[Disc | Box | Roof]

    def pixels(self) -> Tensor:
        """Returns the picture [SIZE, SIZE, 3] uint8."""
        rows, columns = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None]
        image = torch.tensor(self.background, dtype=torch.uint8).repeat(SIZE, SIZE, 1)
        for shape in self.shapes:
            image[shape.covers(rows, columns)] = torch.tensor(shape.colour, dtype=torch.uint8)
        return image


SCENES = (
    Scene(
        instruction="make the red ball blue",
        background=WHITE,
        shapes=(Disc(RED, 128, 128, 70),),
    ),
    Scene(
        instruction="paint the roof of the house green",
        background=SKY,
        shapes=(
            Box(GREEN, 190, 0, 256, 256),
            Box(WHITE, 120, 70, 210, 186),
            Roof(RED, 120, 55, 201, 70),
            Box(BROWN, 160, 115, 210, 141),
        ),
    ),
    Scene(
        instruction="turn the day into night",
        background=SKY,
        shapes=(Disc(YELLOW, 70, 180, 35), Box(BLUE, 150, 0, 256, 256)),
    ),
    Scene(
        instruction="remove the small box",
        background=GREY,
        shapes=(Box(BLUE, 60, 30, 220, 150), Box(YELLOW, 170, 180, 220, 230)),
    ),
    Scene(
        instruction="add a fourth ball on the right",
        background=WHITE,
        shapes=tuple(Disc(GREEN, 128, 35 + 60 * i, 25) for i in range(3)),
    ),
    Scene(
        instruction="let the boat sail in the rain",
        background=SKY,
        shapes=(
            Box(BLUE, 180, 0, 256, 256),
            Box(BROWN, 165, 70, 195, 190),
            Roof(WHITE, 160, 90, 180, 110),
        ),
    ),
    Scene(
        instruction="give the cup a handle",
        background=YELLOW,
        shapes=(Box(BROWN, 200, 0, 256, 256), Box(WHITE, 110, 85, 200, 170)),
    ),
    Scene(
        instruction="switch the traffic light to green",
        background=SKY,
        shapes=(
            Box(BLACK, 30, 88, 226, 168),
            Disc(RED, 70, 128, 27),
            Disc(GREY, 128, 128, 27),
            Disc(GREY, 186, 128, 27),
        ),
    ),
)


def draw_scenes(folder: Path, count: int) -> list[Path]:
    """Draws the first scenes as `00.bmp`, `01.bmp`, ... and returns their paths."""
    image = optional("PIL.Image")
    paths = []
    for index, scene in enumerate(SCENES[:count]):
        paths.append(folder / f"{index:02d}.bmp")
        image.fromarray(scene.pixels().numpy()).save(paths[-1])
    return paths

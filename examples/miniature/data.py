# SPDX-License-Identifier: Apache-2.0
"""Training sequences: scenes to generate from prompts, and questions to answer about scenes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniature import scenes
from miniature.autoencoder import draw_pictures
from sparse_unified.adapt import SequenceConfig
from sparse_unified.adapt.data import generation_sequence, understanding_sequence
from sparse_unified.bagel.packing import Segment
from sparse_unified.mini.model import TIMESTEP_SHIFT, encode, mini_autoencoder, mini_config

_SEQUENCES_PER_EPOCH = 12288
_QUESTIONS_PER_SCENE = 5
SEQUENCE = SequenceConfig(timestep_shift=TIMESTEP_SHIFT)


class MiniDataset:
    """Three of four sequences generate a scene from its prompt, one answers questions; always new.

    A column of the training prompts comes as often as another, and twice as often as one of them
    prompts that say in which cells objects are (`scenes.draw_placed_prompt`). No question is about
    a scene that is held out.

    Args:
        config: of the sequences.
    """

    def __init__(self, config: SequenceConfig = SEQUENCE) -> None:
        self._markers = mini_config().special_tokens
        self._config = config
        train = scenes.split_prompts()[0]
        self._columns = [[p for p in train if p.column == name] for name in scenes.COLUMNS]

    def __len__(self) -> int:
        return _SEQUENCES_PER_EPOCH

    def scene(self, index: int, generator: torch.Generator) -> tuple[list[scenes.Object], str]:
        """Returns the objects of a scene to generate, and its prompt."""
        column = index % (len(self._columns) + 2)
        if column < len(self._columns):
            prompts = self._columns[column]
            prompt = prompts[int(torch.randint(len(prompts), (), generator=generator))]
        else:
            prompt = scenes.draw_placed_prompt(generator)
        return prompt.draw(generator, apart=True), prompt.text

    def questions(self, index: int, generator: torch.Generator) -> list[scenes.Question]:
        """Returns questions about one scene, the first one of the kind whose turn it is."""
        kinds = (*scenes.QUESTION_KINDS, scenes.PLACE)
        kind = kinds[index % len(kinds)]
        first, *others = scenes.draw_questions(kind, generator, held_out=False)
        order = torch.randperm(len(others), generator=generator).tolist()
        return [first, *(others[i] for i in order[: _QUESTIONS_PER_SCENE - 1])]

    def sequence(self, index: int, generator: torch.Generator) -> list[Segment]:
        """Returns a sequence, of understanding for every fourth index."""
        turn, place = divmod(index, 4)
        if place < 3:
            objects, prompt = self.scene(3 * turn + place, generator)
            latent = latent_of(scenes.kinds_of(objects))
            ids = encode(prompt)
            return generation_sequence(self._markers, ids, latent, generator, self._config)
        sequence: list[Segment] = []
        for question in self.questions(turn, generator):
            seen = [] if sequence else [scenes.render(question.objects)]
            text, answer = encode(question.text), encode(question.answer)
            sequence += understanding_sequence(self._markers, seen, text, answer)
        return sequence


def latent_of(kinds: list[int]) -> Tensor:
    """Returns the scaled latent [4, 6, 6] of a scene with these kinds in its nine cells.

    It is put together from the mean code of each kind, which is cheaper than encoding a picture;
    what the autoencoder makes of the picture differs a little, with the cells around.
    """
    return scenes.picture_of(_codes()[kinds])


@cache
def _codes() -> Tensor:
    """Returns the mean latent [109, 4, 2, 2] of each kind of cell among random others."""
    pixels, kinds = draw_pictures(1024, torch.Generator().manual_seed(0))
    latents = mini_autoencoder().encode(pixels)
    cells = latents.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, 4, 3, 3, 2, 2]
    cells = cells.permute(0, 2, 3, 1, 4, 5).reshape(-1, *cells[0, :, 0, 0].shape)
    total = torch.zeros(len(scenes.templates()), *cells.shape[1:])
    total.index_add_(0, kinds.flatten(), cells)
    return total / kinds.flatten().bincount(minlength=len(total))[:, None, None, None]


def write_picture(path: Path, pixels: Tensor) -> None:
    """Writes pixels [3, H, W], about in [-1, 1], as a PNG."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(values.permute(1, 2, 0).numpy()).save(path)


def write_records(folder: Path, count: int, seed: int = 0) -> Path:
    """Writes training data as files: pictures, and records of them as `adapt` and analysis read.

    Args:
        folder: to make; it gets pictures and `records.jsonl`.
        count: pictures with a prompt, and as many with a question.
        seed: of what is drawn.

    Returns:
        the file of the records.
    """
    data, generator = MiniDataset(), torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        drawn, prompt = data.scene(number, generator)
        question = data.questions(number, generator)[0]
        for name, objects in (("drawn", drawn), ("seen", question.objects)):
            write_picture(folder / f"{number}-{name}.png", scenes.render(objects))
        lines.append({"image": f"{number}-drawn.png", "text": prompt})
        answered = {"question": question.text, "answer": question.answer}
        lines.append({"image": f"{number}-seen.png", **answered})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

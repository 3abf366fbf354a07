# SPDX-License-Identifier: Apache-2.0
"""Training sequences of the two tasks: pictures to generate, and questions to answer about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniature import digits, scenes
from sparse_unified.adapt import SequenceConfig
from sparse_unified.adapt.data import generation_sequence, understanding_sequence
from sparse_unified.bagel.packing import Segment
from sparse_unified.mini.model import SHAPES, MiniTask, encode, mini_config

_SCENES_PER_EPOCH = 4096
_QUESTIONS_PER_SCENE = 4


# Pixels [3, H, W] in [-1, 1] of an index, with their prompt, or with questions and answers.
Picture = Callable[[int, torch.Generator], tuple[Tensor, str]]
Questions = Callable[[int, torch.Generator], tuple[Tensor, list[tuple[str, str]]]]


class MiniDataset:
    """Half of its sequences generate a picture from its prompt, half answer questions.

    Args:
        task: for the markers and the latents.
        count: sequences of each half.
        picture, questions: what they are made of.
    """

    def __init__(
        self,
        task: MiniTask,
        count: int,
        picture: Picture,
        questions: Questions,
        config: SequenceConfig | None,
    ) -> None:
        self.picture, self.questions = picture, questions
        self._markers = mini_config(task).special_tokens
        self._task = task
        self._config = config or SequenceConfig(timestep_shift=SHAPES[task].timestep_shift)
        self._count = count

    def __len__(self) -> int:
        return 2 * self._count

    def sequence(self, index: int, generator: torch.Generator) -> list[Segment]:
        """Returns a sequence: of generation for an even index, of understanding for an odd one."""
        if index % 2:
            pixels, asked = self.questions(index // 2, generator)
            sequence: list[Segment] = []
            for question, answer in asked:
                seen = [] if sequence else [pixels]
                sequence += understanding_sequence(
                    self._markers, seen, encode(question), encode(answer)
                )
            return sequence
        pixels, prompt = self.picture(index // 2, generator)
        latent = latent_of(self._task, pixels)
        return generation_sequence(self._markers, encode(prompt), latent, generator, self._config)


def _digits(config: SequenceConfig | None) -> MiniDataset:
    """The training images of `digits`, each once an epoch in either half.

    Half of the time an image is moved by a pixel, for there are no more than 1497.
    """
    pixels, numbers = digits.load()
    index = digits.split()[0]

    def picture(number: int, generator: torch.Generator) -> tuple[Tensor, str]:
        at = index[number]
        return pixels[at], digits.prompt_of(int(numbers[at]))

    def questions(number: int, generator: torch.Generator) -> tuple[Tensor, list[tuple[str, str]]]:
        at = index[number]
        asked = [(digits.QUESTION, digits.NAMES[int(numbers[at])])]
        return _moved(pixels[at], generator), asked

    return MiniDataset(MiniTask.DIGITS, len(index), picture, questions, config)


def _scenes(config: SequenceConfig | None) -> MiniDataset:
    """Scenes of the training prompts, a column as often as another, and questions; always new.

    Beside the columns and kinds that are tested, as often as one of them, there are prompts and
    questions about the half of the picture that an object is in (`scenes.placed_prompts`).
    """
    columns: dict[str, list[scenes.ScenePrompt]] = {}
    for prompt in scenes.split_prompts()[0] + scenes.placed_prompts():
        columns.setdefault(prompt.column, []).append(prompt)
    kinds = (*scenes.QUESTION_KINDS, "place")

    def picture(index: int, generator: torch.Generator) -> tuple[Tensor, str]:
        prompts = list(columns.values())[index % len(columns)]
        prompt = prompts[int(torch.randint(len(prompts), (), generator=generator))]
        return scenes.render(prompt.draw(generator)), prompt.text

    def questions(index: int, generator: torch.Generator) -> tuple[Tensor, list[tuple[str, str]]]:
        first, *others = scenes.draw_questions(kinds[index % len(kinds)], generator)
        order = torch.randperm(len(others), generator=generator).tolist()
        asked = [first, *(others[i] for i in order[: _QUESTIONS_PER_SCENE - 1])]
        return scenes.render(first.objects), [(q.text, q.answer) for q in asked]

    return MiniDataset(MiniTask.SCENES, _SCENES_PER_EPOCH, picture, questions, config)


def latent_of(task: MiniTask, pixels: Tensor) -> Tensor:
    """Returns the scaled latent [3, h, w] of pixels [3, H, W], as the autoencoder does."""
    step = SHAPES[task].downsample
    return SHAPES[task].gain * pixels[:, ::step, ::step]


def training_data(task: MiniTask, config: SequenceConfig | None = None) -> MiniDataset:
    """Returns what a task is trained on."""
    return _digits(config) if task is MiniTask.DIGITS else _scenes(config)


def _moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Moves an image [3, H, W] by a pixel to one of four sides, half of the time."""
    way = int(torch.randint(8, (), generator=generator))
    if way >= 4:
        return pixels
    dim, shift = 1 + way // 2, 1 - 2 * (way % 2)
    moved = pixels.roll(shift, dim)
    moved.select(dim, 0 if shift > 0 else -1).fill_(-1.0)
    return moved


def write_records(task: MiniTask, folder: Path, count: int, seed: int = 0) -> Path:
    """Writes training data as files: pictures, and records of them as `adapt` and analysis read.

    Args:
        task: whose.
        folder: to make; it gets pictures and `records.jsonl`.
        count: pictures with a prompt, and as many with a question.
        seed: of what is drawn.

    Returns:
        the file of the records.
    """
    data, generator = training_data(task), torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        index = number % (len(data) // 2)
        drawn, prompt = data.picture(index, generator)
        seen, ((question, answer), *_) = data.questions(index, generator)
        for name, pixels in (("drawn", drawn), ("seen", seen)):
            values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            Image.fromarray(values.permute(1, 2, 0).numpy()).save(folder / f"{number}-{name}.png")
        lines.append({"image": f"{number}-drawn.png", "text": prompt})
        lines.append({"image": f"{number}-seen.png", "question": question, "answer": answer})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

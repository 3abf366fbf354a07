# SPDX-License-Identifier: Apache-2.0
"""What a model of the miniature can do, on what it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from miniature import digits, scenes
from miniature.data import latent_of
from sparse_unified.adapt import SequenceConfig
from sparse_unified.adapt.data import generation_sequence
from sparse_unified.bagel.model import Bagel, training_forward
from sparse_unified.bagel.packing import pack_training
from sparse_unified.bagel.sampler import (
    SamplingConfig,
    build_guidance,
    initial_noise,
    sample_latents,
)
from sparse_unified.bagel.vision import unpatchify
from sparse_unified.mini.model import SHAPES, MiniTask, encode, mini_autoencoder

_NUM_TIMESTEPS = 21
_BATCH = 100
_autoencoder = lru_cache(maxsize=2)(mini_autoencoder)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """How much is evaluated.

    Args:
        questions: in all; of the digits at most 300.
        velocities: pictures whose velocity is predicted, each at one time; of the digits at most
            300.
        pictures: generated for each digit, and for each column of the scenes.
        seed: of noise, times and scenes.
    """

    questions: int = 300
    velocities: int = 300
    pictures: int = 20
    seed: int = 0


def evaluate(
    model: Bagel, task: MiniTask, config: EvaluationConfig | None = None
) -> dict[str, float]:
    """Measures a model.

    Returns:
        `understanding`: share of right answers; of the scenes also `question_count`,
        `question_colour`, `question_position`. `velocity`: mean squared error of the velocity, of
        latents in units of their noise. `generation`: share of right pictures; of the scenes the
        mean of the six columns, which are there, too, and of the digits also `frechet`.
    """
    config = config or EvaluationConfig()
    return (
        _understanding(model, task, config)
        | {"velocity": velocity_error(model, task, config)}
        | _generation(model, task, config)
    )


def answers(model: Bagel, pixels: Sequence[Tensor], questions: Sequence[str]) -> list[int]:
    """Returns the id of the likeliest first word of each answer.

    Args:
        pixels: [3, H, W] in [-1, 1] of each picture; questions: one about each.
    """
    found: list[int] = []
    for start in range(0, len(pixels), _BATCH):
        part = slice(start, start + _BATCH)
        contexts = model.new_contexts(len(pixels[part]))
        model.prefill_vit(contexts, pixels[part])
        model.prefill_text(contexts, [encode(text) for text in questions[part]])
        bos = model.config.special_tokens.bos
        found += model.next_logits(contexts, [bos] * len(contexts)).argmax(dim=-1).tolist()
    return found


@torch.no_grad()
def velocity_error(model: Bagel, task: MiniTask, config: EvaluationConfig) -> float:
    """Returns the mean squared error of the predicted velocity of held-out pictures."""
    markers = model.config.special_tokens
    generator = torch.Generator().manual_seed(config.seed)
    drawn = SequenceConfig(text_dropout=0.0, timestep_shift=SHAPES[task].timestep_shift)
    pairs = _held_out_pictures(task, config.velocities, config.seed)
    total, tokens = 0.0, 0
    for start in range(0, len(pairs), _BATCH):
        sequences = [
            generation_sequence(markers, encode(text), latent_of(task, pixels), generator, drawn)
            for pixels, text in pairs[start : start + _BATCH]
        ]
        output = training_forward(model, pack_training(model.config, sequences))
        total += float(output.image_loss_sum)
        tokens += output.image_tokens
    return total / tokens


@torch.no_grad()
def generate(
    model: Bagel,
    task: MiniTask,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
) -> Tensor:
    """Generates pictures [N, 3, H, W], about in [-1, 1], one for each prompt and seed.

    Args:
        sampling: None is 20 steps without guidance, which would hide most of what pruning does to
            the conditional model.
    """
    if sampling is None:
        sampling = SamplingConfig(
            num_timesteps=_NUM_TIMESTEPS,
            timestep_shift=SHAPES[task].timestep_shift,
            cfg_text_scale=1.0,
        )
    side = model.config.max_latent_size
    pictures = []
    for start in range(0, len(prompts), _BATCH):
        part = slice(start, start + _BATCH)
        guidance = build_guidance(model, [encode(text) for text in prompts[part]])
        noise = [initial_noise(side * side, model.config.token_channels, s) for s in seeds[part]]
        tokens = sample_latents(model, guidance, noise, [(side, side)] * len(noise), sampling)
        patch = model.config.latent_patch_size
        latents = torch.stack([unpatchify(x, side, side, patch) for x in tokens])
        pictures.append(_autoencoder(task).decode(latents))
    return torch.cat(pictures)


def _understanding(model: Bagel, task: MiniTask, config: EvaluationConfig) -> dict[str, float]:
    asked = _questions(task, config.questions, config.seed)
    pixels, questions, wanted, kinds = zip(*asked, strict=True)
    right: dict[str, list[bool]] = {}
    for token, answer, kind in zip(answers(model, pixels, questions), wanted, kinds, strict=True):
        right.setdefault(kind, []).append(encode(answer) == [token])
    every = [value for values in right.values() for value in values]
    result = {"understanding": sum(every) / len(every)}
    if task is MiniTask.SCENES:
        result |= {f"question_{kind}": sum(v) / len(v) for kind, v in right.items()}
    return result


def _generation(model: Bagel, task: MiniTask, config: EvaluationConfig) -> dict[str, float]:
    if task is MiniTask.DIGITS:
        asked = [digit for digit in range(10) for _ in range(config.pictures)]
        texts = [digits.prompt_of(digit) for digit in asked]
    else:
        prompts = held_out_prompts(config.pictures)
        texts = [prompt.text for prompt in prompts]
    # Far from the seeds of tuning, and others for every seed of the evaluation.
    seeds = [10**6 * (config.seed + 1) + i for i in range(len(texts))]
    pictures = generate(model, task, texts, seeds)
    if task is MiniTask.DIGITS:
        found = digits.score(asked, pictures)
    else:
        found = scenes.score(prompts, list(pictures))
    return {"generation": found.pop("overall")} | found


def held_out_prompts(count: int) -> list[scenes.ScenePrompt]:
    """Returns `count` prompts of each column, going through its held-out ones again and again."""
    held = scenes.split_prompts()[1]
    chosen = []
    for column in scenes.COLUMNS:
        own = [prompt for prompt in held if prompt.column == column]
        chosen += [own[i % len(own)] for i in range(count)]
    return chosen


@lru_cache(maxsize=8)
def _questions(task: MiniTask, count: int, seed: int) -> list[tuple[Tensor, str, str, str]]:
    """Returns pixels, question, answer and kind of each."""
    if task is MiniTask.DIGITS:
        pixels, numbers = digits.load()
        return [
            (pixels[i], digits.QUESTION, digits.NAMES[int(numbers[i])], "digit")
            for i in digits.split()[1][:count].tolist()
        ]
    generator = torch.Generator().manual_seed(10**9 + seed)
    kinds = scenes.QUESTION_KINDS
    drawn = [scenes.draw_question(kinds[i % len(kinds)], generator) for i in range(count)]
    return [(scenes.render(q.objects), q.text, q.answer, q.kind) for q in drawn]


@lru_cache(maxsize=8)
def _held_out_pictures(task: MiniTask, count: int, seed: int) -> list[tuple[Tensor, str]]:
    if task is MiniTask.DIGITS:
        pixels, numbers = digits.load()
        return [
            (pixels[i], digits.prompt_of(int(numbers[i])))
            for i in digits.split()[1][:count].tolist()
        ]
    generator = torch.Generator().manual_seed(10**9 + seed)
    prompts = held_out_prompts(-(-count // len(scenes.COLUMNS)))[:count]
    return [(scenes.render(p.draw(generator)), p.text) for p in prompts]

# SPDX-License-Identifier: Apache-2.0
"""What a model of the miniature can do, on what it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from miniature import scenes
from miniature.data import SEQUENCE
from sparse_unified.adapt.data import generation_sequence
from sparse_unified.bagel.model import Bagel, training_forward
from sparse_unified.bagel.packing import TrainingBatch, pack_training
from sparse_unified.bagel.sampler import (
    SamplingConfig,
    build_guidance,
    initial_noise,
    sample_latents,
)
from sparse_unified.bagel.vision import unpatchify
from sparse_unified.mini.model import TIMESTEP_SHIFT, encode, mini_autoencoder
from sparse_unified.nn import SparseMoE

SAMPLING = SamplingConfig(num_timesteps=21, timestep_shift=TIMESTEP_SHIFT, cfg_text_scale=1.0)
_BATCH = 100
_VELOCITY_BATCH = 16
_SHUFFLES = 20
_autoencoder = cache(mini_autoencoder)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """How much is evaluated.

    Args:
        questions: in all.
        velocities: pictures whose velocity is predicted, each at one time.
        pictures: generated for each column.
        seed: of noise, times and scenes.
    """

    questions: int = 400
    velocities: int = 384
    pictures: int = 64
    seed: int = 0


def evaluate(
    model: Bagel, config: EvaluationConfig | None = None, sampling: SamplingConfig = SAMPLING
) -> dict[str, Any]:
    """Measures a model.

    Args:
        sampling: of the pictures. Guidance hides what pruning does to the conditional model; so
            the default has none.

    Returns:
        What `evaluate_pictures` does, and
        `understanding`: share of right answers, and `question_KIND`, that of each kind.
        `velocity`: mean squared error of the velocity, of latents in units of their noise.
        `items`: also `answers`, a text of 1 (right) and 0, in a fixed order, and `velocity`, the
        errors of batches of 16 pictures.
    """
    config = config or EvaluationConfig()
    drawn = evaluate_pictures(model, config, sampling)
    asked = _questions(config.questions, config.seed)
    found = answers(model, [scenes.render(q.objects) for q in asked], [q.text for q in asked])
    right = [encode(q.answer) == [token] for q, token in zip(asked, found, strict=True)]
    kinds = _shares([f"question_{question.kind}" for question in asked], right)
    errors = velocity_errors(model, config)
    items = drawn.pop("items") | {
        "answers": "".join(str(int(value)) for value in right),
        "velocity": [round(error, 5) for error in errors],
    }
    return drawn | {
        "understanding": sum(right) / len(right),
        "velocity": sum(errors) / len(errors),
        **kinds,
        "items": items,
    }


def evaluate_pictures(
    model: Bagel, config: EvaluationConfig, sampling: SamplingConfig
) -> dict[str, Any]:
    """Draws held-out prompts.

    Returns:
        `generation`: mean over the six columns of the share of right pictures; the columns.
        `items`: what these are means of, for paired comparisons: `pictures`, a text of 1 (right)
        and 0, in a fixed order.
    """
    prompts = held_out_prompts(config.pictures)
    # Far from the seeds of tuning, and others for every seed of the evaluation.
    seeds = [10**6 * (config.seed + 1) + i for i in range(len(prompts))]
    pictures = generate(model, [prompt.text for prompt in prompts], seeds, sampling)
    drawn = scenes.judge(prompts, pictures)
    columns = _shares([prompt.column for prompt in prompts], drawn)
    return {
        "generation": sum(columns.values()) / len(columns),
        **columns,
        "items": {"pictures": "".join(str(int(value)) for value in drawn)},
    }


def _shares(names: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    own: dict[str, list[bool]] = {}
    for name, value in zip(names, right, strict=True):
        own.setdefault(name, []).append(value)
    return {name: round(sum(values) / len(values), 6) for name, values in own.items()}


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
def velocity_errors(model: Bagel, config: EvaluationConfig) -> list[float]:
    """Returns the mean squared error of the predicted velocity, for each batch of pictures."""
    found = []
    for batch, _ in _velocity_batches(model, config):
        output = training_forward(model, batch)
        found.append(float(output.image_loss_sum) / output.image_tokens)
    return found


def _velocity_batches(
    model: Bagel, config: EvaluationConfig
) -> Iterator[tuple[TrainingBatch, list[scenes.ScenePrompt]]]:
    """Yields held-out pictures with noise of a random time, and their prompts."""
    markers = model.config.special_tokens
    generator = torch.Generator().manual_seed(config.seed)
    drawn = replace(SEQUENCE, text_dropout=0.0)
    pairs = _held_out_pictures(config.velocities, config.seed)
    for start in range(0, len(pairs), _VELOCITY_BATCH):
        part = pairs[start : start + _VELOCITY_BATCH]
        latents = _autoencoder().encode(torch.stack([pixels for pixels, _ in part]))
        sequences = [
            generation_sequence(markers, encode(prompt.text), latent, generator, drawn)
            for latent, (_, prompt) in zip(latents, part, strict=True)
        ]
        yield pack_training(model.config, sequences), [prompt for _, prompt in part]


@torch.no_grad()
def routing_information(model: Bagel, config: EvaluationConfig) -> dict[str, dict[str, float]]:
    """Returns what the choice of an expert says about a token.

    Mutual information of "this token uses this expert" with the cell of the token, the time (in
    quarters), the column of the prompt and its first shape, mean over experts and blocks.

    Returns:
        of each of these, `bits` without what shuffled labels give on average, and `chance`, the
        most that one of 20 shuffles gives. Cells are shuffled within a picture; the other labels
        are one for all tokens of a picture, and shuffled among pictures.
    """
    blocks = [m for m in model.modules() if isinstance(m, SparseMoE)]
    used: dict[SparseMoE, list[Tensor]] = {block: [] for block in blocks}

    def watch(block: SparseMoE, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        chosen = block.route(*inputs, **named)[2].long()
        rows = torch.zeros(len(chosen), block.num_experts, dtype=torch.bool)
        used[block].append(rows.scatter_(1, chosen, value=True))

    labels: dict[str, list[Tensor]] = {"cell": [], "time": [], "column": [], "shape": []}
    hooks = [block.register_forward_pre_hook(watch, with_kwargs=True) for block in blocks]
    for batch, prompts in _velocity_batches(model, config):
        training_forward(model, batch)
        cells = torch.arange(scenes.CELLS).repeat(len(prompts))
        labels["cell"].append(cells)
        assert batch.times is not None
        times = batch.times.repeat_interleave(scenes.CELLS)
        labels["time"].append((4 * times).long().clamp(max=3))
        columns = torch.tensor([scenes.COLUMNS.index(p.column) for p in prompts])
        labels["column"].append(columns.repeat_interleave(scenes.CELLS))
        shapes = torch.tensor([scenes.SHAPES.index(p.parts[0].shape) for p in prompts])
        labels["shape"].append(shapes.repeat_interleave(scenes.CELLS))
    for hook in hooks:
        hook.remove()
    choices = torch.cat([torch.cat(rows) for rows in used.values()], dim=1)  # [T, blocks * E]
    images, generator = len(choices) // scenes.CELLS, torch.Generator().manual_seed(0)
    result = {}
    for name, parts in labels.items():
        rows = torch.cat(parts).unflatten(0, (images, scenes.CELLS))
        shuffled = []
        for _ in range(_SHUFFLES):
            if name == "cell":
                order = torch.rand(rows.shape, generator=generator).argsort(dim=1)
                mixed = rows.gather(1, order)
            else:
                mixed = rows[torch.randperm(images, generator=generator)]
            shuffled.append(_information(choices, mixed.flatten()))
        chance = sum(shuffled) / len(shuffled)
        bits = _information(choices, rows.flatten()) - chance
        result[name] = {"bits": round(bits, 6), "chance": round(max(shuffled) - chance, 6)}
    return result


def _information(choices: Tensor, labels: Tensor) -> float:
    """Returns the mutual information of a column [T, N] with labels [T], the mean of N, in bits."""
    joint = torch.stack(
        [
            torch.zeros(int(labels.max()) + 1, choices.shape[1], dtype=torch.float64).index_add_(
                0, labels, rows.double()
            )
            for rows in (choices, ~choices)
        ]
    ) / len(labels)  # [2, L, N]
    apart = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    own = torch.special.xlogy(joint, joint / apart.clamp(min=1e-30)).sum((0, 1))
    return float(own.mean()) / math.log(2)


@torch.no_grad()
def generate(
    model: Bagel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig = SAMPLING,
) -> Tensor:
    """Generates pictures [N, 3, H, W], about in [-1, 1], one for each prompt and seed."""
    side = model.config.max_latent_size
    pictures = []
    for start in range(0, len(prompts), _BATCH):
        part = slice(start, start + _BATCH)
        guidance = build_guidance(model, [encode(text) for text in prompts[part]])
        noise = [initial_noise(side * side, model.config.token_channels, s) for s in seeds[part]]
        tokens = sample_latents(model, guidance, noise, [(side, side)] * len(noise), sampling)
        patch = model.config.latent_patch_size
        latents = torch.stack([unpatchify(x, side, side, patch) for x in tokens])
        pictures.append(_autoencoder().decode(latents))
    return torch.cat(pictures)


def held_out_prompts(count: int) -> list[scenes.ScenePrompt]:
    """Returns `count` prompts of each column, going through its held-out ones again and again."""
    held = scenes.split_prompts()[1]
    chosen = []
    for column in scenes.COLUMNS:
        own = [prompt for prompt in held if prompt.column == column]
        chosen += [own[i % len(own)] for i in range(count)]
    return chosen


@lru_cache(maxsize=8)
def _questions(count: int, seed: int) -> list[scenes.Question]:
    generator = torch.Generator().manual_seed(10**9 + seed)
    kinds = scenes.QUESTION_KINDS
    return [
        scenes.draw_questions(kinds[i % len(kinds)], generator, held_out=True)[0]
        for i in range(count)
    ]


@lru_cache(maxsize=8)
def _held_out_pictures(count: int, seed: int) -> list[tuple[Tensor, scenes.ScenePrompt]]:
    generator = torch.Generator().manual_seed(10**9 + seed)
    prompts = held_out_prompts(-(-count // len(scenes.COLUMNS)))[:count]
    return [(scenes.render(p.draw(generator, apart=True)), p) for p in prompts]

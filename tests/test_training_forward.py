# SPDX-License-Identifier: Apache-2.0
"""The training forward computes what inference computes, on packed sequences, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bagel_models import EXPERTS, random_model
from moe_cases import GOLDEN
from refusals import refused
from torch import Tensor

from sparse_unified import MoEConfig, SkipLayersConfig, apply_moe_, prune_heads_, skip_layers_
from sparse_unified.bagel import Bagel, BagelConfig, Segment, pack_training
from sparse_unified.bagel.images import ContextImage
from sparse_unified.bagel.model import Routing, TrainingOutput, expert_load, router_losses
from sparse_unified.bagel.packing import LatentSegment, TextSegment, VitSegment
from sparse_unified.bagel.sampler import see_images
from sparse_unified.bagel.vision import patchify
from sparse_unified.ops import reference
from sparse_unified.surgery import PruneHeadsConfig
from sparse_unified.testing import build_model, read_case


@pytest.fixture(scope="module")
def config() -> BagelConfig:
    return build_model(read_case(GOLDEN / "understand")).config


@pytest.fixture(scope="module")
def sparse_config(config: BagelConfig) -> BagelConfig:
    return replace(
        config,
        llm=config.llm.with_experts("gen", [1], **EXPERTS).with_experts("und", [0], **EXPERTS),
    )


@pytest.fixture(scope="module")
def model(sparse_config: BagelConfig) -> Bagel:
    return random_model(sparse_config)


def picture(config: BagelConfig, rows: int, columns: int, seed: int) -> VitSegment:
    generator, step = torch.Generator().manual_seed(seed), config.vision.patch_size
    pixels = torch.randn(3, rows * step, columns * step, generator=generator)
    return VitSegment(pixels=pixels)


def latent(config: BagelConfig, rows: int, columns: int, seed: int) -> Tensor:
    generator, step = torch.Generator().manual_seed(seed), config.latent_patch_size
    return torch.randn(config.latent_channels, rows * step, columns * step, generator=generator)


def text(*ids: int, predict: bool = False) -> TextSegment:
    return TextSegment(token_ids=(3, *ids, 4), predict=predict)


def sequences(config: BagelConfig) -> list[list[Segment]]:
    """Every kind of segment, two sequences of one layout, several of others."""

    def noised(rows: int, columns: int, time: float, seed: int) -> LatentSegment:
        clean, noise = (latent(config, rows, columns, s) for s in (seed, seed + 100))
        return LatentSegment(latent=clean, time=time, noise=noise)

    return [
        [text(11, 12, 13), noised(2, 3, 0.7, 1)],
        [text(20, 21), text(22, predict=True)],
        [text(14, 15, 16), noised(2, 3, 0.2, 2)],
        [
            LatentSegment(latent=latent(config, 2, 2, 3)),
            picture(config, 2, 3, 4),
            text(17, 18),
            noised(3, 1, 0.5, 5),
        ],
        [picture(config, 1, 2, 6), text(30), text(31, 32, predict=True)],
        [text(40, predict=True), noised(1, 1, 0.9, 7), text(41, 42, predict=True)],
        # Padded to the first: other lengths, no text at all.
        [text(14), noised(2, 2, 0.4, 8)],
        [noised(2, 3, 0.6, 9)],
    ]


def by_inference(model: Bagel, sequence: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """The two losses of one sequence, from the passes that generation uses."""
    (context,) = model.new_contexts(1)
    text_loss = image_loss = torch.zeros(())
    patch = model.config.latent_patch_size
    for segment in sequence:
        if isinstance(segment, TextSegment):
            (logits,) = model.text_logits([context], [segment.token_ids])
            if segment.predict:
                labels = torch.tensor(segment.token_ids[1:])
                text_loss = text_loss + F.cross_entropy(logits[:-1], labels, reduction="sum")
        elif isinstance(segment, VitSegment):
            see_images(model, [context], [[ContextImage(vit_pixels=segment.pixels)]])
        elif segment.time is None:
            see_images(model, [context], [[ContextImage(latent=segment.latent)]])
        else:
            noisy = (1 - segment.time) * segment.latent + segment.time * segment.noise
            grid = (segment.latent.shape[1] // patch, segment.latent.shape[2] // patch)
            (found,) = model.velocity(
                [patchify(noisy, patch)], [grid], torch.tensor([segment.time]), [[context]]
            )
            error = found[0] - patchify(segment.noise - segment.latent, patch)
            image_loss = image_loss + error.square().mean(-1).sum()
    return text_loss, image_loss


def losses(model: Bagel, batch: Sequence[Sequence[Segment]], **options: bool) -> TrainingOutput:
    return model(pack_training(model.config, batch), **options)


def assert_as_inference(model: Bagel) -> None:
    batch = sequences(model.config)
    found = losses(model, batch)
    expected = [by_inference(model, sequence) for sequence in batch]
    torch.testing.assert_close(found.text_loss_sum, sum(t for t, _ in expected), rtol=2e-5, atol=0)
    torch.testing.assert_close(found.image_loss_sum, sum(i for _, i in expected), rtol=2e-5, atol=0)
    assert found.text_tokens == 2 + 3 + 2 + 3
    assert found.image_tokens == 6 + 6 + 3 + 1 + 4 + 6


def test_losses_are_those_of_the_inference_path_whatever_was_pruned(
    config: BagelConfig, sparse_config: BagelConfig
) -> None:
    assert_as_inference(random_model(config))
    model = random_model(sparse_config)
    assert_as_inference(model)
    apply_moe_(model, MoEConfig(**EXPERTS, layers="0", time_router=True))
    torch.nn.init.normal_(model.language_model.model.layers[0].mlp_moe_gen.gate_time.weight)
    assert_as_inference(model)
    prune_heads_(model, PruneHeadsConfig(component="gen", layers=[0], keep_ratio=0.5))
    assert_as_inference(model)
    for component in ("gen", "und"):
        skip_layers_(model, SkipLayersConfig(component=component, layers=[1], part="attention"))
        assert_as_inference(model)


def test_a_batch_costs_what_its_sequences_cost_alone(model: Bagel) -> None:
    batch = sequences(model.config)
    together = losses(model, batch)
    alone = [losses(model, [sequence]) for sequence in batch]
    for name in ("text_loss_sum", "image_loss_sum"):
        expected = sum(getattr(one, name) for one in alone)
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-5, atol=0)
    for key, found in together.routing.items():
        own = [one.routing[key] for one in alone if key in one.routing]
        assert torch.equal(found.load, sum(one.load for one in own))
        assert found.tokens == sum(one.tokens for one in own)
    # The losses of the parts of a whole add up to its own.
    loads = {key: (found.load, found.tokens) for key, found in together.routing.items()}
    parts = zip(*(router_losses(one.routing, loads) for one in alone), strict=True)
    for part, expected in zip(parts, router_losses(together.routing), strict=True):
        torch.testing.assert_close(sum(part), expected, rtol=1e-5, atol=1e-6)


def test_sequences_are_padded_together_where_it_costs_little(config: BagelConfig) -> None:
    def groups(*lengths: int) -> list[int]:
        batch = [[text(*range(10, 10 + length)) for _ in range(2)] for length in lengths]
        return [group.count for group in pack_training(config, batch).packing.groups]

    assert groups(5, 6, 5, 7) == [4]
    assert groups(5, 5) == [2]  # one layout
    assert groups(1, 1, 79) == [2, 1]  # mostly padding

    # A sequence without its text is padded to those with it.
    image = LatentSegment(latent=latent(config, 2, 3, 1))
    other = picture(config, 2, 3, 4)
    batch = [[text(11, 12), image], [text(11, 12), other], [image], [text(11, 12), image]]
    assert [group.count for group in pack_training(config, batch).packing.groups] == [3, 1]


def gradients(model: Bagel, **options: bool) -> dict[str, Tensor]:
    model.zero_grad()
    out = losses(model, sequences(model.config), **options)
    balance, z_loss = router_losses(out.routing)
    total = out.text_loss_sum + out.image_loss_sum + balance + 0.1 * z_loss
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_changes_no_gradient_and_every_parameter_learns(model: Bagel) -> None:
    plain, less_kept = gradients(model), gradients(model, checkpointing=True)
    assert plain.keys() == less_kept.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(less_kept[name], gradient, rtol=1e-5, atol=1e-6)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    # No shared expert here, so nothing asks its router.
    assert trainable - plain.keys() <= {n for n in trainable if "gate_shared" in n}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in plain.values())


def test_balance_loss_is_one_when_even_and_grows_when_one_expert_takes_all() -> None:
    def balance_of(logits: Tensor) -> float:
        sums = (logits.softmax(-1).sum(0), torch.zeros(()), torch.zeros(1), len(logits))
        return float(router_losses({("gen", 0): Routing(expert_load(logits, 1), *sums)})[0])

    even = torch.eye(4).repeat(3, 1) * 1e-3
    assert balance_of(even) == pytest.approx(1.0, abs=1e-6)
    one = torch.tensor([[9.0, 0, 0, 0]]).repeat(5, 1)
    assert expert_load(one, 1).tolist() == [5, 0, 0, 0]
    assert balance_of(one) > 3.9

    # Ties load the experts that routing chooses.
    logits = torch.zeros(6, 8)
    _, _, chosen = reference.route_topk(torch.zeros(6, 4), torch.zeros(8, 4), 3)
    expected = torch.bincount(chosen.flatten().long(), minlength=8)
    assert torch.equal(expert_load(logits, 3), expected)


CLEAN = torch.zeros(4, 2, 2)
noisy = partial(LatentSegment, latent=CLEAN)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [], "sequences must hold at least one sequence"),
        (lambda: [[]], "a sequence must have at least one segment"),
        (lambda: [[TextSegment(token_ids=())]], "token_ids must hold at least one id"),
        (lambda: [[TextSegment(token_ids=(3, -1))]], "token_ids must be from 0 to 95, got -1"),
        (lambda: [[VitSegment(pixels=torch.zeros(1, 4, 4))]], r"pixels must have shape \[3, "),
        (lambda: [[VitSegment(pixels=torch.zeros(3, 5, 4))]], "sides of pixels must be multiples"),
        (lambda: [[LatentSegment(latent=CLEAN[:1])]], r"latent must have shape \["),
        (lambda: noisy(time=0.5), "time and noise must be given together"),
        (lambda: noisy(noise=CLEAN), "time and noise must be given together"),
        (lambda: noisy(time=1.5, noise=CLEAN), "time must be from 0 to 1"),
        (lambda: noisy(time=0.5, noise=CLEAN[:1]), "noise must have the shape of latent"),
    ],
)
def test_a_sequence_that_does_not_fit_is_refused(
    config: BagelConfig, make: Any, message: str
) -> None:
    refused(f"(pack_training|LatentSegment): {message}", lambda: pack_training(config, make()))

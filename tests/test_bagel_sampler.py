# SPDX-License-Identifier: Apache-2.0
"""Sampling: the time grid, guidance, renormalisation of each image, batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_unified.bagel import (
    Bagel,
    ContextImage,
    SamplingConfig,
    build_guidance,
    sample_latents,
)
from sparse_unified.bagel.model import Denoiser
from sparse_unified.bagel.sampler import Renorm, guide, initial_noise, timestep_grid
from sparse_unified.testing import build_model, read_case

GOLDEN = Path(__file__).parent / "golden"
NAN = float("nan")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model() -> Bagel:
    return build_model(read_case(GOLDEN / "edit"))


def relative_error(out: Tensor, gold: Tensor) -> float:
    return float((out - gold).norm() / gold.norm())


def count_sequences(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records how many sequences each packed pass computes."""
    counts: list[int] = []
    call = Denoiser.__call__

    def counted(self: Denoiser, tokens: Any, time: Tensor) -> list[Tensor]:
        counts.append(sum(self.num_branches))
        return call(self, tokens, time)

    monkeypatch.setattr(Denoiser, "__call__", counted)
    return counts


def test_time_runs_from_one_to_zero_and_shift_moves_it_to_the_noise() -> None:
    plain, shifted = timestep_grid(6, 1.0), timestep_grid(6, 3.0)
    torch.testing.assert_close(plain, torch.linspace(1, 0, 6))
    assert (shifted[0], shifted[-1]) == (1, 0)
    assert (shifted[1:-1] > plain[1:-1]).all()
    torch.testing.assert_close(shifted[2], torch.tensor(3 * 0.6 / (1 + 2 * 0.6)))


def test_noise_depends_on_the_seed_alone() -> None:
    assert torch.equal(initial_noise(6, 16, 7), initial_noise(6, 16, 7))
    assert not torch.equal(initial_noise(6, 16, 7), initial_noise(6, 16, 8))


@pytest.mark.parametrize("renorm", list(Renorm))
@pytest.mark.parametrize("image_scale", [None, 1.5])
def test_guidance_equals_its_formula(renorm: Renorm, image_scale: float | None) -> None:
    v, no_text, no_image = torch.randn(3, 10, 16)
    config = SamplingConfig(
        cfg_text_scale=4.0,
        cfg_img_scale=image_scale or 1.0,
        cfg_renorm_type=renorm,
        cfg_renorm_min=0.2,
    )
    guided = no_text + 4 * (v - no_text)
    if renorm is Renorm.TEXT_CHANNEL:
        ratio = v.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)
        guided = guided * ratio.clamp(0.2, 1)
    if image_scale is not None:
        guided = no_image + image_scale * (guided - no_image)
    if renorm is Renorm.CHANNEL:
        ratio = v.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)
        guided = guided * ratio.clamp(0.2, 1)
    if renorm is Renorm.GLOBAL:
        guided = guided * (v.norm() / guided.norm()).clamp(0.2, 1)
    out = guide(v, no_text, no_image if image_scale is not None else None, config)
    torch.testing.assert_close(out, guided)


def test_renormalisation_never_lengthens() -> None:
    v, no_text = torch.randn(10, 16), torch.zeros(10, 16)
    out = guide(v, v + 0.9 * (no_text - v), None, SamplingConfig(cfg_text_scale=1.01))
    assert out.norm() <= v.norm() * 1.0001


@pytest.mark.parametrize("renorm", list(Renorm))
def test_images_of_a_batch_do_not_influence_each_other(model: Bagel, renorm: Renorm) -> None:
    config = SamplingConfig(num_timesteps=5, cfg_renorm_type=renorm)
    prompts = [[21, 42], [33, 30, 31], [40]]
    # A loud neighbour would change a norm that is taken over the batch.
    noise = [initial_noise(6, 16, 0), 30 * initial_noise(8, 16, 1), initial_noise(4, 16, 2)]
    grids = [(2, 3), (4, 2), (2, 2)]
    together = sample_latents(model, build_guidance(model, prompts), noise, grids, config)
    for i in range(3):
        own = slice(i, i + 1)
        guidance = build_guidance(model, prompts[own])
        alone = sample_latents(model, guidance, noise[own], grids[own], config)
        assert relative_error(together[i], alone[0]) < 1e-5


def test_guidance_is_on_inside_its_interval_only(
    model: Bagel, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = count_sequences(monkeypatch)
    config = SamplingConfig(num_timesteps=6, timestep_shift=1.0, cfg_interval=(0.2, 0.8))
    guidance = build_guidance(model, [[21]])
    sample_latents(model, guidance, [initial_noise(4, 16, 0)], [(2, 2)], config)
    assert counts == [1, 2, 2, 2, 1]  # t = 1, 0.8, 0.6, 0.4, 0.2: lo is outside, hi inside


def test_identical_branches_are_computed_once(
    model: Bagel, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = count_sequences(monkeypatch)
    noise, grid = [initial_noise(4, 16, 0)], [(2, 2)]
    config = SamplingConfig(num_timesteps=2, cfg_img_scale=2.0)
    sample_latents(model, build_guidance(model, [[21]]), noise, grid, config)
    image = ContextImage(latent=torch.randn(4, 4, 4), vit_pixels=torch.randn(3, 28, 28))
    edited = build_guidance(model, [[21]], images=[[image]])
    sample_latents(model, edited, noise, grid, config)
    assert counts == [2, 3]  # without an image, dropping it changes nothing


def test_without_text_guidance_there_is_none(model: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_sequences(monkeypatch)
    config = SamplingConfig(num_timesteps=3, cfg_text_scale=1.0, cfg_img_scale=2.0)
    guidance = build_guidance(model, [[21]])
    sample_latents(model, guidance, [initial_noise(4, 16, 0)], [(2, 2)], config)
    assert counts == [1, 1]


def test_steps_are_reported(model: Bagel) -> None:
    seen: list[tuple[int, float]] = []
    config = SamplingConfig(num_timesteps=4)
    sample_latents(
        model,
        build_guidance(model, [[21]]),
        [initial_noise(4, 16, 0)],
        [(2, 2)],
        config,
        on_step=lambda step, seconds: seen.append((step, seconds)),
    )
    assert [step for step, _ in seen] == [0, 1, 2]
    assert all(seconds > 0 for _, seconds in seen)


def test_prompts_with_different_numbers_of_images(model: Bagel) -> None:
    def image(seed: int) -> ContextImage:
        generator = torch.Generator().manual_seed(seed)
        return ContextImage(
            latent=torch.randn(4, 2, 4, generator=generator),
            vit_pixels=torch.randn(3, 28, 14, generator=generator),
        )

    config = SamplingConfig(num_timesteps=4, cfg_img_scale=2.0, cfg_renorm_type=Renorm.CHANNEL)
    prompts = [[21, 42], [33], [40, 41]]
    images = [[image(0), image(1)], [], [image(2)]]
    noise, grids = [initial_noise(4, 16, i) for i in range(3)], [(2, 2)] * 3
    guidance = build_guidance(model, prompts, images=images)
    together = sample_latents(model, guidance, noise, grids, config)
    for i in range(3):
        own = slice(i, i + 1)
        guidance = build_guidance(model, prompts[own], images=images[own])
        alone = sample_latents(model, guidance, noise[own], grids[own], config)
        assert relative_error(together[i], alone[0]) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_timesteps": 1}, "num_timesteps must be at least 2, got 1"),
        ({"timestep_shift": 0.0}, "timestep_shift must be finite and above 0, got 0.0"),
        ({"timestep_shift": NAN}, "timestep_shift must be finite and above 0, got nan"),
        ({"cfg_text_scale": NAN}, "cfg_text_scale must be finite, got nan"),
        ({"cfg_img_scale": float("inf")}, "cfg_img_scale must be finite, got inf"),
        ({"cfg_interval": (0.4, NAN)}, "cfg_interval must be finite, got nan"),
        ({"cfg_interval": (0.4,)}, r"cfg_interval must be a pair \(lo, hi\), got \(0.4,\)"),
        ({"cfg_renorm_min": 1.5}, "cfg_renorm_min must be from 0 to 1, got 1.5"),
        (
            {"cfg_renorm_type": "batch"},
            "cfg_renorm_type must be one of 'global', 'channel', 'text_channel', got 'batch'",
        ),
    ],
)
def test_bad_sampling_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**change)


@pytest.mark.parametrize(
    "change", [{"num_timesteps": 5.0}, {"cfg_text_scale": "4"}, {"cfg_renorm_min": None}]
)
def test_sampling_options_of_another_type_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(change))):
        SamplingConfig(**change)


def test_noise_of_another_shape_is_refused(model: Bagel) -> None:
    guidance = build_guidance(model, [[21]])
    with pytest.raises(ValueError, match=r"noise must have shape \[6, 16\] for 2 x 3"):
        sample_latents(model, guidance, [torch.zeros(6, 8)], [(2, 3)], SamplingConfig())
    with pytest.raises(ValueError, match="one entry per image, got 1, 0 and 1"):
        sample_latents(model, guidance, [], [(2, 3)], SamplingConfig())

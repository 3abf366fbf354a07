# SPDX-License-Identifier: Apache-2.0
"""Sampling: the time grid, guidance, renormalisation, and steps that a cache extrapolates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import step_cache
import torch
from bagel_models import draw
from moe_cases import GOLDEN, relative_error
from refusals import refused
from torch import Tensor

from sparse_unified.bagel import Bagel, SamplingConfig, StepCache
from sparse_unified.bagel.images import ContextImage
from sparse_unified.bagel.model import Denoiser
from sparse_unified.bagel.sampler import (
    Renorm,
    build_guidance,
    denoising_steps,
    guide,
    initial_noise,
    sample_latents,
    timestep_grid,
)
from sparse_unified.testing import build_model, read_case

NAN, INF = float("nan"), float("inf")
# Of t = 1, 0.8, 0.6, 0.4, 0.2: lo is outside, hi inside.
INSIDE = {"timestep_shift": 1.0, "cfg_interval": (0.2, 0.8)}
IMAGE = ContextImage(latent=torch.ones(4, 4, 4), vit_pixels=torch.ones(3, 28, 28))


@pytest.fixture(scope="module")
def model() -> Bagel:
    return build_model(read_case(GOLDEN / "edit"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[Tensor]]]:
    """The branches of each image in each packed pass, and what they predict."""
    found: list[tuple[list[int], list[Tensor]]] = []
    call = Denoiser.__call__

    def counted(self: Denoiser, tokens: Any, time: Tensor) -> list[Tensor]:
        found.append((self.num_branches, call(self, tokens, time)))
        return found[-1][1]

    monkeypatch.setattr(Denoiser, "__call__", counted)
    return found


def test_time_runs_from_one_to_zero_and_shift_moves_it_to_the_noise() -> None:
    shifted = timestep_grid(6, 3.0)
    torch.testing.assert_close(timestep_grid(6, 1.0), torch.linspace(1, 0, 6))
    torch.testing.assert_close(shifted[[0, 2, 5]], torch.tensor([1, 3 * 0.6 / (1 + 2 * 0.6), 0]))


@pytest.mark.parametrize("renorm", list(Renorm))
@pytest.mark.parametrize("image_scale", [None, 1.5])
def test_guidance_equals_its_formula(renorm: Renorm, image_scale: float | None) -> None:
    v, no_text, no_image = torch.randn(3, 10, 16)
    # Guidance lengthens the first tokens and shortens the last, which stay as short as that.
    no_text = 0.1 * no_text + torch.linspace(0.5, 1.3, 10)[:, None] * v

    def shortened(guided: Tensor, dim: int | None) -> Tensor:
        ratio = v.norm(dim=dim, keepdim=True) / guided.norm(dim=dim, keepdim=True)
        return guided * ratio.clamp(0.2, 1)

    guided = no_text + 4 * (v - no_text)
    if renorm is Renorm.TEXT_CHANNEL:
        guided = shortened(guided, 1)
    if image_scale is not None:
        guided = no_image + image_scale * (guided - no_image)
    if renorm is not Renorm.TEXT_CHANNEL:
        guided = shortened(guided, 1 if renorm is Renorm.CHANNEL else None)
    config = SamplingConfig(
        cfg_img_scale=image_scale or 1.0, cfg_renorm_type=renorm, cfg_renorm_min=0.2
    )
    out = guide(v, no_text, None if image_scale is None else no_image, config=config)
    torch.testing.assert_close(out, guided)


@pytest.mark.parametrize("renorm", list(Renorm))
@pytest.mark.parametrize("cache", [None, StepCache(interval=3, order=2, first=2)])
def test_images_of_a_batch_do_not_influence_each_other(
    model: Bagel, renorm: Renorm, cache: StepCache | None
) -> None:
    options: dict[str, Any] = {"cfg_renorm_type": renorm, "cfg_img_scale": 1.5, "cache": cache}
    prompts, images = [[21, 42], [33, 30, 31], [40]], [[IMAGE, IMAGE], [], [IMAGE]]
    # A loud neighbour would change a norm that is taken over the batch.
    noise = [scale * initial_noise(6, 16, i) for i, scale in enumerate((1, 30, 1))]
    together = draw(model, prompts, images=images, noise=noise, **options)
    for i in range(3):
        own = slice(i, i + 1)
        alone = draw(model, prompts[own], images=images[own], noise=noise[own], **options)
        assert relative_error(together[i], alone[0]) < 1e-5


@pytest.mark.parametrize(
    ("options", "images", "counts"),
    [
        ({"num_timesteps": 6, **INSIDE}, None, [1, 2, 2, 2, 1]),
        # Without an image, dropping it changes nothing: identical branches are computed once.
        ({"num_timesteps": 2, "cfg_img_scale": 2.0}, None, [2]),
        ({"num_timesteps": 2, "cfg_img_scale": 2.0}, [[IMAGE]], [3]),
        ({"num_timesteps": 3, "cfg_text_scale": 1.0, "cfg_img_scale": 2.0}, None, [1, 1]),
    ],
)
def test_branches_are_those_that_guidance_needs(
    model: Bagel, passes: Any, options: dict[str, Any], images: Any, counts: list[int]
) -> None:
    draw(model, [[21]], images=images, **options)
    assert [branches for branches, _ in passes] == [[count] for count in counts]


# ---- Step cache


def value(coefficients: Sequence[Tensor], time: float) -> Tensor:
    return sum((c * time**k for k, c in enumerate(coefficients)), torch.zeros(4, 16))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_an_image_whose_velocity_is_polynomial_is_the_same_in_fewer_steps(
    model: Bagel, monkeypatch: pytest.MonkeyPatch, degree: int
) -> None:
    coefficients = list(torch.randn(degree + 1, 4, 16))
    calls = []

    def velocity(self: Denoiser, tokens: Any, time: Tensor) -> list[Tensor]:
        calls.append(float(time))
        return [torch.stack([value(coefficients, float(time))] * self.num_branches[0])]

    monkeypatch.setattr(Denoiser, "__call__", velocity)
    options: dict[str, Any] = {"grid": (2, 2), "num_timesteps": 22, "cfg_text_scale": 1.0}
    cache = StepCache(interval=4, order=degree, first=degree + 1, last=0)
    [plain], [cached] = (draw(model, [[21]], cache=c, **options) for c in (None, cache))
    torch.testing.assert_close(plain, cached, rtol=1e-4, atol=1e-4)
    assert len(calls) == 21 + degree + 1 + (21 - degree - 1) // 4


def test_interval_one_is_no_cache_bit_for_bit(model: Bagel) -> None:
    every = StepCache(interval=1, order=3, first=1, last=0)
    options: dict[str, Any] = {"images": [[IMAGE]], "cfg_img_scale": 1.5}
    [plain], [cached] = (draw(model, [[21, 30]], cache=c, **options) for c in (None, every))
    assert torch.equal(plain, cached)


def test_where_guidance_sets_in_its_branches_are_computed(model: Bagel, passes: Any) -> None:
    options: dict[str, Any] = {
        "num_timesteps": 13,
        "timestep_shift": 1.0,
        "cfg_interval": (0.2, 0.7),
        "cache": StepCache(interval=4, order=1, first=1, last=0),
    }
    config = SamplingConfig(**options)
    steps = denoising_steps(config)
    assert [step.guided for step in steps] == [False] * 4 + [True] * 6 + [False] * 2
    assert [n for n, step in enumerate(steps) if step.computed] == [0, 4, 8]
    assert draw(model, [[21]], **options)[0].isfinite().all()
    assert [branches for branches, _ in passes] == [[1], [2], [2]]


def test_every_branch_of_every_image_has_its_own_expansion(model: Bagel, passes: Any) -> None:
    """With order 0 and one computed step, guidance combines the three kept predictions."""
    cache = StepCache(interval=9, order=0, first=1, last=0)
    options: dict[str, Any] = {"num_timesteps": 3, "cfg_img_scale": 1.5, "cache": cache}
    latents = draw(model, [[21, 30], [33]], images=[[IMAGE], []], **options)
    ((branches, predictions),) = passes
    assert branches == [3, 2]  # the second has no image to leave out
    for i, (v, out) in enumerate(zip(predictions, latents, strict=True)):
        no_image = v[2] if len(v) == 3 else v[0]
        velocity = guide(v[0], v[1], no_image, config=SamplingConfig(**options))
        torch.testing.assert_close(out, initial_noise(6, 16, i) - velocity)


@pytest.mark.slow
def test_the_experiment_compares_caches_of_several_orders(capsys: Any) -> None:
    options = "--pictures 1 --timesteps 11 --intervals 1 3 --orders 0 2"
    assert step_cache.main(options.split()) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    rows = {name: cells for name, *cells in lines}
    assert rows["interval 1, order 2"] == rows["all steps"]
    assert 0 < float(rows["interval 3, order 2"][2]) < float(rows["interval 3, order 0"][2]) < 1


@pytest.mark.parametrize(
    ("kind", "change", "rule"),
    [
        (SamplingConfig, {"num_timesteps": 1}, "an integer from 2"),
        (SamplingConfig, {"timestep_shift": 0.0}, "above 0"),
        (SamplingConfig, {"cfg_text_scale": NAN}, "a finite"),
        (SamplingConfig, {"cfg_img_scale": INF}, "a finite"),
        (SamplingConfig, {"cfg_interval": (0.4, NAN)}, "a finite"),
        (SamplingConfig, {"cfg_interval": (0.4,)}, "a pair"),
        (SamplingConfig, {"cfg_renorm_min": 1.5}, ".* from 0 to 1"),
        (SamplingConfig, {"cfg_renorm_type": "batch"}, "one of"),
        (SamplingConfig, {"cache": 3}, "a StepCache or None"),
        (StepCache, {"interval": 0}, "an integer of at least 1"),
        (StepCache, {"order": 4}, "an integer from 0 to 3"),
        (StepCache, {"first": 0}, "an integer of at least 1"),
        (StepCache, {"last": -1}, "an integer of at least 0"),
    ],
)
def test_bad_options_are_refused(kind: Any, change: dict[str, Any], rule: str) -> None:
    message = f"{kind.__name__}: {next(iter(change))} must be {rule}"
    refused(message, kind, error=(ValueError, TypeError), **change)


def test_noise_of_another_shape_is_refused(model: Bagel) -> None:
    rule = r"noise must have shape \[6, 16\] for 2 x 3"
    refused(rule, draw, model, [[21]], noise=[torch.zeros(6, 8)])
    given = model, build_guidance(model, [[21]]), [], [(2, 3)], SamplingConfig()
    refused("one entry per image, got 1, 0 and 1", sample_latents, *given)

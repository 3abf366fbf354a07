# SPDX-License-Identifier: Apache-2.0
"""Extrapolated steps: exact where they can be, the same without them, little memory, no layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from step_cache import main as bench
from torch import Tensor

from sparse_unified.bagel import (
    Bagel,
    ContextImage,
    SamplingConfig,
    StepCache,
    build_guidance,
    sample_latents,
    sampler,
)
from sparse_unified.bagel.model import Denoiser
from sparse_unified.bagel.sampler import (
    Expansion,
    computed_steps,
    guided_steps,
    initial_noise,
    timestep_grid,
)
from sparse_unified.testing import build_model, read_case

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def model() -> Bagel:
    torch.set_num_threads(1)
    return build_model(read_case(GOLDEN / "edit"))


def polynomial(degree: int) -> list[Tensor]:
    """Coefficients [N, C] of a velocity that is a polynomial in the time."""
    generator = torch.Generator().manual_seed(degree)
    return [torch.randn(4, 16, generator=generator) for _ in range(degree + 1)]


def value(coefficients: Sequence[Tensor], time: float) -> Tensor:
    return sum((c * time**k for k, c in enumerate(coefficients)), torch.zeros(4, 16))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_velocity_polynomial_in_time_is_extrapolated_exactly(degree: int) -> None:
    coefficients = polynomial(degree)
    times = [float(t) for t in timestep_grid(12, 3.0)]  # far from equal distances
    expansion = Expansion(degree)
    for time in times[: degree + 2]:  # the oldest is forgotten
        expansion.add(time, value(coefficients, time))
    for time in times[degree + 2 : degree + 5]:
        torch.testing.assert_close(
            expansion.at(time), value(coefficients, time), rtol=1e-4, atol=1e-4
        )
    if degree:
        lower = Expansion(degree - 1)
        for time in times[: degree + 2]:
            lower.add(time, value(coefficients, time))
        assert (lower.at(times[degree + 4]) - value(coefficients, times[degree + 4])).norm() > 0.1


def test_at_a_computed_time_an_expansion_is_what_was_computed() -> None:
    expansion = Expansion(3)
    velocities = {1.0: torch.randn(4, 16), 0.9: torch.randn(4, 16), 0.7: torch.randn(4, 16)}
    for time, velocity in velocities.items():
        expansion.add(time, velocity)
    assert torch.equal(expansion.at(0.7), velocities[0.7])
    for time, velocity in velocities.items():
        torch.testing.assert_close(expansion.at(time), velocity, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_an_image_whose_velocity_is_polynomial_is_the_same_in_fewer_steps(
    model: Bagel, monkeypatch: pytest.MonkeyPatch, degree: int
) -> None:
    coefficients = polynomial(degree)
    calls = []

    def velocity(self: Denoiser, tokens: Any, time: Tensor) -> list[Tensor]:
        calls.append(float(time))
        return [torch.stack([value(coefficients, float(time))] * self.num_branches[0])]

    monkeypatch.setattr(Denoiser, "__call__", velocity)
    noise = [initial_noise(4, 16, 0)]
    images = []
    for cache in (None, StepCache(interval=4, order=degree, first=degree + 1, last=0)):
        config = SamplingConfig(num_timesteps=22, cfg_text_scale=1.0, cache=cache)
        guidance = build_guidance(model, [[21]])
        images += sample_latents(model, guidance, noise, [(2, 2)], config)
    torch.testing.assert_close(images[0], images[1], rtol=1e-4, atol=1e-4)
    assert len(calls) == 21 + degree + 1 + (21 - degree - 1) // 4


@pytest.mark.parametrize("images", [False, True])
def test_interval_one_is_no_cache_bit_for_bit(model: Bagel, images: bool) -> None:
    options: dict[str, Any] = {"num_timesteps": 7, "cfg_img_scale": 1.5 if images else 1.0}
    seen = [[ContextImage(latent=torch.ones(4, 4, 4))]] if images else None
    noise = [initial_noise(4, 16, 0)]
    plain, cached = (
        sample_latents(
            model,
            build_guidance(model, [[21, 30]], images=seen),
            noise,
            [(2, 2)],
            SamplingConfig(**options, cache=cache),
        )[0]
        for cache in (None, StepCache(interval=1, order=3, first=1, last=0))
    )
    assert torch.equal(plain, cached)


def test_first_last_and_every_nth_step_are_computed() -> None:
    config = SamplingConfig(
        num_timesteps=13,
        cfg_text_scale=1.0,
        cache=StepCache(interval=3, order=1, first=2, last=2),
    )
    computed = [step for step, runs in enumerate(computed_steps(config)) if runs]
    assert computed == [0, 1, 4, 7, 10, 11]
    whole = SamplingConfig(num_timesteps=13, cache=StepCache(interval=1))
    assert computed_steps(whole) == [True] * 12


def test_where_guidance_sets_in_its_branches_are_computed(
    model: Bagel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SamplingConfig(
        num_timesteps=13,
        timestep_shift=1.0,
        cfg_interval=(0.2, 0.7),
        cache=StepCache(interval=4, order=1, first=1, last=0),
    )
    guided = guided_steps(config)
    assert guided == [False] * 4 + [True] * 6 + [False] * 2
    computed = computed_steps(config)
    assert [step for step, runs in enumerate(computed) if runs] == [0, 4, 8]
    counts = []
    call = Denoiser.__call__

    def counted(self: Denoiser, tokens: Any, time: Tensor) -> list[Tensor]:
        counts.append(self.num_branches)
        return call(self, tokens, time)

    monkeypatch.setattr(Denoiser, "__call__", counted)
    noise = [initial_noise(4, 16, 0)]
    latents = sample_latents(model, build_guidance(model, [[21]]), noise, [(2, 2)], config)
    assert counts == [[1], [2], [2]]
    assert latents[0].isfinite().all()


def test_every_branch_of_every_image_has_its_own_expansion(
    model: Bagel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With order 0 and one computed step, guidance combines the three kept predictions."""
    image = ContextImage(latent=torch.ones(4, 4, 4))
    prompts, seen = [[21, 30], [33]], [[image], []]
    config = SamplingConfig(
        num_timesteps=3,
        cfg_img_scale=1.5,
        cache=StepCache(interval=9, order=0, first=1, last=0),
    )
    computed = []
    call = Denoiser.__call__

    def kept(self: Denoiser, tokens: Any, time: Tensor) -> list[Tensor]:
        computed.append(call(self, tokens, time))
        return computed[-1]

    monkeypatch.setattr(Denoiser, "__call__", kept)
    guidance = build_guidance(model, prompts, images=seen)
    noise = [initial_noise(4, 16, 0), initial_noise(6, 16, 1)]
    latents = sample_latents(model, guidance, noise, [(2, 2), (2, 3)], config)
    assert [len(v) for v in computed[0]] == [3, 2]  # the second has no image to leave out
    assert len(computed) == 1
    for x, v, out in zip(noise, computed[0], latents, strict=True):
        last = v[2] if len(v) == 3 else v[0]
        velocity = sampler.guide(v[0], v[1], last, config)
        torch.testing.assert_close(out, x - velocity)


def test_images_of_a_batch_are_extrapolated_as_alone(model: Bagel) -> None:
    config = SamplingConfig(num_timesteps=9, cache=StepCache(interval=3, order=2, first=2))
    prompts, grids = [[21, 42], [33, 30, 31]], [(2, 3), (4, 2)]
    noise = [initial_noise(6, 16, 0), initial_noise(8, 16, 1)]
    together = sample_latents(model, build_guidance(model, prompts), noise, grids, config)
    for i in range(2):
        own = slice(i, i + 1)
        guidance = build_guidance(model, prompts[own])
        alone = sample_latents(model, guidance, noise[own], grids[own], config)
        assert float((together[i] - alone[0]).norm() / alone[0].norm()) < 1e-5


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_memory_held_is_that_of_the_velocities_alone(
    model: Bagel, monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    held: list[int] = []
    add = Expansion.add
    alive: set[Expansion] = set()

    def counted(self: Expansion, time: float, velocity: Tensor) -> None:
        add(self, time, velocity)
        alive.add(self)
        held.append(sum(expansion.nbytes for expansion in alive))

    monkeypatch.setattr(Expansion, "add", counted)
    config = SamplingConfig(num_timesteps=12, cache=StepCache(interval=2, order=order))
    guidance = build_guidance(model, [[21]])
    sample_latents(model, guidance, [initial_noise(6, 16, 0)], [(2, 3)], config)
    branches = 2
    assert max(held) == branches * (order + 1) * 6 * 16 * 4
    # 1024 x 1024 pixels are 4096 tokens of 64 numbers, as the docstring says.
    assert 3 * 4096 * 64 * 4 == 3 * 2**20


def test_expanding_velocities_is_expanding_last_hidden_states(model: Bagel) -> None:
    times = [0.9, 0.7, 0.6]
    hidden = [torch.randn(6, model.config.llm.hidden_size) for _ in times]
    of_hidden, of_velocity = Expansion(2), Expansion(2)
    with torch.no_grad():
        for time, state in zip(times, hidden, strict=True):
            of_hidden.add(time, state)
            of_velocity.add(time, model.llm2vae(state))
        expected = model.llm2vae(of_hidden.at(0.3))
    # fp32 rounding times the weights of so far an extrapolation; 4e-6 of 1 + |expected| was seen.
    torch.testing.assert_close(of_velocity.at(0.3), expected, rtol=2e-5, atol=2e-5)
    assert of_velocity.nbytes / of_hidden.nbytes == 16 / model.config.llm.hidden_size


def test_the_benchmark_compares_caches_with_fewer_timesteps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["--pictures", "1", "--timesteps", "11"]
    assert bench([*sizes, "--intervals", "1", "3", "--orders", "0", "2"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    rows = {name: cells for name, *cells in lines}
    assert rows["all steps"][:3] == ["10 of 10", "0%", "0.0000"]
    assert rows["interval 1, order 2"] == rows["all steps"]
    flat, curved = (rows[f"interval 3, order {order}"] for order in (0, 2))
    assert flat[:2] == curved[:2] == ["6 of 10", "40%"]
    assert 0 < float(curved[2]) < float(flat[2]) < 1
    assert rows["7 timesteps, no cache"][:2] == ["6 of 6", "40%"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interval": 0}, "StepCache: interval must be at least 1, got 0"),
        ({"order": 4}, "StepCache: order must be from 0 to 3, got 4"),
        ({"order": -1}, "StepCache: order must be from 0 to 3, got -1"),
        ({"first": 0}, "StepCache: first must be at least 1, got 0"),
        ({"last": -1}, "StepCache: last must be at least 0, got -1"),
    ],
)
def test_bad_caches_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepCache(**change)


def test_caches_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"StepCache: interval must be an integer, got 2\.0"):
        StepCache(interval=2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="SamplingConfig: cache must be a StepCache or None, got 3"):
        SamplingConfig(cache=3)  # type: ignore[arg-type]

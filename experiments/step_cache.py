# SPDX-License-Identifier: Apache-2.0
"""Error and savings of step caches: `PYTHONPATH=examples python experiments/step_cache.py`.

Draws pictures with the trained miniature (`sparse_unified.mini`), all steps computed, then
with step caches, then with so many fewer timesteps, and prints how far the latents are from those
of all steps, relative in the L2 norm, and how many of the pictures are right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from miniature import scenes
from miniature.evaluate import generate, held_out_prompts
from sparse_unified.bagel import Bagel, SamplingConfig, StepCache
from sparse_unified.bagel.sampler import denoising_steps
from sparse_unified.mini.model import TIMESTEP_SHIFT, mini_config, trained_weights

_FIRST_SEED = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to sample.

    Attributes:
        name: of it. computed: steps in which the model ran, of `steps`. saved: share of the runs
            that all steps take.
        error: mean over pictures of |x - x_all| / |x_all|. right: share of right pictures.
    """

    name: str
    steps: int
    computed: int
    saved: float
    error: float
    right: float


def measure(
    model: Bagel,
    *,
    pictures: int,
    num_timesteps: int,
    cfg_text_scale: float,
    caches: Sequence[StepCache],
) -> Iterator[Row]:
    """Yields a row for all steps, each cache, and each number of steps that a cache computes.

    Args:
        pictures: of each of the six columns of scenes.
    """
    prompts = held_out_prompts(pictures)
    texts = [prompt.text for prompt in prompts]
    seeds = [_FIRST_SEED + i for i in range(len(texts))]

    def draw(timesteps: int, cache: StepCache | None) -> tuple[SamplingConfig, Tensor]:
        config = SamplingConfig(
            num_timesteps=timesteps,
            timestep_shift=TIMESTEP_SHIFT,
            cfg_text_scale=cfg_text_scale,
            cache=cache,
        )
        return config, generate(model, texts, seeds, config)

    whole = draw(num_timesteps, None)[1]

    def row(name: str, config: SamplingConfig, drawn: Tensor) -> Row:
        distance = (drawn - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
        computed = [step.computed for step in denoising_steps(config)]
        return Row(
            name=name,
            steps=len(computed),
            computed=sum(computed),
            saved=1 - sum(computed) / (num_timesteps - 1),
            error=float(distance.mean()),
            right=mean(scenes.judge(prompts, drawn)),
        )

    yield row("all steps", SamplingConfig(num_timesteps=num_timesteps), whole)
    counts: list[int] = []
    for cache in caches:
        found = row(f"interval {cache.interval}, order {cache.order}", *draw(num_timesteps, cache))
        counts += [] if found.computed in counts else [found.computed]
        yield found
    for count in counts:
        yield row(f"{count + 1} timesteps, no cache", *draw(count + 1, None))


def table_line(row: Row) -> str:
    return (
        f"| {row.name} | {row.computed} of {row.steps} | {row.saved:.0%} | {row.error:.4f} | "
        f"{row.right:.3f} |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints rows of Markdown."""
    parser = argparse.ArgumentParser(prog="step_cache", description=__doc__)
    parser.add_argument(
        "--pictures", type=int, default=20, help="of each of six columns (default 20)"
    )
    parser.add_argument("--timesteps", type=int, default=50, help="of all steps (default 50)")
    parser.add_argument(
        "--cfg-text-scale", type=float, default=1.0, help="guidance; 1 is none (default 1)"
    )
    parser.add_argument(
        "--intervals", type=int, nargs="+", default=[2, 3, 5], help="of caches (default 2 3 5)"
    )
    parser.add_argument(
        "--orders", type=int, nargs="+", default=[0, 1, 2, 3], help="of caches (default 0 1 2 3)"
    )
    options = parser.parse_args(argv)
    if options.pictures < 1:
        parser.error(f"--pictures must be at least 1, got {options.pictures}")
    model = Bagel(mini_config())
    model.load_state_dict(trained_weights())
    caches = [
        StepCache(interval=interval, order=order)
        for interval in options.intervals
        for order in options.orders
    ]
    sys.stdout.write("| | steps computed | saved | error of latents | right pictures |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    with torch.no_grad():
        for row in measure(
            model,
            pictures=options.pictures,
            num_timesteps=options.timesteps,
            cfg_text_scale=options.cfg_text_scale,
            caches=caches,
        ):
            sys.stdout.write(table_line(row) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""Images with FFN weights in few bits: `PYTHONPATH=examples python experiments/storage.py`.

Draws images with the trained miniature (`sparse_unified.mini`), its gen FFNs cut into 8
experts of 16 neurons that are all active, in fp32, in bf16, and stored in each way in 8 or 4 bits.
Prints how far the latents are from those in fp32, relative in the L2 norm, and how many of the
images are correct. Products in fp8 are emulated: rounded as on a GPU, multiplied in fp32.
"""

from __future__ import annotations

import argparse
import sys
from statistics import mean
from unittest import mock

import torch
import torch.nn.functional as F

from miniature import scenes
from miniature.evaluate import generate, held_out_prompts
from sparse_unified import MoEConfig, QuantizeConfig, apply_moe_, quantize_weights_
from sparse_unified.bagel import Bagel, SamplingConfig
from sparse_unified.mini.model import TIMESTEP_SHIFT, mini_config, trained_weights
from sparse_unified.ops import backend, reference
from sparse_unified.surgery.quantize import STORAGES

_FIRST_SEED = 10**6


def main() -> int:
    """Measures and prints rows of Markdown."""
    parser = argparse.ArgumentParser(prog="storage", description=__doc__)
    parser.add_argument("--images", type=int, default=20, help="of each of six columns")
    parser.add_argument("--timesteps", type=int, default=50)
    options = parser.parse_args()
    prompts = held_out_prompts(options.images)
    seeds = [_FIRST_SEED + i for i in range(len(prompts))]
    config = SamplingConfig(
        num_timesteps=options.timesteps,
        timestep_shift=TIMESTEP_SHIFT,
        cfg_text_scale=1.0,
    )
    whole = None
    choose = backend.choose

    def emulated(device: torch.device, *, fp8: bool, **sizes: object) -> str:
        return backend.SCALED_MM if fp8 else choose(device, **sizes)  # type: ignore[arg-type]

    sys.stdout.write("| gen FFNs | error of latents | correct images |\n|---|---|---|\n")
    for storage in ("fp32", "bf16", *STORAGES):
        model = Bagel(mini_config())
        model.load_state_dict(trained_weights())
        model.to(torch.float32 if storage == "fp32" else torch.bfloat16)
        apply_moe_(model, MoEConfig(num_experts=8, top_k=8, layers="all"))
        with (
            torch.no_grad(),
            mock.patch.object(backend, "choose", emulated),
            mock.patch.object(F, "scaled_grouped_mm", reference.scaled_grouped_mm),
        ):
            if storage in STORAGES:
                quantize_weights_(model, QuantizeConfig(storage=storage))
            drawn = generate(model, [p.text for p in prompts], seeds, config)
        whole = drawn if whole is None else whole
        distance = (drawn - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
        right = mean(scenes.judge(prompts, drawn))
        sys.stdout.write(f"| {storage} | {float(distance.mean()):.4f} | {right:.3f} |\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""An image by the official code and by ours: the same weights, noise and steps, on the CPU in fp32.

    BAGEL_REPO=path/to/Bagel SPARSE_UNIFIED_MODEL_REPO=path/to/SparseUnifiedModel \
        python experiments/official_image.py [--rounds 3] [--threads 2] [--profile] [--json FILE]

A model of random weights (hidden 512, 6 layers; sparse: 16 experts, 8 active, in 4 of them) draws
1024 latent tokens with guidance by text: the dense model by Bagel's code and ours, the sparse one
by SparseUnifiedModel's and ours. flash-attn is replaced by torch's fused attention, so that the
official side is not slowed. They take turns; latents must agree to 1e-4 of their norm. Ours also
with the step cache and in bf16, whose distance to the official latent is what they cost.

The roof is how long the products of an image take at the peak of the processor: no code is faster
without leaving products out, as the step cache does.

With --profile, one more image of each says where its time goes: the modules of both codes have the
same names.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_model import fill_randomly

from sparse_unified.bagel import Bagel, BagelConfig, LLMConfig, VisionConfig
from sparse_unified.bagel.config import SpecialTokens
from sparse_unified.bagel.sampler import (
    SamplingConfig,
    StepCache,
    build_guidance,
    sample_latents,
)
from sparse_unified.bench.report import origin
from sparse_unified.bench.target import find_target, measure_roof, processor_name
from sparse_unified.testing import Case

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from official_models import official_bagel, official_code, official_image

GRID = (32, 32)
PROMPT = list(range(20, 60))
EXPERTS, TOP_K, SPARSE_LAYERS = 16, 8, range(1, 5)
TOLERANCE = 1e-4
# What modules do, by the ends of their names.
PARTS = {
    "FFN": re.compile(r"\.mlp(_moe_gen)?$"),
    "projections": re.compile(r"\.[qkvo]_proj(_moe_gen)?$"),
    "norms": re.compile(r"norm(_moe_gen)?$"),
}
ATTENTION, REST = "attention", "rotation, copies, sums, Python"
_MARKERS = SpecialTokens(bos=3, eos=4, start_of_image=5, end_of_image=6)


def configuration(*, sparse: bool) -> BagelConfig:
    """Returns the sizes of the model."""
    llm = LLMConfig(
        hidden_size=512,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=96,
    )
    if sparse:
        llm = llm.with_experts("gen", SPARSE_LAYERS, num_experts=EXPERTS, top_k=TOP_K)
    return BagelConfig(
        llm=llm,
        vision=VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            patch_size=14,
            image_size=112,
        ),
        latent_channels=16,
        vae_downsample=8,
        latent_patch_size=2,
        max_latent_size=64,
        vit_max_num_patch_per_side=8,
        special_tokens=_MARKERS,
    )


def random_case(model: Bagel, steps: int) -> Case:
    """Returns the model's weights, some noise and the settings as the official code takes them."""
    config = model.config
    llm, vision = config.llm, config.vision
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    channels = config.latent_channels * config.latent_patch_size**2
    fields = {
        "llm_config": {name: getattr(llm, name) for name in names}
        | {"num_key_value_heads": llm.num_key_value_heads, "vocab_size": llm.vocab_size}
        | {"rms_norm_eps": llm.rms_norm_eps, "rope_theta": llm.rope_theta}
        | {"hidden_act": "silu", "max_position_embeddings": 4096},
        "vit_config": {name: getattr(vision, name) for name in names}
        | {"image_size": vision.image_size, "patch_size": vision.patch_size, "num_channels": 3},
        "vae_config": {"downsample": config.vae_downsample, "z_channels": config.latent_channels},
        "latent_patch_size": config.latent_patch_size,
        "max_latent_size": config.max_latent_size,
        "vit_max_num_patch_per_side": config.vit_max_num_patch_per_side,
        "new_token_ids": {
            "bos_token_id": _MARKERS.bos,
            "eos_token_id": _MARKERS.eos,
            "start_of_image": _MARKERS.start_of_image,
            "end_of_image": _MARKERS.end_of_image,
        },
        "prompt_ids": [PROMPT],
        "prompts": ["forty tokens"],
        "image_size": [side * config.latent_downsample for side in GRID],
        "num_timesteps": steps + 1,
        "timestep_shift": 3.0,
        "cfg_text_scale": 4.0,
        "cfg_img_scale": 1.0,
        "cfg_interval": [0.0, 1.0],
        "cfg_renorm_min": 0.0,
        "cfg_renorm_type": "global",
    }
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    noise = torch.randn(math.prod(GRID), channels)
    return Case(name="random", fields=fields, tensors=weights | {"init_noise": noise})


def our_image(model: Bagel, case: Case, cache: StepCache | None) -> Tensor:
    """Returns the latent that our sampler makes of the prompt and noise of a case."""
    names = [name for name in SamplingConfig.__slots__ if name in case.fields]
    settings = SamplingConfig(**{name: case.fields[name] for name in names}, cache=cache)
    guidance = build_guidance(model, [PROMPT])
    return sample_latents(model, guidance, [case.tensors["init_noise"]], [GRID], settings)[0]


def compare(runs: dict[str, Callable[[], Tensor]], rounds: int) -> list[dict[str, Any]]:
    """Returns of each run seconds, spread of the rounds and distance to the official latent."""
    latents: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            start = time.perf_counter()
            with torch.inference_mode():
                latents[name] = run()
            if number:
                seconds[name].append(time.perf_counter() - start)
            sys.stderr.write(f"round {number}: {name} {time.perf_counter() - start:.2f} s\n")
    rows = []
    for name, own in seconds.items():
        official = latents[f"official {name.split()[1].rstrip(',')}"]
        rows.append(
            {
                "run": name,
                "seconds": median(own),
                "spread": (max(own) - min(own)) / median(own),
                "distance": float((latents[name] - official).norm() / official.norm()),
            }
        )
    return rows


def roof_seconds(config: BagelConfig, steps: int) -> float:
    """Returns how long an image's FFNs, projections and attention take at the peak of the CPU: of
    the latent tokens, with and without the prompt."""
    llm = config.llm
    dim, tokens = llm.hidden_size, math.prod(GRID)
    kv_dim = dim // llm.num_attention_heads * llm.num_key_value_heads
    left_out = len(llm.sparse_layers("gen")) * (1 - TOP_K / EXPERTS)
    width = llm.intermediate_size * (llm.num_hidden_layers - left_out)  # of all layers
    operations = 0.0
    for keys in (tokens, tokens + len(PROMPT)):
        attention = llm.num_hidden_layers * (2 * dim + 2 * kv_dim + 2 * keys)
        operations += 2 * steps * tokens * dim * (3 * width + attention)
    peak = measure_roof(torch.float32, find_target("cpu")).tflops
    return operations / (1e12 * peak)


@contextmanager
def timed_parts(model: nn.Module) -> Iterator[dict[str, float]]:
    """Inside, the seconds of each part of a model add up in what is yielded."""
    seconds = dict.fromkeys((*PARTS, ATTENTION), 0.0)
    starts: list[float] = []
    hooks = []

    def begin(*_: Any) -> None:
        starts.append(time.perf_counter())

    for name, module in model.named_modules():
        for part, pattern in PARTS.items():
            if pattern.search(name):

                def end(*_: Any, part: str = part) -> None:
                    seconds[part] += time.perf_counter() - starts.pop()

                hooks += [
                    module.register_forward_pre_hook(begin),
                    module.register_forward_hook(end),
                ]
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention

    def timed_attention(*tensors: Tensor, **options: Any) -> Tensor:
        start = time.perf_counter()
        out = attention(*tensors, **options)
        seconds[ATTENTION] += time.perf_counter() - start
        return out

    try:
        with mock.patch.object(F, "scaled_dot_product_attention", timed_attention):
            yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def profile(name: str, run: Callable[[], Tensor], model: nn.Module) -> dict[str, Any]:
    """Returns the seconds of one image, and its parts' shares of them."""
    with timed_parts(model) as seconds, torch.inference_mode():
        start = time.perf_counter()
        run()
        total = time.perf_counter() - start
    shares = {part: own / total for part, own in seconds.items()}
    return {"run": name, "seconds": total, "shares": shares | {REST: 1 - sum(shares.values())}}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; the exit status is 1 when latents of all steps differ from the official."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument(
        "--cache-interval", type=int, default=2, help="of the cached run (default 2)"
    )
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    parser.add_argument("--json", type=Path, help="file that the result is written to")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cache = StepCache(interval=options.cache_interval)
    runs: dict[str, Callable[[], Tensor]] = {}
    models: dict[str, nn.Module] = {}
    roofs: dict[str, float] = {}
    moe = {"num_experts": EXPERTS, "top_k": TOP_K, "num_shared_experts": 0}
    kinds: dict[str, tuple[str, bool, dict[str, Any]]] = {
        "dense": ("BAGEL_REPO", False, {"transformed_gen": False}),
        "sparse": ("SPARSE_UNIFIED_MODEL_REPO", True, moe | {"transformed_gen": [*SPARSE_LAYERS]}),
    }
    for kind, (variable, sparse, more) in kinds.items():
        if variable not in os.environ:
            parser.error(f"{variable} must name a checkout of the official code")
        config = configuration(sparse=sparse)
        roofs[kind] = roof_seconds(config, options.steps)
        model = Bagel(config, device="meta")
        fill_randomly(model, torch.device("cpu"))
        case = random_case(model, options.steps)
        with official_code(Path(os.environ[variable])) as code:
            theirs = official_bagel(code, case, transformed_und=False, **more)
        narrow = deepcopy(model).to(torch.bfloat16)
        models |= {f"official {kind}": theirs, f"ours {kind}": model}
        runs |= {
            f"official {kind}": partial(official_image, code, theirs, case),
            f"ours {kind}": partial(our_image, model, case, None),
            f"ours {kind}, step cache": partial(our_image, model, case, cache),
            f"ours {kind}, bf16": partial(our_image, narrow, case, None),
            f"ours {kind}, bf16, step cache": partial(our_image, narrow, case, cache),
        }
    rows = compare(runs, options.rounds)
    content: dict[str, Any] = {
        **origin(processor_name()),
        "steps": options.steps,
        "cache_interval": options.cache_interval,
        "runs": rows,
        "roof": roofs,
    }
    base = {row["run"]: row["seconds"] for row in rows}
    sys.stdout.write(
        "| run | s | spread | x official dense | x official of its kind | distance |\n"
    )
    sys.stdout.write("|---|---:|---:|---:|---:|---:|\n")
    for row in rows:
        own = base[f"official {row['run'].split()[1].rstrip(',')}"]
        sys.stdout.write(
            f"| {row['run']} | {row['seconds']:.2f} | {row['spread']:.0%} "
            f"| {base['official dense'] / row['seconds']:.2f} | {own / row['seconds']:.2f} "
            f"| {row['distance']:.1e} |\n"
        )
    for kind, seconds in roofs.items():
        sys.stdout.write(f"At the peak of the processor, {kind}: {seconds:.2f} s.\n")
    if options.profile:
        content["profile"] = [profile(name, runs[name], model) for name, model in models.items()]
        parts = (*PARTS, ATTENTION, REST)
        sys.stdout.write(
            f"\n| run | s | {' | '.join(parts)} |\n|---|{'---:|' * (1 + len(parts))}\n"
        )
        for found in content["profile"]:
            shares = " | ".join(f"{found['shares'][part]:.0%}" for part in parts)
            sys.stdout.write(f"| {found['run']} | {found['seconds']:.2f} | {shares} |\n")
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    exact = [row["distance"] for row in rows if row["run"] in models]
    return int(max(exact) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""From nothing to a picture: a dense checkpoint, its sparse version, what they draw, how fast.

The model is the recorded test case `tests/golden/t2i_dense`: BAGEL's structure at toy size with
random weights, so what it draws is noise. The speed is measured on FFNs of a realistic size.

    python examples/demo.py --out demo
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from demo_picture import Bar, draw
from PIL.Image import Image
from torch import Tensor

from sparse_unified import __version__
from sparse_unified.bagel import (
    BagelPipeline,
    SamplingConfig,
    build_guidance,
    sample_latents,
)
from sparse_unified.bench.cases import CASES
from sparse_unified.bench.harness import inputs, measure_interleaved
from sparse_unified.bench.providers import block_providers
from sparse_unified.checkpoint import convert, invert, verify
from sparse_unified.fixtures import write_checkpoint
from sparse_unified.nn import SparseMoE
from sparse_unified.testing import Case, read_case

CASE = Path(__file__).parent.parent / "tests" / "golden" / "t2i_dense"
NUM_EXPERTS, TOP_K = 16, 8
# The FFN that is timed: a quarter of the hidden size and of the width of BAGEL-7B-MoT's.
FFN = CASES[f"quarter-{NUM_EXPERTS}to{TOP_K}-T1024"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the result: what was asked, what came out, and whether that is right."""

    what: str
    result: str
    ok: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each FFN")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    case = read_case(CASE)

    step("1/6", f"write the dense model as a checkpoint: {out / 'dense'}")
    for name in ("dense", "sparse", "inverted"):
        remove_model(out / name)
    write_checkpoint(CASE, out / "dense")

    step("2/6", f"convert it, {NUM_EXPERTS} experts, {TOP_K} active: {out / 'sparse'}")
    convert(out / "dense", out / "sparse", num_experts=NUM_EXPERTS, top_k=TOP_K)

    step("3/6", "verify the sparse one, and invert it")
    checks = check_files(out)

    step("4/6", f"generate {case.fields['prompts'][0]!r} from both")
    checks_of_images, images = generate(case, out)
    checks += checks_of_images

    step("5/6", f"time the FFN, {torch.get_num_threads()} threads")
    bars = time_ffns(options.rounds)

    step("6/6", f"write {out / 'demo.png'} and {out / 'report.json'}")
    draw(out / "demo.png", images, bars, shape=shape_text(), prompt=case.fields["prompts"][0])
    report = {
        "versions": {
            "sparse_unified": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "checks": [asdict(check) for check in checks],
        "ffn": {"shape": shape_text(), "records": [asdict(bar) for bar in bars]},
        "seconds": time.perf_counter() - start,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{table(checks, bars)}\n\n{time.perf_counter() - start:.0f} s, {out / 'demo.png'}")
    return 0 if all(check.ok for check in checks) else 1


def step(number: str, text: str) -> None:
    print(f"[{number}] {text}", flush=True)


def shape_text() -> str:
    return (
        f"T = {FFN.tokens}, D = {FFN.hidden_size}, I = {FFN.intermediate_size}, "
        f"{FFN.num_experts} experts, {FFN.top_k} active, fp32"
    )


def remove_model(directory: Path) -> None:
    """Removes a model directory of an earlier run, and nothing that looks otherwise."""
    if (directory / "llm_config.json").is_file():
        shutil.rmtree(directory)


def check_files(out: Path) -> list[Check]:
    verdict = verify(out / "sparse", out / "dense")
    invert(out / "sparse", out / "inverted")
    weights = [(out / name / "ema.safetensors").read_bytes() for name in ("dense", "inverted")]
    return [
        Check(
            what="experts are the dense neurons, each once, bit for bit",
            result=f"{len(verdict.layers)} layer, {verdict.tensors_compared} other tensors equal",
            ok=verdict.ok,
        ),
        Check(
            what="inverting gives the dense file back",
            result=f"{len(weights[0]):,} bytes equal",
            ok=weights[0] == weights[1],
        ),
    ]


def generate(case: Case, out: Path) -> tuple[list[Check], dict[str, Image]]:
    """Draws the recorded prompt from the recorded noise with three models."""
    recorded = case.tensor("latent.0")
    dense_latent, dense_image = run_pipeline(case, BagelPipeline.from_pretrained(out / "dense"))
    sparse = BagelPipeline.from_pretrained(out / "sparse")
    sparse_latent, sparse_image = run_pipeline(case, sparse)
    for block in sparse_blocks(sparse):
        block.top_k = block.num_experts
    all_latent, all_image = run_pipeline(case, sparse)

    official, same, other = (
        relative_error(dense_latent, recorded),
        relative_error(all_latent, dense_latent),
        relative_error(sparse_latent, dense_latent),
    )
    checks = [
        Check(
            what="dense latent against the recorded official one",
            result=f"{official:.1e} relative, at most 1e-05",
            ok=official <= 1e-5,
        ),
        Check(
            what=f"sparse latent, all {NUM_EXPERTS} experts, against dense",
            result=f"{same:.1e} relative, at most 1e-05",
            ok=same <= 1e-5,
        ),
        Check(
            what=f"sparse latent, {TOP_K} of {NUM_EXPERTS}, untrained, against dense",
            result=f"{other:.1e} relative, must differ",
            ok=1e-5 < other < float("inf"),
        ),
    ]
    images = {
        "dense": dense_image,
        f"sparse, all {NUM_EXPERTS} experts": all_image,
        f"sparse, {TOP_K} of {NUM_EXPERTS}, untrained": sparse_image,
    }
    return checks, images


@torch.no_grad()
def run_pipeline(case: Case, pipeline: BagelPipeline) -> tuple[Tensor, Image]:
    """Returns the latent tokens [N, p * p * C] and the picture of the recorded prompt."""
    fields, model = case.fields, pipeline.model
    prompt_ids = pipeline.tokenizer.encode(fields["prompts"][0])
    guidance = build_guidance(model, [prompt_ids])
    grid = model.config.token_grid(*fields["image_size"], where="demo")
    config = SamplingConfig(**{k: fields[k] for k in SamplingConfig.__slots__ if k in fields})
    latent = sample_latents(model, guidance, [case.tensor("init_noise")], [grid], config)[0]
    return latent, pipeline.pictures.draw(latent, tuple(fields["image_size"]))


def sparse_blocks(pipeline: BagelPipeline) -> list[SparseMoE]:
    return [module for module in pipeline.model.modules() if isinstance(module, SparseMoE)]


def relative_error(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).norm() / wanted.norm())


def time_ffns(rounds: int) -> list[Bar]:
    """Times the dense FFN, a loop over experts and the sparse block, one after the other."""
    dtype = torch.float32
    xs = inputs((FFN.tokens, FFN.hidden_size), dtype)
    modules = block_providers(FFN, dtype)
    names = {"dense": "dense FFN", "expert_loop": "loop over experts", "sparse_unified": None}

    def call(module: torch.nn.Module, turn: int) -> None:
        module(xs[turn % len(xs)])

    calls = {name: partial(call, modules[name]) for name in names}
    with torch.inference_mode():
        times = measure_interleaved(calls, repeats=rounds)
    seconds = {name: median(values) for name, values in times.items()}
    return [
        Bar(
            name=title or name,
            milliseconds=1e3 * seconds[name],
            speedup=seconds["dense"] / seconds[name],
        )
        for name, title in names.items()
    ]


def table(checks: list[Check], bars: list[Bar]) -> str:
    """Lays out checks and timings in the same three columns."""
    rows = [(check.what, check.result, "ok" if check.ok else "FAILED") for check in checks]
    rows += [
        (f"FFN, {bar.name}", f"{bar.milliseconds:.1f} ms", f"{bar.speedup:.2f}x dense")
        for bar in bars
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    rule = "-" * (sum(widths) + 4)
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([rule, *lines[: len(checks)], rule, shape_text(), *lines[len(checks) :], rule])


if __name__ == "__main__":
    sys.exit(main())

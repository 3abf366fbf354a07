# SPDX-License-Identifier: Apache-2.0
"""From nothing to pictures: a small trained BAGEL, pruned and sparse; what they draw, how fast.

The model is the miniature that the package holds (`sparse_unified.mini`), trained to draw scenes of
coloured shapes. A static half of its generation FFNs, the best that calibration finds, and sparse
ones of the same number of active neurons are tuned by the same steps. The speed is measured on FFNs
of a realistic size.

    python examples/demo.py --out demo
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from demo_picture import Bar, Row, draw

from miniature.data import MiniDataset
from miniature.evaluate import EvaluationConfig, evaluate, generate
from miniature.scenes import all_prompts, judge
from miniature.study import GUIDED, SHOWN, calibrate, make_sparse_, make_static_
from sparse_unified import MoEConfig, __version__
from sparse_unified._common import format_table
from sparse_unified.adapt import Trainer, TrainingConfig
from sparse_unified.bagel.model import Bagel
from sparse_unified.bench.cases import CASES
from sparse_unified.bench.measure import inputs, measure_interleaved
from sparse_unified.bench.suites import block_providers
from sparse_unified.checkpoint import convert, invert, verify
from sparse_unified.mini import load_pipeline, write_model
from sparse_unified.nn import SparseMoE

# Of 32 pieces 16 are active for a token: 8 for all tokens, and 8 of the other 24.
SPARSE = MoEConfig(num_experts=24, top_k=8, num_shared_experts=8, layers="all")
# What is timed with it: a quarter of the hidden size and of the width of BAGEL-7B-MoT's FFN.
FFN = CASES["quarter-16to8-T1024"]
EVALUATION = EvaluationConfig(questions=120, velocities=96, pictures=16)


class Check(NamedTuple):
    """One line of the result: what was asked, what came out, and whether that is right."""

    what: str
    result: str
    ok: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each FFN")
    parser.add_argument("--steps", type=int, default=150, help="of tuning, pruned and sparse")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    step("1/4", f"write the model, convert, verify, invert: {out}")
    checks = check_files(out)
    step("2/4", f"prune, make sparse, tune each by {options.steps} steps, draw")
    rows, metrics = compare(out / "dense", options.steps)
    step("3/4", f"time the FFN, {torch.get_num_threads()} threads")
    bars = time_ffns(options.rounds)
    step("4/4", f"write {out / 'demo.png'} and {out / 'report.json'}")
    draw(out / "demo.png", SHOWN, rows, bars, shape=shape_text())
    report = {
        "versions": {
            "sparse_unified": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "checks": [check._asdict() for check in checks],
        "models": metrics,
        "ffn": {"shape": shape_text(), "records": [asdict(bar) for bar in bars]},
        "seconds": time.perf_counter() - start,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{table(checks, metrics, bars)}\n")
    print(f"{time.perf_counter() - start:.0f} s, {out / 'demo.png'}")
    return 0 if all(check.ok for check in checks) else 1


def step(number: str, text: str) -> None:
    print(f"[{number}] {text}", flush=True)


def shape_text() -> str:
    return (
        f"T = {FFN.tokens}, D = {FFN.hidden_size}, I = {FFN.intermediate_size}, "
        "half of the neurons active, fp32"
    )


def remove_model(directory: Path) -> None:
    """Removes a model directory of an earlier run, and nothing that looks otherwise."""
    if (directory / "llm_config.json").is_file():
        shutil.rmtree(directory)


def check_files(folder: Path) -> list[Check]:
    """Writes the dense model and its sparse version, and checks that one."""
    for name in ("dense", "sparse", "inverted"):
        remove_model(folder / name)
    write_model(folder / "dense")
    convert(folder / "dense", folder / "sparse", num_experts=16, top_k=8, layers="all")
    verdict = verify(folder / "sparse", folder / "dense")
    invert(folder / "sparse", folder / "inverted")
    weights = [(folder / name / "ema.safetensors").read_bytes() for name in ("dense", "inverted")]
    models = [load_pipeline(folder / name).model for name in ("dense", "sparse")]
    for block in models[1].modules():
        if isinstance(block, SparseMoE):
            block.top_k = block.num_experts
    dense, sparse = (generate(model, SHOWN, range(len(SHOWN))) for model in models)
    difference = float((sparse - dense).norm() / dense.norm())
    return [
        Check(
            "experts are the dense neurons, each once, bit for bit",
            f"{len(verdict.layers)} layers, {verdict.tensors_compared} other tensors equal",
            verdict.ok,
        ),
        Check(
            "inverting gives the dense file back",
            f"{len(weights[0]):,} bytes equal",
            weights[0] == weights[1],
        ),
        Check(
            "pictures with all 16 experts are those of dense",
            f"{difference:.1e} relative, at most 1e-04",
            difference <= 1e-4,
        ),
    ]


def compare(dense: Path, steps: int) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """Draws the same prompts from the same noise with the three models, and measures each."""
    statistics, _ = calibrate(load_pipeline(dense).model, "generation")
    kinds: dict[str, Callable[[Bagel], None]] = {
        "dense": lambda model: None,
        f"static half, tuned {steps} steps": lambda model: make_static_(model, statistics, 0.5),
        f"sparse 24/8+8, tuned {steps} steps": lambda model: make_sparse_(
            model, statistics, SPARSE
        ),
    }
    by_text = {prompt.text: prompt for prompt in all_prompts()}
    prompts = [by_text[text] for text in SHOWN]
    rows, metrics = [], {}
    for title, make in kinds.items():
        model = load_pipeline(dense).model
        make(model)
        if title != "dense":
            config = TrainingConfig(
                steps=steps, batch_size=32, learning_rate=3e-4, warmup_steps=5, seed=1
            )
            Trainer(model.train(), MiniDataset(), config).run()
        found = evaluate(model.eval(), EVALUATION, GUIDED)
        metrics[title] = found
        pictures = list(generate(model, SHOWN, range(len(SHOWN)), GUIDED))
        right = judge(prompts, pictures)
        rows.append(Row(title=title, note=words(found), pictures=pictures, right=right))
    return rows, metrics


def time_ffns(rounds: int) -> list[Bar]:
    """Times the dense FFN by torch and by our kernel, a loop over 16 experts of which 8 are active,
    our block of these, and one of the kind that has drawn the pictures.

    They take turns. Half of the neurons is at most 2x over a dense FFN at the same rate, so what
    the blocks gain is told over the faster of the two dense ones.
    """
    dtype = torch.float32
    xs = inputs((FFN.tokens, FFN.hidden_size), dtype)
    shared = SparseMoE(
        FFN.hidden_size,
        FFN.intermediate_size,
        SPARSE.num_experts,
        SPARSE.top_k,
        SPARSE.num_shared_experts,
    )
    torch.nn.init.normal_(shared.gate.weight, std=FFN.hidden_size**-0.5)
    modules = block_providers(FFN, dtype) | {"shared": shared}
    names = {
        "dense": "dense, torch",
        "dense_ours": "dense, our kernel",
        "expert_loop": "16/8, a loop over experts",
        "sparse_unified": "16/8, sparse_unified",
        "shared": "24/8+8, sparse_unified",
    }

    def call(module: torch.nn.Module, turn: int) -> None:
        module(xs[turn % len(xs)])

    calls = {name: partial(call, modules[name]) for name in names}
    with torch.inference_mode():
        times = measure_interleaved(calls, repeats=rounds)
    seconds = {name: median(values) for name, values in times.items()}
    return [
        Bar(
            name=title,
            milliseconds=1e3 * seconds[name],
            speedup=min(seconds["dense"], seconds["dense_ours"]) / seconds[name],
        )
        for name, title in names.items()
    ]


def table(checks: list[Check], metrics: dict[str, dict[str, Any]], bars: list[Bar]) -> str:
    """Lays out checks, models and timings, a table each."""
    blocks = [[(check.what, check.result, "ok" if check.ok else "FAILED") for check in checks]]
    blocks.append(
        [
            (title, words(found).replace("\n", ", "), f"velocity error {found['velocity']:.4f}")
            for title, found in metrics.items()
        ]
    )
    blocks.append(
        [
            (f"FFN, {bar.name}", f"{bar.milliseconds:.1f} ms", f"{bar.speedup:.2f}x best dense")
            for bar in bars
        ]
    )
    notes = f"in brackets: number, and an interval of 95 %\nFFN: {shape_text()}"
    return "\n\n".join([*map(format_table, blocks), notes])


def words(found: dict[str, Any]) -> str:
    return "\n".join(
        f"{share(found['items'][name])} of {name} right" for name in ("pictures", "answers")
    )


def share(items: str) -> str:
    """Says what part of items is 1, their number, and Wilson's interval of 95 %."""
    n, z = len(items), 1.96
    p = items.count("1") / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return f"{100 * p:.0f} % ({n}: {100 * (middle - reach):.0f} to {100 * (middle + reach):.0f})"


if __name__ == "__main__":
    sys.exit(main())

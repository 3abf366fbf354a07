# SPDX-License-Identifier: Apache-2.0
"""From nothing to pictures: a small trained BAGEL, pruned, sparse, tuned; what they draw, how fast.

The model is the miniature that the package holds (`sparse_unified.mini`): trained on the digits of
scikit-learn and on scenes of coloured shapes. The speed is measured on FFNs of a realistic size.

    python examples/demo.py --out demo
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from demo_picture import Bar, Row, draw
from torch import Tensor

from miniature import scenes
from miniature.data import training_data
from miniature.evaluate import EvaluationConfig, evaluate, generate
from sparse_unified import __version__
from sparse_unified._common import format_table
from sparse_unified.adapt import Trainer, TrainingConfig, freeze
from sparse_unified.bagel import BagelPipeline
from sparse_unified.bagel.model import Bagel
from sparse_unified.bench.cases import CASES
from sparse_unified.bench.measure import inputs, measure_interleaved
from sparse_unified.bench.suites import block_providers
from sparse_unified.checkpoint import PruneWidthConfig, convert, invert, prune, verify
from sparse_unified.mini.model import MiniTask, load_pipeline, write_model
from sparse_unified.nn import SparseMoE

NUM_EXPERTS, TOP_K = 16, 8
# The FFN that is timed: a quarter of the hidden size and of the width of BAGEL-7B-MoT's.
FFN = CASES[f"quarter-{NUM_EXPERTS}to{TOP_K}-T1024"]
PROMPTS = {
    MiniTask.DIGITS: [f"the digit {name}" for name in ("zero", "two", "three", "five", "seven")],
    MiniTask.SCENES: [
        "a red square",
        "two crosses",
        "a square and a triangle",
        "a cross left of a square",
        "a green cross and a blue square",
    ],
}
EVALUATION = EvaluationConfig(questions=150, velocities=150, pictures=5)


class Check(NamedTuple):
    """One line of the result: what was asked, what came out, and whether that is right."""

    what: str
    result: str
    ok: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each FFN")
    parser.add_argument("--steps", type=int, default=60, help="of each of two stages of tuning")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    checks: list[Check] = []
    rows: list[Row] = []
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for number, task in enumerate(MiniTask, 1):
        folder = out / task.value
        step(f"{number}/4", f"{task.value}: write, convert, prune, verify, tune, draw: {folder}")
        checks += check_files(task, folder)
        own, metrics[task.value] = compare(task, folder, options.steps)
        rows += own

    step("3/4", f"time the FFN, {torch.get_num_threads()} threads")
    bars = time_ffns(options.rounds)

    step("4/4", f"write {out / 'demo.png'} and {out / 'report.json'}")
    draw(out / "demo.png", rows, bars, shape=shape_text())
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
        f"{FFN.num_experts} experts, {FFN.top_k} active, fp32"
    )


def remove_model(directory: Path) -> None:
    """Removes a model directory of an earlier run, and nothing that looks otherwise."""
    if (directory / "llm_config.json").is_file():
        shutil.rmtree(directory)


def check_files(task: MiniTask, folder: Path) -> list[Check]:
    """Writes the dense model, its sparse and its pruned version, and checks the sparse one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dense", "sparse", "pruned", "inverted"):
        remove_model(folder / name)
    write_model(task, folder / "dense")
    convert(folder / "dense", folder / "sparse", num_experts=NUM_EXPERTS, top_k=TOP_K, layers="all")
    prune(folder / "dense", folder / "pruned", [PruneWidthConfig(component="gen", keep_ratio=0.5)])
    verdict = verify(folder / "sparse", folder / "dense")
    invert(folder / "sparse", folder / "inverted")
    weights = [(folder / name / "ema.safetensors").read_bytes() for name in ("dense", "inverted")]
    pipelines = [load_pipeline(folder / name) for name in ("dense", "sparse")]
    for block in sparse_blocks(pipelines[1]):
        block.top_k = block.num_experts
    pictures = [draw_prompts(pipeline.model, task) for pipeline in pipelines]
    difference = relative_error(pictures[1], pictures[0])
    found = {
        "experts are the dense neurons, each once, bit for bit": (
            f"{len(verdict.layers)} layers, {verdict.tensors_compared} other tensors equal",
            verdict.ok,
        ),
        "inverting gives the dense file back": (
            f"{len(weights[0]):,} bytes equal",
            weights[0] == weights[1],
        ),
        f"pictures with all {NUM_EXPERTS} experts are those of dense": (
            f"{difference:.1e} relative, at most 1e-04",
            difference <= 1e-4,
        ),
    }
    return [Check(f"{task.value}: {what}", *result) for what, result in found.items()]


def compare(
    task: MiniTask, folder: Path, steps: int
) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """Draws the prompts with the dense, the pruned and the sparse model, and measures each."""
    rows, metrics = [], {}
    for name, title in (
        ("dense", "dense"),
        ("pruned", "static half, untrained"),
        ("sparse", f"sparse {NUM_EXPERTS}/{TOP_K}, untrained"),
        ("tuned", f"sparse {NUM_EXPERTS}/{TOP_K}, tuned {2 * steps} steps"),
    ):
        model = load_pipeline(folder / ("sparse" if name == "tuned" else name)).model
        if name == "tuned":
            tune(model, task, steps)
        pictures = draw_prompts(model, task)
        metrics[title] = evaluate(model, task, EVALUATION)
        note = words(metrics[title])
        rows.append(Row(title=title, note=note, prompts=PROMPTS[task], pictures=list(pictures)))
    return rows, metrics


def draw_prompts(model: Bagel, task: MiniTask) -> Tensor:
    """Draws the prompts of a task, each from noise of its own: [5, 3, H, W]."""
    return generate(model, task, PROMPTS[task], range(len(PROMPTS[task])))


def tune(model: Bagel, task: MiniTask, steps: int) -> None:
    """Tunes routers and all but the experts, then everything."""
    for number, stage in enumerate(("expert_frozen", "full")):
        freeze(model, stage)
        config = TrainingConfig(
            steps=steps, batch_size=32, learning_rate=1e-3, warmup_steps=5, seed=1 + number
        )
        Trainer(model, training_data(task), config).run()


def sparse_blocks(pipeline: BagelPipeline) -> list[SparseMoE]:
    return [module for module in pipeline.model.modules() if isinstance(module, SparseMoE)]


def relative_error(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).norm() / wanted.norm())


def time_ffns(rounds: int) -> list[Bar]:
    """Times the dense FFN by torch and by our kernel, a loop over experts and the sparse block.

    They take turns. Half of the experts is at most 2x over a dense FFN at the same rate, so what
    the block gains is told over the faster of the two dense ones.
    """
    dtype = torch.float32
    xs = inputs((FFN.tokens, FFN.hidden_size), dtype)
    modules = block_providers(FFN, dtype)
    names = {
        "dense": "dense FFN, torch",
        "dense_ours": "dense FFN, our kernel",
        "expert_loop": "loop over experts",
        "sparse_unified": None,
    }

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
            speedup=min(seconds["dense"], seconds["dense_ours"]) / seconds[name],
        )
        for name, title in names.items()
    ]


def table(
    checks: list[Check], metrics: dict[str, dict[str, dict[str, float]]], bars: list[Bar]
) -> str:
    """Lays out checks, models and timings, a table each."""
    blocks = [[(check.what, check.result, "ok" if check.ok else "FAILED") for check in checks]]
    for task, models in metrics.items():
        blocks.append(
            [
                (f"{task}: {title}", words(found), f"velocity error {found['velocity']:.4f}")
                for title, found in models.items()
            ]
        )
    blocks.append(
        [
            (f"FFN, {bar.name}", f"{bar.milliseconds:.1f} ms", f"{bar.speedup:.2f}x best dense")
            for bar in bars
        ]
    )
    notes = f"pictures of scenes: the mean of {', '.join(scenes.COLUMNS)}\nFFN: {shape_text()}"
    return "\n\n".join([*map(format_table, blocks), notes])


def words(found: dict[str, float]) -> str:
    return (
        f"{100 * found['generation']:.0f} % of pictures, "
        f"{100 * found['understanding']:.0f} % of answers right"
    )


if __name__ == "__main__":
    sys.exit(main())

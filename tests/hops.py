# SPDX-License-Identifier: Apache-2.0
"""How many files and functions of the package its main paths pass through: `python tests/hops.py`.

A newcomer who follows a path reads that many. Counted on the trained model of the miniature, in a
second run, so that what is imported or remembered once does not count; nor do lambdas and
generator expressions.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

PACKAGE = Path(__file__).parent.parent / "sparse_unified"
LEFT_OUT = ("<genexpr>", "<lambda>")

Calls = Counter[tuple[str, str, int]]  # (file, function, line) -> how often it was called


def traced(run: Callable[[], object]) -> Calls:
    """Returns the calls of functions of the package while `run` runs."""
    calls: Calls = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        own = code.co_filename.startswith(str(PACKAGE)) and code.co_name not in LEFT_OUT
        if event == "call" and own:
            calls[code.co_filename, code.co_name, code.co_firstlineno] += 1

    previous = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(previous)
    return calls


def sizes(calls: Calls) -> tuple[int, int]:
    """Returns how many files and functions there are calls of."""
    return len({file for file, _, _ in calls}), len(calls)


def paths(folder: Path) -> dict[str, Calls]:
    """Returns the calls of each main path, by its name."""
    from sparse_unified.analysis import Task, built_in_samples, calibrate, save_scores, score
    from sparse_unified.bagel import BagelPipeline
    from sparse_unified.checkpoint import PruneWidthConfig, convert, prune
    from sparse_unified.mini import write_model

    dense, scores = write_model(folder / "dense"), folder / "scores.safetensors"
    pipeline = BagelPipeline.from_pretrained(dense)
    samples = built_in_samples(Task.GENERATION, 1)
    save_scores(
        scores, score("activation", pipeline, calibrate(pipeline, Task.GENERATION, samples))
    )
    width = PruneWidthConfig(component="gen", keep_ratio=0.5)
    runs: dict[str, Callable[[int], object]] = {
        "conversion": lambda i: convert(dense, folder / f"sparse{i}", num_experts=16, top_k=8),
        "sparse load": lambda _: BagelPipeline.from_pretrained(folder / "sparse0"),
        "calibration": lambda _: calibrate(pipeline, Task.GENERATION, samples),
        "prune with scores": lambda i: prune(dense, folder / f"pruned{i}", width, scores=scores),
    }
    found = {}
    for name, run in runs.items():
        run(0)
        found[name] = traced(lambda run=run: run(1))  # type: ignore[misc]

    def draw(num_timesteps: int) -> Calls:
        sparse = BagelPipeline.from_pretrained(folder / "sparse0")
        options: dict[str, Any] = {"seed": 0, "progress": False}
        sparse.generate("a cross", num_timesteps=2, **options)
        return traced(lambda: sparse.generate("a cross", num_timesteps=num_timesteps, **options))

    # What one more step calls more often is what a step calls.
    return found | {"denoising step": draw(4) - draw(3)}


def main() -> None:
    """Prints a table, and with --list what the functions are."""
    with TemporaryDirectory() as folder:
        found = paths(Path(folder))
    for name, calls in found.items():
        files, functions = sizes(calls)
        sys.stdout.write(f"{name:20}{files:4} files{functions:5} functions\n")
        if "--list" in sys.argv:
            for file, function, line in sorted(calls):
                path = Path(file).relative_to(PACKAGE)
                sys.stdout.write(f"    {path}:{line} {function}\n")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Writes measured numbers into the documents: docs/performance.md, and a block of the README.

Every number comes from a file of bench/results, which `sparse-unified bench --json` writes. A claim
without such a file is listed as not measured.

    python docs/render.py            # or: make docs
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_unified.bench.claims import GPU_CLAIMS
from sparse_unified.bench.training_step import BOUND, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
RESOURCES = ROOT / "docs" / "resources.json"
FULL_SCALE = RESULTS / "full_scale.json"
TRAINING_STEP = RESULTS / "training_step.json"
CHECKPOINTS = ROOT / "docs" / "checkpoints.md"
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- bench:cpu -->", "<!-- /bench:cpu -->"

# Measured beside the dense FFN, not alone.
WHOLE_FFNS = ("sparse_ffn", "pruned_ffn")

Results = Mapping[str, Mapping[str, Any]]

# Fields of "overhead" in a result: the most is promised, where ratios promise the least.
_SHARES = ("alone", "fused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A speed the project promises, and where its measurement would stand.

    Args:
        text: the promise.
        file: of bench/results.
        op, case, direction, dtype: of our record; "sparse_ffn" is the whole block.
        baseline: the ratio to look at; "alone" or "fused" for the share of the steps around the
            experts, measured that way.
        bound: the least the ratio may be; the most, for the overhead.
    """

    text: str
    file: str
    case: str
    op: str = "sparse_ffn"
    direction: str = "fwd"
    dtype: str = "float32"
    baseline: str = "dense"
    bound: float

    def measured(self, results: Results) -> float | None:
        """Returns the measured ratio, or None where there is none."""
        content = results.get(self.file)
        if content is None:
            return None
        if self.baseline in _SHARES:
            share: float | None = content.get("overhead", {}).get(self.case, {}).get(self.baseline)
            return share
        for record in content["records"]:
            names = ("op", "case", "direction", "dtype", "provider")
            wanted = (self.op, self.case, self.direction, self.dtype, "sparse_unified")
            if tuple(record[name] for name in names) == wanted:
                ratio: float | None = record["speedup"].get(self.baseline)
                return ratio
        return None

    def row(self, results: Results) -> str:
        """Returns the line of the table of claims."""
        value = self.measured(results)
        if value is None:
            return f"| {self.text} | not measured | |"
        if self.baseline in _SHARES:
            found, held = f"{value:.1%}", value <= self.bound
        else:
            found, held = f"{value:.2f}x", value >= self.bound
        where = f"[{self.file}](../bench/results/{self.file})"
        return f"| {self.text} | {found}, {'held' if held else 'NOT HELD'} | {where} |"


_CPU_16, _CPU_32 = "quarter-16to8-T1024", "quarter-32to16-T1024"
CLAIMS = (
    Claim(
        text="CPU, fp32, 16/8, T = 1024: at least 1.85x the dense FFN",
        file="cpu.json",
        case=_CPU_16,
        bound=1.85,
    ),
    Claim(
        text="the same, beside a dense FFN of half the width: at least 0.93x (within 8 %)",
        file="cpu.json",
        case=_CPU_16,
        baseline="dense_half",
        bound=1 / 1.08,
    ),
    Claim(
        text="CPU, fp32, 32/16, T = 1024: at least 1.7x the dense FFN",
        file="cpu.json",
        case=_CPU_32,
        bound=1.7,
    ),
    Claim(
        text="CPU, fp32, 16/8, T = 1024, forward and backward, all trainable: at least 1.7x the "
        "dense FFN",
        file="cpu.json",
        case=_CPU_16,
        direction="fwd_bwd",
        bound=1.7,
    ),
    Claim(
        text="CPU, 16/8: routing, sorting, permuting, combining: under 5 % of the block, as ops of "
        "their own",
        file="cpu.json",
        case=_CPU_16,
        baseline="alone",
        bound=0.05,
    ),
    Claim(
        text="the same, as the fused block does them: under 5 %",
        file="cpu.json",
        case=_CPU_16,
        baseline="fused",
        bound=0.05,
    ),
    *(
        Claim(
            text=f"CPU, fp32, half of the width in blocks of {block_size}, T = 1024: "
            "at least 1.85x the dense FFN",
            file="cpu.json",
            op="pruned_ffn",
            case=f"quarter-half-bs{block_size}-T1024",
            bound=1.85,
        )
        for block_size in (16, 32, 64, 128)
    ),
)


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Returns the content of every file of speeds by name."""
    contents = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: content for name, content in contents.items() if "roof" in content}


def checkpoints(text: str) -> str:
    """Returns docs/checkpoints.md with the measurement at full scale filled in."""
    content = json.loads(FULL_SCALE.read_text())
    gigabytes, whole = content["bytes"] / 1e9, content["bytes_at_28_layers"] / 1e9
    part = gigabytes < 0.999 * whole
    lines = [
        f"Measured on {content['num_layers']} decoder layers, {gigabytes:.1f} GB"
        + (f"; the time of all 28, {whole:.1f} GB, is extrapolated by bytes." if part else "."),
        "Memory is the peak of the process, Python and torch included.",
        "",
        "| operation | s |"
        + (" s at 28 layers, extrapolated |" if part else "")
        + " peak memory, GB |",
        "|---|" + "---:|" * (3 if part else 2),
        *(
            f"| {record['operation']} | {record['seconds']:.0f} |"
            + (f" {record['seconds_at_28_layers']:.0f} |" if part else "")
            + f" {record['peak_bytes'] / 1e9:.2f} |"
            for record in content["operations"]
        ),
        "",
        f"{describe(content)}; niceness {content['nice']}, on a machine busy with other "
        "work, so the times are upper bounds; "
        "[bench/results/full_scale.json](../bench/results/full_scale.json).",
    ]
    begin, end = "<!-- full-scale -->", "<!-- /full-scale -->"
    head, tail = text.partition(begin)[0], text.partition(end)[2]
    return "\n".join([head + begin, *lines, end]) + tail


def describe(content: Mapping[str, Any]) -> str:
    """Names device, versions, date and commit of a result file in one line."""
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    return f"{content['device']}; {versions}; {content['date']}, commit {content['commit'][:10]}"


def _milliseconds(microseconds: float) -> str:
    """Writes a time with as many digits as it is worth."""
    return f"{microseconds / 1e3:.1f}" if microseconds >= 1e4 else f"{microseconds / 1e3:.3f}"


def missing_rows(content: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each provider that was not measured, with the reason."""
    reasons: dict[tuple[str, str], None] = {}
    for missing in content.get("not_measured", ()):
        reasons[missing["provider"], missing["reason"]] = None
    if reasons:
        yield ""
        yield "Not measured:"
        yield ""
        yield from (f"- {provider}: {reason}" for provider, reason in reasons)


def block_rows(content: Mapping[str, Any]) -> Iterator[str]:
    """Yields a table of whole FFNs: a line per case, direction, dtype and provider."""
    yield "| case | pass | dtype | provider | ms | x dense | % of roof |"
    yield "|---|---|---|---|---:|---:|---:|"
    for record in content["records"]:
        if record["op"] in WHOLE_FFNS:
            ratio = record["speedup"].get("dense")
            yield (
                f"| {record['case']} | {record['direction']} | {record['dtype']} "
                f"| {record['provider']}{' (graph)' if record.get('graph') else ''} "
                f"| {_milliseconds(record['median_us'])} "
                f"| {f'{ratio:.2f}' if ratio else '1'} | {100 * record['roof_fraction']:.0f} |"
            )


def op_rows(content: Mapping[str, Any]) -> Iterator[str]:
    """Yields a table of our ops alone: a line per op, case and direction."""
    yield "| op | case | pass | dtype | us | GB/s | x torch reference |"
    yield "|---|---|---|---|---:|---:|---:|"
    for record in content["records"]:
        if record["op"] not in WHOLE_FFNS and record["provider"] == "sparse_unified":
            ratio = record["speedup"].get("torch")
            yield (
                f"| {record['op']} | {record['case']} | {record['direction']} "
                f"| {record['dtype']} | {record['median_us']:,.0f} | {record['gbps']:.1f} "
                f"| {f'{ratio:.1f}' if ratio else ''} |"
            )


def resource_rows(path: Path = RESOURCES) -> Iterator[str]:
    """The table of docs/resources.json: kernels by architecture."""
    content = json.loads(path.read_text())
    yield "## What a kernel takes of a multiprocessor"
    yield ""
    yield (
        "Written by `make resources`: registers and spills by the compiler, instructions as its PTX"
    )
    yield (
        "has them, threads and shared memory of the launches for bagel-16to8-T4096 in bf16, blocks"
    )
    yield f"that fit at a time by all of these. Nothing here was measured. nvcc {content['nvcc']}."
    yield ""
    yield "| kernel | arch | threads | registers | spilled | shared KB | blocks | instructions |"
    yield "|---|---|---:|---:|---:|---:|---:|---|"
    for record in content["records"]:
        instructions = ", ".join(f"{n} {name}" for name, n in record["instructions"].items())
        yield (
            f"| {record['kernel']} | {record['architecture']} | {record['threads']} "
            f"| {record['registers']} | {record['spilled_bytes']} "
            f"| {record['shared_bytes'] / 1024:.1f} | {record['blocks']} | {instructions} |"
        )


def step_claims(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields a line of the table of claims for each size and number of threads."""
    where = f"[{TRAINING_STEP.name}](../bench/results/{TRAINING_STEP.name})"
    for key in dict.fromkeys((r["hidden_size"], r["threads"]) for r in records):
        shares = [r["outside"] for r in records if (r["hidden_size"], r["threads"]) == key]
        held = sum(share <= BOUND for share in shares)
        verdict = "held" if held == len(shares) else f"NOT HELD by {len(shares) - held}"
        yield (
            f"| CPU, a training step of the miniature, hidden size {key[0]}, {key[1]} of torch's "
            f"threads: under {BOUND:.0%} outside of torch and our kernels | {min(shares):.1%} to "
            f"{max(shares):.1%} of {len(shares)} cases, {verdict} | {where} |"
        )


def step_rows() -> Iterator[str]:
    """The table of bench/results/training_step.json: where the time of a training step goes."""
    content = json.loads(TRAINING_STEP.read_text())
    records = content["records"]
    yield "## A training step of the miniature"
    yield ""
    error = max(_phase_error(record) for record in records)
    yield "Written by `python -m sparse_unified.bench.training_step`: py-spy stops a training now"
    yield "and then and reads the stack, native frames included. Of the frames of torch, of our"
    yield "compiled library and of our Python the innermost says whose a moment is; outside is our"
    yield "Python, with what it asks of the interpreter and of the standard library. Batches are as"
    yield "large as those of the shipped training (dense) and of the study (sparse), and as there"
    yield "another process prepares them meanwhile: a step counts from receiving its batch to the"
    yield "line of the log. A share of 5% is known to about 0.7% of the step from 1,000 samples, to"
    yield "0.5% from 2,000. Shares of phases (receiving, forward, backward, optimizer) differ from"
    yield f"what clocks around them say by at most {error:.1%} of a step. Instructions are those of"
    yield "the interpreter, outside of torch, in a step; a test keeps them down."
    yield ""
    yield f"{describe(content)}; on an idle machine."
    yield ""
    yield from table(records)


def _phase_error(record: Mapping[str, Any]) -> float:
    clocked = record["clocked"]
    return max(abs(share - clocked[phase]) for phase, share in record["sampled"].items())


def performance(results: Results) -> str:
    """Returns docs/performance.md."""
    lines = [
        "# Performance",
        "",
        "Generated by `make docs` from the files of bench/results; do not edit. Each was",
        "written by `sparse-unified bench --json FILE`, or on a GPU by `bench/gpu_check.py`:",
        "providers interleaved in one process, two rounds of warm-up, medians, rotating random",
        "inputs; on a GPU, CUDA events around a call that finds something else in the L2 cache. A",
        "ratio is the median of the ratios within a round, above 1 when a provider takes less time",
        "than the dense FFN. The roof is what the same run reached with large matrix products and",
        "with a large copy.",
        "",
        "## Claims",
        "",
        "| claim | measured | where |",
        "|---|---|---|",
        *(claim.row(results) for claim in (*CLAIMS, *GPU_CLAIMS)),
        *step_claims(json.loads(TRAINING_STEP.read_text())["records"]),
    ]
    for name, content in results.items():
        roof = content["roof"]
        lines += [
            "",
            f"## {name}",
            "",
            f"{describe(content)}. Roof: {1e3 * roof['tflops']:.0f} GFLOP/s, "
            f"{roof['gbps']:.1f} GB/s.",
            "",
            *block_rows(content),
            *missing_rows(content),
            "",
            "Each op alone:",
            "",
            *op_rows(content),
        ]
    return "\n".join([*lines, "", *step_rows(), "", *resource_rows()]) + "\n"


def readme_block(results: Results) -> str:
    """Returns what stands between the markers of the README."""
    content = results.get("cpu.json")
    if content is None:
        return "Not measured yet."
    records = {
        (record["case"], record["provider"]): record
        for record in content["records"]
        if record["op"] == "sparse_ffn" and record["direction"] == "fwd"
    }
    lines = [
        "| FFN, fp32, forward | dense | loop over experts | sparse_unified |",
        "|---|---:|---:|---:|",
    ]
    for case in dict.fromkeys(case for case, _ in records):
        cells = [f"| {case} "]
        for provider in ("dense", "expert_loop", "sparse_unified"):
            record = records[case, provider]
            ratio = record["speedup"].get("dense")
            extra = f" ({ratio:.2f}x)" if ratio else ""
            cells.append(f"| {record['median_us'] / 1e3:.0f} ms{extra} ")
        lines.append("".join(cells) + "|")
    source = "[bench/results/cpu.json](bench/results/cpu.json)"
    return "\n".join([*lines, "", f"{describe(content)}; {source}."])


def readme(text: str, results: Results) -> str:
    """Returns the README with the block filled in.

    Raises:
        ValueError: a marker is missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README.name}: text must hold {BEGIN} and {END}, got neither or one")
    return f"{head}{BEGIN}\n{readme_block(results)}\n{END}{tail}"


def main() -> None:
    results = read_results()
    PERFORMANCE.write_text(performance(results))
    CHECKPOINTS.write_text(checkpoints(CHECKPOINTS.read_text()))
    README.write_text(readme(README.read_text(), results))


if __name__ == "__main__":
    main()

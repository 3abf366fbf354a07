# SPDX-License-Identifier: Apache-2.0
"""Writes measured numbers into the documents: docs/performance.md and blocks of two others.

Every number comes from a file of bench/results, which `sparse-unified bench --json` writes, or from
experiments/full_scale.json and official_image.json. What was not measured is not written.

    python docs/render.py            # or: make docs
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparse_unified.bench.measure import MOST_SPREAD
from sparse_unified.bench.report import best_dense, ceiling, is_steady

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
RESOURCES = ROOT / "docs" / "resources.json"
FULL_SCALE = ROOT / "experiments" / "full_scale.json"
IMAGE = ROOT / "experiments" / "official_image.json"
CHECKPOINTS = ROOT / "docs" / "checkpoints.md"
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"

OURS = "sparse_unified"
# Measured beside the dense FFN, not alone.
WHOLE_FFNS = ("sparse_ffn", "pruned_ffn")
ARCHITECTURES = ("sm_80", "sm_90a")

Content = Mapping[str, Any]
Results = Mapping[str, Content]


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Returns the content of every file of speeds by name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def describe(content: Content) -> str:
    """Names device, versions, date and commit of a result file in one line."""
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    return f"{content['device']}; {versions}; {content['date']}, commit {content['commit'][:10]}"


def table(head: list[str], rows: Iterator[list[str]]) -> list[str]:
    """Lays out Markdown; columns are numbers where the head ends in a space."""
    rule = "|".join("---:" if name.endswith(" ") else "---" for name in head)
    lines = [[name.strip() for name in head], *rows]
    written = [f"| {' | '.join(cells)} |" for cells in lines]
    return [written[0], f"|{rule}|", *written[1:]]


def milliseconds(microseconds: float) -> str:
    """Writes a time with as many digits as were measured."""
    return f"{microseconds / 1e3:.1f}" if microseconds >= 1e4 else f"{microseconds / 1e3:.3f}"


def our_rows(content: Content) -> Iterator[list[str]]:
    """Our FFNs beside the dense ones: the numbers to quote."""
    for r in content["records"]:
        best = best_dense(r["speedup"])
        if r["op"] in WHOLE_FFNS and r["provider"] == OURS and best is not None:
            yield [
                r["case"],
                r["direction"],
                r["dtype"],
                milliseconds(r["median_us"]) + ("" if is_steady(r) else "!"),
                f"{r['speedup']['dense']:.2f}",
                f"{r['speedup'][best]:.2f} ({best})",
                f"{ceiling(r):g}",
            ]


def provider_rows(content: Content, has_roof: bool) -> Iterator[list[str]]:
    """Every provider of a whole FFN."""
    for r in content["records"]:
        if r["op"] in WHOLE_FFNS:
            cells = [r["case"], r["direction"], r["dtype"]]
            cells += [r["provider"] + (" (graph)" if r.get("graph") else "")]
            cells += [milliseconds(r["median_us"]) + ("" if is_steady(r) else "!")]
            cells += [f"{r['speedup'].get('dense', 1):.2f}", f"{ceiling(r):g}"]
            yield cells + ([f"{100 * r['roof_fraction']:.0f}"] if has_roof else [])


def op_rows(content: Content) -> Iterator[list[str]]:
    """Our ops alone."""
    for r in content["records"]:
        if r["op"] not in WHOLE_FFNS and r["provider"] == OURS:
            ratio = r["speedup"].get("torch")
            cells = [r["op"], r["case"], r["direction"], r["dtype"], f"{r['median_us']:,.0f}"]
            yield [*cells, f"{r['gbps']:.1f}", f"{ratio:.1f}" if ratio else ""]


def result_section(name: str, content: Content) -> list[str]:
    """All tables of one file of bench/results."""
    roof = content["roof"]
    source = roof.get("source", "")
    reasons = {(m["provider"], m["reason"]): None for m in content.get("not_measured", ())}
    whole = ["case", "pass", "dtype"]
    lines = ["", f"## {name}", "", f"{describe(content)}. Memory: {roof['gbps']:.1f} GB/s."]
    if source:
        lines += [f"Peak: {1e3 * roof['tflops']:.0f} GFLOP/s, {source}."]
    if not all(map(is_steady, content["records"])):
        lines += [
            f"Rounds of a time with ! spread more than {MOST_SPREAD:.0%}, or by an unknown share."
        ]
    picture = (RESULTS / name).with_suffix(".svg")
    if picture.exists():
        lines += ["", f"![Ratios, rates and shares of the peak](../bench/results/{picture.name})"]
    ours = [*whole, "ms ", "x dense of torch ", "x best dense ", "ceiling "]
    lines += ["", *table(ours, our_rows(content))]
    head = [*whole, "provider", "ms ", "x dense of torch ", "ceiling "]
    head += ["% of peak "] if source else []
    lines += ["", "### All providers", "", *table(head, provider_rows(content, bool(source)))]
    if reasons:
        lines += ["", "Not measured:", "", *(f"- {who}: {why}" for who, why in reasons)]
    head = ["op", *whole, "us ", "GB/s ", "x torch reference "]
    return [*lines, "", "### Ops alone", "", *table(head, op_rows(content))]


def resource_section() -> list[str]:
    """Kernels by architecture, from docs/resources.json."""
    content = json.loads(RESOURCES.read_text())

    def rows() -> Iterator[list[str]]:
        for r in content["records"]:
            if r["architecture"] in ARCHITECTURES:
                yield [
                    *(str(r[key]) for key in ("kernel", "architecture", "threads", "registers")),
                    str(r["spilled_bytes"]),
                    f"{r['shared_bytes'] / 1024:.1f}",
                    str(r["blocks"]),
                    ", ".join(f"{n} {name}" for name, n in r["instructions"].items()),
                ]

    head = ["kernel", "arch", "threads ", "registers ", "spilled ", "shared KB ", "blocks "]
    return [
        "",
        "## Registers, shared memory and occupancy of the CUDA kernels",
        "",
        "Compiler output for the launches of bagel-16to8-T4096 in bf16 (`make resources`), not a",
        "measurement; blocks are those that fit on an SM at a time. The 128 x 128 tile is that of",
        "the down-projection of 32to16, 592 neurons an expert. Other architectures are in",
        f"[resources.json](resources.json). nvcc {content['nvcc']}.",
        "",
        "Counted, not measured on a GPU: the forward of a sparse block without gradients is 28",
        "Python frames, 6 launches and 13 calls of torch's dispatcher, 3 ops and 10 allocations",
        "(56 before). At 4 us an op, 1.1 us an allocation and 13 us for all of Python, as measured",
        "on the CPU, and 2.2 us assumed for a launch, that is 49 us of the host; at 4 us a launch,",
        "60 us. An allocation on CUDA may take longer than on the CPU.",
        "",
        *table([*head, "instructions"], rows()),
    ]


def image_section(content: Content) -> list[str]:
    """An image by the official code and by ours, and where the time of each goes."""
    seconds = {r["run"]: r["seconds"] for r in content["runs"]}

    def rows() -> Iterator[list[str]]:
        for r in content["runs"]:
            own = seconds[f"official {r['run'].split()[1].rstrip(',')}"]
            yield [
                r["run"],
                f"{r['seconds']:.2f}" + ("" if r["spread"] <= MOST_SPREAD else "!"),
                f"{seconds['official dense'] / r['seconds']:.2f}",
                f"{own / r['seconds']:.2f}",
                f"{r['distance']:.0e}",
            ]

    def shares() -> Iterator[list[str]]:
        for r in content["profile"]:
            yield [r["run"], *(f"{100 * share:.0f}" for share in r["shares"].values())]

    def least() -> Iterator[list[str]]:
        dense = seconds["official dense"]
        for kind, roof in content["roof"].items():
            own = seconds[f"official {kind}"]
            yield [kind, f"{roof:.2f}", f"{dense / roof:.2f}", f"{own / roof:.2f}"]

    head = ["run", "s ", "x official dense ", "x official of its kind ", "distance "]
    parts = [f"{part} " for part in content["profile"][0]["shares"]]
    return [
        "",
        "## A whole image",
        "",
        "By `experiments/official_image.py`: hidden size 512, 6 layers (sparse: 4 of them with 16",
        f"experts, 8 active), 1024 latent tokens, {content['steps']} steps with guidance; fp32",
        "where no other dtype is named, a step cache of interval",
        f"{content['cache_interval']}. Distance is that to the official latent, over its norm.",
        "",
        f"{describe(content)}.",
        "",
        *table(head, rows()),
        "",
        "What FFNs, projections and attention take at the peak of the processor, a roof for all",
        "code in fp32 that leaves no product out:",
        "",
        *table([f"{name} at the peak" if name == "run" else name for name in head[:4]], least()),
        "",
        "Share of the time, %:",
        "",
        *table(["run", *parts], shares()),
    ]


def performance(results: Results) -> str:
    """Returns docs/performance.md."""
    lines = [
        "# Performance",
        "",
        "Generated by `make docs` from the files of bench/results; do not edit. Each was written",
        "by `sparse-unified bench --json FILE`, or on a GPU by `bench/gpu_check.py`: providers",
        "take turns in one process, two rounds of warm-up, medians, rotating random inputs; on a",
        "GPU, timed with CUDA events, the L2 cache flushed before every call. A ratio is the",
        "median of the ratios within a round, above 1 when a provider takes less time.",
        "",
        "Leaving half of the arithmetic out is at most 2x over a dense FFN *at the same rate*: the",
        "ceiling. A ratio above it says that the dense FFN runs at a lower rate: torch's products",
        "on AMD processors are MKL's, which takes its AVX2 path there. So `dense_onednn` and",
        "`dense_ours`, the dense FFN by oneDNN and by our own kernel, stand beside it where a file",
        "has them, and the ratio to quote is the one over the best dense FFN.",
    ]
    for name, content in results.items():
        lines += result_section(name, content)
    if IMAGE.exists():
        lines += image_section(json.loads(IMAGE.read_text()))
    return "\n".join([*lines, *resource_section()]) + "\n"


def readme_block(results: Results) -> str:
    """Returns what stands between the markers of the README."""
    content = results.get("cpu.json")
    if content is None:
        return "Not measured yet."
    records = {
        (r["case"], r["provider"]): r
        for r in content["records"]
        if r["op"] == "sparse_ffn" and r["direction"] == "fwd"
    }
    shown = [
        name
        for name in ("dense", "dense_onednn", "dense_ours", "expert_loop", OURS)
        if any(provider == name for _, provider in records)
    ]

    def rows() -> Iterator[list[str]]:
        for case in dict.fromkeys(case for case, _ in records if case.endswith("-T1024")):
            ours = records[case, OURS]
            best = best_dense(ours["speedup"])
            if best is None or not is_steady(ours) or not is_steady(records[case, best]):
                continue
            times = [f"{records[case, name]['median_us'] / 1e3:.0f} ms" for name in shown]
            yield [case, *times, f"{ours['speedup'][best]:.2f}x ({best})"]

    lines = [*rows()]
    if not lines:
        return (
            "The rounds of the [last measurement](bench/results/cpu.json) do not agree to 15 %,\n"
            "or do not say how far they do, so no table of it is quoted here."
        )
    titles = {"dense": "dense (torch)", "expert_loop": "loop over experts"}
    head = ["FFN, fp32, forward", *(f"{titles.get(name, name)} " for name in shown)]
    return "\n".join(
        [
            *table([*head, "over the best dense FFN, at most 2x "], iter(lines)),
            "",
            f"{describe(content)}; [bench/results/cpu.json](bench/results/cpu.json).",
        ]
    )


def checkpoints_block() -> str:
    """The measurement at full scale."""
    content = json.loads(FULL_SCALE.read_text())
    gigabytes, whole = content["bytes"] / 1e9, content["bytes_at_28_layers"] / 1e9
    part = gigabytes < 0.999 * whole

    def rows() -> Iterator[list[str]]:
        for r in content["operations"]:
            cells = [r["operation"], f"{r['seconds']:.0f}"]
            cells += [f"{r['seconds_at_28_layers']:.0f}"] if part else []
            yield [*cells, f"{r['peak_bytes'] / 1e9:.2f}"]

    head = ["operation", "s ", *(["s at 28 layers, extrapolated "] if part else [])]
    return "\n".join(
        [
            f"Measured on {content['num_layers']} decoder layers, {gigabytes:.1f} GB"
            + (f"; the time of all 28, {whole:.1f} GB, is extrapolated by bytes." if part else "."),
            "Memory is the peak of the process, Python and torch included.",
            "",
            *table([*head, "peak memory, GB "], rows()),
            "",
            f"{describe(content)}; niceness {content['nice']}, on a machine busy with other "
            "work, so the times are upper bounds; "
            "[experiments/full_scale.json](../experiments/full_scale.json).",
        ]
    )


def filled(text: str, marker: str, block: str) -> str:
    """Returns a document with what stands between two markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    head, begin, rest = text.partition(f"<!-- {marker} -->")
    _, end, tail = rest.partition(f"<!-- /{marker} -->")
    if not begin or not end:
        raise ValueError(f"render: text must hold {marker} twice as a comment, got one or none")
    return f"{head}{begin}\n{block}\n{end}{tail}"


def readme(text: str, results: Results) -> str:
    """Returns the README with the block filled in."""
    return filled(text, "bench:cpu", readme_block(results))


def checkpoints(text: str) -> str:
    """Returns docs/checkpoints.md with the measurement at full scale filled in."""
    return filled(text, "full-scale", checkpoints_block())


def main() -> None:
    results = read_results()
    PERFORMANCE.write_text(performance(results))
    CHECKPOINTS.write_text(checkpoints(CHECKPOINTS.read_text()))
    README.write_text(readme(README.read_text(), results))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Proof that a checkpoint is its dense one, reordered or pruned: from the weights, not the sidecar.

Which layers and heads are gone is what the recipe says and the keys confirm; which neurons are gone
is found out from the bytes.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import numpy as np

# ? import ByteCounter
from sparse_unified._common import Progress, Report, format_table
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.convert.compare import (
    ByteCounter,
    compare_configs,
    compare_files,
    compare_specs,
    compare_tensors,
)
from sparse_unified.convert.equivalence import compare_outputs
from sparse_unified.convert.matching import find_bijection
from sparse_unified.convert.verify_pruned import (
    PrunedVerdict,
    find_changes,
    judge_change,
    pruned_table,
)
from sparse_unified.experts import ExpertLayout

WHAT = "verify"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerVerdict:
    """What was found out about one sparse layer.

    Attributes:
        bijection: the neurons of the experts are the dense neurons, bit for bit, each once.
        max_error: largest difference to the dense FFN in fp64, with top_k = E and routers at zero;
            None when there is no bijection to run, or it is not finite.
        tolerance: the most it may be: twice the dense FFN's own error, and 1e-5.
        routers: "zero", or "set": by a conversion that was asked to, or by training.
        problems: what is wrong, naming expert and neuron; empty when all is well.
    """

    component: str
    layer: int
    ok: bool
    bijection: bool
    max_error: float | None
    tolerance: float | None
    routers: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport(Report):
    """The verdict on a checkpoint, layer by layer and over all other tensors.

    Attributes:
        layers: sparse FFNs.
        pruned: parts that have become smaller or are skipped.
    """

    sparse: str
    against: str
    ok: bool
    layers: tuple[LayerVerdict, ...]
    pruned: tuple[PrunedVerdict, ...]
    tensors_compared: int
    problems: tuple[str, ...]
    seconds: float

    def to_text(self) -> str:
        rows: list[tuple[object, ...]] = [
            ("layer", "bijection", "max error", "tolerance", "routers", "verdict")
        ]
        for verdict in self.layers:
            error, tolerance = (
                "-" if value is None else f"{value:.2e}"
                for value in (verdict.max_error, verdict.tolerance)
            )
            rows.append(
                (
                    f"{verdict.component} {verdict.layer}",
                    "bit-exact" if verdict.bijection else "NO",
                    error,
                    tolerance,
                    verdict.routers,
                    "ok" if verdict.ok else "FAILED",
                )
            )
        lines = [format_table(rows, header=True), ""] if self.layers else []
        if self.pruned:
            lines += [pruned_table(self.pruned), ""]
        for part in self.pruned:
            lines += [
                f"{part.component} layer {part.layer} {part.part}, {p}" for p in part.problems
            ]
        for verdict in self.layers:
            lines += [f"{verdict.component} layer {verdict.layer}, {p}" for p in verdict.problems]
        lines += self.problems
        lines.append(f"{self.tensors_compared} other tensors compared byte by byte")
        what = "a part" if self.pruned else "a reordering"
        lines.append(
            f"{self.sparse} {'is' if self.ok else 'IS NOT'} {what} of {self.against} "
            f"({self.seconds:.1f} s)"
        )
        return "\n".join(lines)


def verify(
    sparse: str | os.PathLike[str],
    against: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerifyReport:
    """Checks a sparse or pruned checkpoint against the dense one it should come from.

    For each sparse layer: the neurons of the experts are a bijection of the dense ones, bit for
    bit, and with top_k = E and routers at zero the block computes what the dense FFN computes. Of
    a pruned layer, the neurons and heads that are left are dense ones bit for bit, each once, and
    those that are gone are listed. Every other tensor, `ae.safetensors`, `vit_config.json`,
    `config.json`, the tokenizer and the other fields of `llm_config.json` are the same, and neither
    directory has one of these files alone. The sidecar is not consulted.

    Args:
        sparse, against: the two model directories.
        seed: of the random tokens of the numeric check.
        progress: called with (bytes checked, bytes in all).

    Returns:
        a report; `ok` is False when anything differs.

    Raises:
        ValueError: a directory cannot be read as a checkpoint, or there is nothing to compare.
    """
    start = time.perf_counter()
    left, right = Checkpoint(sparse), Checkpoint(against)
    moe = left.moe
    pairs = [
        (component, layer)
        for component, layers in (moe.layers if moe is not None else {}).items()
        for layer in layers
        if (ffn := right.ffns.get(component, {}).get(layer)) is not None and ffn.sparse is None
    ]
    changes = find_changes(left, right)
    if not pairs and not changes:
        raise ValueError(
            f"{WHAT}: {sparse} must have sparse layers that are dense in {against}, or pruned "
            f"ones, got {'none that are dense there' if moe is not None else 'a dense checkpoint'}"
        )
    prefixes = (
        *(keys.ffn_prefix(component, layer) for component, layer in pairs),
        *(prefix for change in changes for prefix in change.prefixes()),
    )
    kept, wanted = (
        {key: spec for key, spec in side.specs.items() if not key.startswith(prefixes)}
        for side in (left, right)
    )
    counter = ByteCounter(sum(spec.nbytes for spec in right.specs.values()), progress)

    verdicts = []
    pruned = []
    indices: dict[tuple[str, int], np.ndarray | None] = {}
    for component, layer in pairs:
        assert moe is not None
        layout = moe.expert_layout(component, layer)
        verdict, indices[component, layer] = _judge(left, right, component, layer, layout, seed)
        verdicts.append(verdict)
        for name in keys.PROJECTIONS:
            counter.advance(right.spec(keys.dense_key(component, layer, name)).nbytes)
    for change in changes:
        verdict_of_part = judge_change(left, right, change, indices)
        pruned.append(verdict_of_part)
        counter.advance(
            change.nbytes(right) if (change.component, change.layer) not in pairs else 0
        )
    problems = [
        *compare_specs(kept, wanted),
        *compare_tensors(kept, wanted, counter),
        *compare_files(left, right),
        *compare_configs(left, right),
    ]
    return VerifyReport(
        sparse=str(sparse),
        against=str(against),
        ok=not problems and all(v.ok for v in verdicts) and all(v.ok for v in pruned),
        layers=tuple(verdicts),
        pruned=tuple(pruned),
        tensors_compared=len(kept.keys() & wanted.keys()),
        problems=tuple(problems),
        seconds=time.perf_counter() - start,
    )


def _judge(
    sparse: Checkpoint,
    dense: Checkpoint,
    component: str,
    layer: int,
    layout: ExpertLayout,
    seed: int,
) -> tuple[LayerVerdict, np.ndarray | None]:
    ffns = sparse.ffns[component][layer], dense.ffns[component][layer]
    narrower = sparse.held is not None and ffns[0].intermediate_size < ffns[1].intermediate_size
    sizes = [(0 if narrower else f.intermediate_size, f.hidden_size, f.dtype) for f in ffns]
    routers = [
        sparse.read(keys.router_key(component, layer, name))
        for name in keys.router_names(component)
    ]
    index, problems = None, []
    error = tolerance = None
    if sizes[0] != sizes[1]:
        problems = [f"width, hidden size and dtype must be {sizes[1]}, got {sizes[0]}"]
    else:
        index, problems = find_bijection(sparse, dense, component, layer, layout)
    if not all(bool(router.float().isfinite().all()) for router in routers):
        problems.append("routers must be finite, got NaN or infinity")
    if index is not None:
        kept = np.sort(index) if narrower else None
        error, tolerance = compare_outputs(
            sparse, dense, component, layer, layout, seed=seed, kept=kept
        )
        if not error <= tolerance:
            problems.append(
                f"output with top_k = {layout.num_experts} must be within {tolerance:.2e} of the "
                f"dense FFN, got {error:.2e}"
            )
    verdict = LayerVerdict(
        component=component,
        layer=layer,
        ok=not problems,
        bijection=index is not None,
        max_error=error if error is None or math.isfinite(error) else None,
        tolerance=tolerance if tolerance is None or math.isfinite(tolerance) else None,
        routers="set" if any(bool(router.any()) for router in routers) else "zero",
        problems=tuple(problems),
    )
    return verdict, index

# SPDX-License-Identifier: Apache-2.0
"""What the keys of a file say about each FFN: dense or sparse, how many experts, how wide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.safetensors_io import TensorSpec


class SparseLayer(NamedTuple):
    """Sizes of one sparse FFN: number of experts, neurons of an expert, neurons of the shared."""

    num_experts: int
    expert_width: int
    shared_width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FFN:
    """One FFN of a file. `sparse` is None where it is dense."""

    intermediate_size: int
    hidden_size: int
    dtype: torch.dtype
    sparse: SparseLayer | None


FFNs = dict[str, dict[int, FFN]]


def scan_ffns(specs: Mapping[str, TensorSpec]) -> tuple[FFNs, list[str]]:
    """Finds every FFN of a file and checks its keys and shapes against each other.

    Returns:
        `{component: {layer: FFN}}` with ascending layers, holding the FFNs that are whole; and a
        sentence for each thing that is wrong.
    """
    parts: dict[tuple[str, int], dict[str, TensorSpec]] = {}
    for key, spec in specs.items():
        found = keys.find_ffn_key(key)
        if found is not None:
            component, layer, rest = found
            parts.setdefault((component, layer), {})[rest] = spec
    ffns: FFNs = {}
    problems: list[str] = []
    for component, layer in sorted(parts):
        where = keys.ffn_prefix(component, layer).removesuffix(".")
        errors = list(_check_names(where, component, parts[component, layer]))
        errors = errors or list(_check_shapes(where, parts[component, layer]))
        problems += errors
        if not errors:
            ffns.setdefault(component, {})[layer] = _describe(parts[component, layer])
    return ffns, problems


def list_some(values: Iterable[object], limit: int = 6) -> str:
    """Writes a list for a message: the first few, shortened, and how many more."""
    texts = [text if len(text) <= 160 else text[:157] + "..." for text in map(str, values)]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return (", ".join(texts[:limit]) or "none") + more


def _check_names(where: str, component: str, part: Mapping[str, TensorSpec]) -> Iterable[str]:
    dense = [rest for rest in part if keys.DENSE_KEY.fullmatch(rest)]
    patterns = (keys.EXPERT_KEY, keys.SHARED_KEY, keys.ROUTER_KEY)
    sparse = [rest for rest in part if any(pattern.fullmatch(rest) for pattern in patterns)]
    unknown = sorted(set(part) - set(dense) - set(sparse))
    if unknown:
        yield (
            f"{where}: keys must be {{gate,up,down}}_proj.weight of a dense FFN, or gate.weight, "
            "gate_shared.weight, experts.N.{gate,up,down}_proj.weight, "
            f"shared_expert.{{gate,up,down}}_proj.weight of a sparse one, got {list_some(unknown)}"
        )
        return
    if dense and sparse:
        yield (
            f"{where}: keys must be those of a dense or of a sparse FFN, "
            f"got both: {dense[0]} and {sparse[0]}"
        )
        return
    if dense:
        missing = [f"{name}.weight" for name in keys.PROJECTIONS if f"{name}.weight" not in part]
        if missing:
            yield (
                f"{where}: a dense FFN must hold gate_proj.weight, up_proj.weight and "
                f"down_proj.weight, got no {list_some(missing)}"
            )
        return
    yield from _check_sparse_names(where, component, part)


def _check_sparse_names(
    where: str, component: str, part: Mapping[str, TensorSpec]
) -> Iterable[str]:
    routers = {f"{name}.weight" for name in keys.router_names(component)}
    missing = sorted(routers - set(part))
    if missing:
        yield f"{where}: a sparse FFN must hold {', '.join(sorted(routers))}, got no " + list_some(
            missing
        )
    if component == "gen" and "gate_img.weight" in part:
        yield f"{where}: gate_img.weight must be in und blocks only, got it in a gen block"
    shared = [f"shared_expert.{name}.weight" for name in keys.PROJECTIONS]
    lost = [rest for rest in shared if rest not in part]
    if lost and len(lost) < len(shared):
        yield f"{where}: shared_expert must hold all three projections, got no {list_some(lost)}"

    # The router's rows count the experts; without a router, the highest expert does.
    present = {int(match[1]) for rest in part if (match := keys.EXPERT_KEY.fullmatch(rest))}
    gate = part.get("gate.weight")
    if gate is not None and len(gate.shape) == 2:
        count, source = max(gate.shape[0], 1), f"the {gate.shape[0]} rows of gate.weight say"
    else:
        count, source = max(present, default=0) + 1, "the highest expert says"
    extra = sorted(expert for expert in present if expert >= count)
    if extra:
        yield f"{where}: experts must be 0 to {count - 1} as {source}, got {list_some(extra)} too"
    # A count made up by a damaged router must not make a list of its length.
    absent = [
        expert for expert in range(min(count, max(present, default=0) + 7)) if expert not in present
    ]
    if absent:
        yield (
            f"{where}: experts must be 0 to {count - 1} as {source}, "
            f"got no expert {list_some(absent)}"
        )
    halves = [
        f"experts.{expert}.{name}.weight"
        for expert in sorted(present)
        for name in keys.PROJECTIONS
        if f"experts.{expert}.{name}.weight" not in part
    ]
    if halves:
        yield f"{where}: an expert must hold all three projections, got no {list_some(halves)}"


def _check_shapes(where: str, part: Mapping[str, TensorSpec]) -> Iterable[str]:
    flat = [f"{rest} {list(spec.shape)}" for rest, spec in part.items() if len(spec.shape) != 2]
    if flat:
        yield f"{where}: weights must have 2 dimensions, got {list_some(flat)}"
        return
    dtypes = {spec.dtype for spec in part.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        found = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        yield f"{where}: weights must share one floating dtype, got {list_some(found)}"

    # Hidden size D and one width for each of: the dense FFN, the shared expert, the experts.
    first = next(iter(part))
    axis = 0 if "down_proj" in first else 1
    hidden = part[first].shape[axis]
    if hidden < 1:
        shape = list(part[first].shape)
        yield f"{where}: hidden_size must be at least 1, got shape {shape} of {first}"
    widths: dict[str, dict[int, list[str]]] = {}
    for rest, spec in part.items():
        axis = 0 if "down_proj" in rest else 1
        if spec.shape[axis] != hidden:
            yield (
                f"{where}: {rest} must have {hidden} (hidden_size) as dimension {axis}, "
                f"got shape {list(spec.shape)}"
            )
        if (match := keys.ROUTER_KEY.fullmatch(rest)) is None:
            group = (
                "expert"
                if rest.startswith("experts.")
                else rest.rpartition("_proj")[0].rpartition(".")[0]
            )
            widths.setdefault(group, {}).setdefault(spec.shape[1 - axis], []).append(rest)
        elif (
            rows := 1 if match[1] == "gate_shared" else part["gate.weight"].shape[0]
        ) != spec.shape[0]:
            yield f"{where}: {rest} must have {rows} rows, got shape {list(spec.shape)}"
    for group, by_width in widths.items():
        if len(by_width) > 1:
            odd = [f"{width} in {list_some(names, 2)}" for width, names in sorted(by_width.items())]
            yield f"{where}: {group or 'dense'} widths must agree, got {list_some(odd)}"
        if min(by_width) < 1:
            yield f"{where}: {group or 'dense'} widths must be at least 1, got 0"


def _describe(part: Mapping[str, TensorSpec]) -> FFN:
    if "gate_proj.weight" in part:
        gate_proj = part["gate_proj.weight"]
        width, hidden = gate_proj.shape
        return FFN(intermediate_size=width, hidden_size=hidden, dtype=gate_proj.dtype, sparse=None)
    gate = part["gate.weight"]
    shared = part.get("shared_expert.gate_proj.weight")
    layer = SparseLayer(
        num_experts=gate.shape[0],
        expert_width=part["experts.0.gate_proj.weight"].shape[0],
        shared_width=shared.shape[0] if shared is not None else 0,
    )
    return FFN(
        intermediate_size=layer.num_experts * layer.expert_width + layer.shared_width,
        hidden_size=gate.shape[1],
        dtype=gate.dtype,
        sparse=layer,
    )

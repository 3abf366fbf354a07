# SPDX-License-Identifier: Apache-2.0
"""Proof that a checkpoint is its dense one, reordered or pruned: from the weights, not the sidecar.

Which layers and heads are gone is what the recipe says and the keys confirm. Which neurons are gone
is found out from the bytes: each (gate row, up row, down column) is hashed on both sides, and
neurons of the same hash are paired. Every other tensor must be the one of the dense checkpoint, or
what a cut leaves of it, byte for byte.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified._common import (
    Progress,
    Report,
    StrPath,
    context,
    format_layers,
    format_table,
    list_some,
)
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.model_dir import CONFIG, VAE_FILE, Checkpoint, ffn_parts
from sparse_unified.checkpoint.modes import RECIPE
from sparse_unified.checkpoint.rewrite import gather, row_blocks
from sparse_unified.checkpoint.safetensors_io import TensorSpec, read_words
from sparse_unified.nn import SparseMoE
from sparse_unified.surgery.cuts import Cut, spread

_SHOWN = 40  # characters of a list of removed units in a table
_MAX_NAMED = 3  # neurons, of a layer
_AT_ONCE = 512  # neurons
_NUM_TOKENS = 16

_MOE_FIELDS = {"num_experts", "num_shared_experts", "top_k", "num_experts_per_tok"}
_MOE_FIELDS |= set(keys.TRANSFORMED.values())
# Files besides the weights that decide what the model answers; those of the tokenizer go by the
# names that transformers gives the files of a Qwen2 tokenizer.
_MODEL_FILES = (
    VAE_FILE,
    "vit_config.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerVerdict:
    """What was found out about one sparse layer.

    Attributes:
        bijection: the neurons of the experts are the dense neurons, bit for bit, each once.
        max_error: largest difference to the dense FFN in fp64, with top_k = E and routers at zero;
            None when there is no bijection to run, or the dense FFN itself is not finite.
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
class PrunedVerdict:
    """What was found out about one part that got smaller.

    Attributes:
        part: "ffn", "query heads" (in groups) or "key heads".
        kept, total: neurons, groups or heads.
        removed: which are gone, by their place in the checkpoint that is compared with.
        problems: what is wrong; empty when all that is left is there bit for bit.
    """

    component: str
    layer: int
    part: str
    kept: int
    total: int
    removed: tuple[int, ...]
    ok: bool
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

    def headings(self) -> Sequence[str]:
        return ("layer", "bijection", "max error", "tolerance", "routers", "verdict")

    def table(self) -> Sequence[Sequence[object]]:
        return [
            (
                f"{own.component} {own.layer}",
                "bit-exact" if own.bijection else "NO",
                *("-" if v is None else f"{v:.2e}" for v in (own.max_error, own.tolerance)),
                own.routers,
                "ok" if own.ok else "FAILED",
            )
            for own in self.layers
        ]

    def notes(self) -> Sequence[str]:
        rows: list[Sequence[object]] = [("layer", "part", "left", "of", "removed", "verdict")]
        problems = []
        for part in self.pruned:
            removed = format_layers(part.removed) if part.kept else "all"
            if len(removed) > _SHOWN:
                removed = removed[:_SHOWN].rpartition(",")[0] + ", ..."
            at, verdict = f"{part.component} {part.layer}", "ok" if part.ok else "FAILED"
            rows.append((at, part.part, part.kept, part.total, removed, verdict))
            at = f"{part.component} layer {part.layer} {part.part}"
            problems += [f"{at}, {problem}" for problem in part.problems]
        for own in self.layers:
            at = f"{own.component} layer {own.layer}"
            problems += [f"{at}, {problem}" for problem in own.problems]
        table = [*format_table(rows, header=True).splitlines(), ""] if self.pruned else []
        is_one = "is" if self.ok else "IS NOT"
        what = "a part" if self.pruned else "a reordering"
        return [
            *table,
            *problems,
            *self.problems,
            f"{self.tensors_compared} other tensors compared byte by byte",
            f"{self.sparse} {is_one} {what} of {self.against} ({self.seconds:.1f} s)",
        ]


@context("verify")
def verify(
    sparse: StrPath, against: StrPath, *, seed: int = 0, progress: Progress | None = None
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

    Raises:
        ValueError: a directory cannot be read as a checkpoint, or there is nothing to compare.
        RuntimeError: a file changed while it was read.

    Example:
        >>> verify("BAGEL-MoE", "BAGEL-7B-MoT").ok  # doctest: +SKIP
        True
    """
    start = time.perf_counter()
    here, there = Checkpoint(sparse), Checkpoint(against)
    experts = [
        (component, layer)
        for component, layers in here.experts.items()
        for layer in layers
        if (ffn := there.ffns.get(component, {}).get(layer)) is not None and ffn.layout is None
    ]
    own, rest = dict(here.specs), dict(there.specs)
    left = total = sum(spec.nbytes for spec in rest.values())

    def take(prefixes: tuple[str, ...]) -> None:
        """Takes what was compared out of the rest, on both sides."""
        nonlocal left
        for key in [key for key in own if key.startswith(prefixes)]:
            if key in rest or keys.find_ffn_key(key) is not None:
                del own[key]
        for key in [key for key in rest if key.startswith(prefixes)]:
            left -= rest.pop(key).nbytes
        if progress is not None:
            progress(total - left, total)

    verdicts: list[LayerVerdict] = []
    pruned: list[PrunedVerdict] = []
    indices: dict[tuple[str, int], np.ndarray | None] = {}
    for at in experts:
        verdict, indices[at] = _judge_experts(here, there, *at, seed=seed)
        verdicts.append(verdict)
        take((keys.ffn_prefix(*at),))
    for part, prefixes in _judge_parts(here, there, indices):
        pruned.append(part)
        take(prefixes)
    if not verdicts and not pruned:
        raise ValueError(
            f"{sparse} must have sparse layers that are dense in {against}, or pruned "
            f"ones, got {'none that are dense there' if here.experts else 'a dense checkpoint'}"
        )
    extra = sorted(own.keys() - rest.keys())
    problems = [f"keys: must be those of {against}, got {list_some(extra)} too"] if extra else []
    for key, spec in rest.items():
        problems += _differences(key, own.get(key), spec)
        left -= spec.nbytes
        if progress is not None:
            progress(total - left, total)
    problems += _compare_files(here, there)
    here.refuse_change()
    there.refuse_change()
    return VerifyReport(
        sparse=str(sparse),
        against=str(against),
        ok=not problems and all(v.ok for v in verdicts) and all(v.ok for v in pruned),
        layers=tuple(verdicts),
        pruned=tuple(pruned),
        tensors_compared=len(own.keys() & rest.keys()),
        problems=tuple(problems),
        seconds=time.perf_counter() - start,
    )


# Tensors and files


def _differences(
    name: str, got: TensorSpec | None, spec: TensorSpec, cut: Cut | None = None
) -> list[str]:
    """Returns a sentence if `got` is not `spec`, or what a cut leaves of it, byte for byte."""
    shape = spec.shape
    if cut is not None:
        shape = (*shape[: cut.dim], len(cut.keep), *shape[cut.dim + 1 :])
    if got is None or (got.dtype, got.shape) != (spec.dtype, shape):
        found = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
        return [f"{name}: must be {spec.dtype} {list(shape)}, got {found}"]
    flat, whole, start = _as_bytes(got), _as_bytes(spec), 0
    blocks: Iterable[np.ndarray] = (read_words(whole.rows(*rows)) for rows in row_blocks(whole))
    if cut is not None:
        blocks = gather([spec], cut.dim, [cut.keep.numpy()])
    for block in blocks:
        wanted = block.reshape(-1).view(np.uint8)
        found_bytes = read_words(flat.rows(start, start + len(wanted)))
        if (wrong := np.flatnonzero(found_bytes != wanted)).size:
            element = (start + int(wrong[0])) // spec.dtype.itemsize
            return [f"{name}: must be equal, got another value at element {element}"]
        start += len(wanted)
    return []


def _as_bytes(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype=torch.uint8, shape=(spec.nbytes,))


def _whole_file(path: Path) -> TensorSpec:
    size = path.stat().st_size
    return TensorSpec(dtype=torch.uint8, shape=(size,), file=path, start=0)


def _compare_files(here: Checkpoint, there: Checkpoint) -> list[str]:
    """Returns a sentence for each other file of the model, or field of its config, that differs."""
    problems = []
    for name in _MODEL_FILES:
        a, b = here.directory / name, there.directory / name
        if a.exists() and b.exists():
            problems += _differences(name, _whole_file(a), _whole_file(b))
        elif a.exists() or b.exists():
            states = ("there", "nothing") if b.exists() else ("absent", "one")
            problems.append(
                f"{name}: file must be {states[0]} as in {there.directory}, got {states[1]}"
            )
    for field in sorted((here.llm_config.keys() | there.llm_config.keys()) - _MOE_FIELDS):
        got, wanted = (side.llm_config.get(field, "nothing") for side in (here, there))
        if got != wanted:
            problems.append(f"{CONFIG}: {field} must be {wanted!r:.120}, got {got!r:.120}")
    return problems


# Neurons


def _pair_neurons(
    here: Checkpoint, there: Checkpoint, component: str, layer: int
) -> tuple[np.ndarray | None, list[str]]:
    """Pairs every neuron of an FFN with one of the other side that has the same bytes: returns
    those neurons [I] int64, in the order of the ones here, or None; and what is wrong."""
    own, other = (_digests(side, component, layer) for side in (here, there))
    free: dict[bytes, list[int]] = {}
    for neuron in reversed(range(len(other))):  # pop() gives equal neurons out in order
        free.setdefault(other[neuron], []).append(neuron)
    index = np.array([free[key].pop() if free.get(key) else -1 for key in own])
    wrong = np.flatnonzero(index < 0).tolist()
    if not wrong:
        return index, []
    owners = _owners(here, component, layer)
    named = list_some((f"{owners[n][0]}neuron {owners[n][1]}" for n in wrong), _MAX_NAMED)
    return None, [
        f"{len(index)} neurons must each be a neuron of {there.directory} of its own, got "
        f"{len(wrong)} others: {named}"
    ]


def _owners(side: Checkpoint, component: str, layer: int) -> list[tuple[str, int]]:
    """Returns the part of the FFN that holds each neuron, and its number there."""
    parts = ffn_parts(side.ffns[component][layer].ffn).items()
    return [(part, number) for part, (start, stop) in parts for number in range(stop - start)]


def _digests(side: Checkpoint, component: str, layer: int) -> list[bytes]:
    """Returns the hash of each neuron: of its rows, and of its column of down_proj."""
    hashes = []
    for part in ffn_parts(side.ffns[component][layer].ffn):
        own: list[Any] = []
        for name in keys.PROJECTIONS:
            words = read_words(side.spec(f"{keys.ffn_prefix(component, layer)}{part}{name}.weight"))
            own = own or [blake2b(digest_size=32) for _ in words]
            for start in range(0, len(own), _AT_ONCE):
                some = slice(start, start + _AT_ONCE)
                rows = (
                    np.ascontiguousarray(words[:, some].T) if name == "down_proj" else words[some]
                )
                for digest, row in zip(own[some], np.ascontiguousarray(rows), strict=True):
                    digest.update(row)
        hashes += own
    return [digest.digest() for digest in hashes]


def _judge_experts(
    here: Checkpoint, there: Checkpoint, component: str, layer: int, *, seed: int
) -> tuple[LayerVerdict, np.ndarray | None]:
    """Judges a layer that is sparse here and dense there; returns its neuron_index as well."""
    index: np.ndarray | None = None
    error = tolerance = math.nan
    sizes = [
        (ffn.hidden_size, ffn.dtype, ffn.width if here.left is None else "any")
        for ffn in (side.ffns[component][layer] for side in (here, there))
    ]
    problems = [f"hidden size, dtype and width must be {sizes[1]}, got {sizes[0]}"]
    if sizes[0] == sizes[1]:
        index, problems = _pair_neurons(here, there, component, layer)
    names = keys.router_names(component, here.experts[component][layer].time_router)
    routers = [here.read(keys.ffn_key(component, layer, name)) for name in names]
    if not all(bool(router.float().isfinite().all()) for router in routers):
        problems.append("routers must be finite, got NaN or infinity")
    if index is not None:
        error, tolerance = _output_error(here, there, component, layer, np.sort(index), seed)
        # Where the dense FFN itself gives NaN or infinity, its bytes alone tell.
        if math.isfinite(tolerance) and not error <= tolerance:
            problems.append(
                f"output with all experts active must be within {tolerance:.2e} of the dense FFN, "
                f"got {error:.2e}"
            )
    verdict = LayerVerdict(
        component=component,
        layer=layer,
        ok=not problems,
        bijection=index is not None,
        max_error=error if math.isfinite(error) else None,
        tolerance=tolerance if math.isfinite(tolerance) else None,
        routers="set" if any(bool(router.any()) for router in routers) else "zero",
        problems=tuple(problems),
    )
    return verdict, index


def _output_error(
    here: Checkpoint, there: Checkpoint, component: str, layer: int, kept: np.ndarray, seed: int
) -> tuple[float, float]:
    """Runs both FFNs of one layer on the same random tokens, in fp32 whatever the files hold: half
    precision rounds each expert's output, which could hide a mistake or look like one.

    Returns max|sparse - ref| and the most it may be, 2 * max|dense - ref| + 1e-5 * max|ref|, where
    ref is the dense FFN in fp64, of the neurons `kept` that the experts are made of, ascending.
    """
    layout, prefix = here.experts[component][layer], keys.ffn_prefix(component, layer)
    hidden_size = here.ffns[component][layer].hidden_size
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    x = torch.randn(_NUM_TOKENS, hidden_size, generator=generator)
    block = SparseMoE(
        hidden_size,
        layout.intermediate_size,
        layout.num_experts,
        layout.num_experts,
        shared_intermediate_size=layout.shared_width,
        return_router_logits=False,
        device="meta",
        dtype=x.dtype,
    ).to_empty(device="cpu")
    with torch.no_grad():
        for key, view in block.official_views().items():
            if keys.ROUTER_KEY.fullmatch(key):
                view.zero_()
            else:
                view.copy_(here.read(prefix + key))
        y = block(x)
        del block
        gate_proj, up_proj, down_proj = (
            there.read(keys.ffn_key(component, layer, name)) for name in keys.PROJECTIONS
        )

        def dense(x: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for index in torch.from_numpy(kept).split(_AT_ONCE):
                gate, up = gate_proj[index].to(x.dtype), up_proj[index].to(x.dtype)
                out += (F.silu(x @ gate.T) * (x @ up.T)) @ down_proj[:, index].to(x.dtype).T
            return out

        ref, y_dense = dense(x.double()), dense(x)
    error, own_error = ((out.double() - ref).abs().max().item() for out in (y, y_dense))
    return error, 2 * own_error + 1e-5 * ref.abs().max().item()


# Pruned parts


def _judge_parts(
    here: Checkpoint, there: Checkpoint, indices: Mapping[tuple[str, int], np.ndarray | None]
) -> Iterator[tuple[PrunedVerdict, tuple[str, ...]]]:
    """Judges each part of which `here` has less than `there`, in the order of layers; yields the
    starts of its keys too. `indices` are those of the layers with experts compared already."""
    for component, layers in here.shapes.items() if here.left is not None else ():
        inside, ffn = keys.attention_modules(component), keys.ffn_modules(component)
        _, q_proj, k_proj, v_proj, o_proj = inside[:5]
        for layer, own in layers.items():
            old = there.shapes[component].get(layer)
            if old is None:
                continue
            # What is kept, what there was, and the modules that have it.
            parts: dict[str, tuple[Sequence[int], Sequence[int], tuple[str, ...]]] = {
                "ffn": (range(own.width), range(old.width), ffn[1:] if own.width else ffn),
                "query heads": (own.query_groups, old.query_groups, (q_proj, o_proj)),
                "key heads": (own.kv_heads, old.kv_heads, (k_proj, v_proj)),
            }
            if not own.has_attention:
                del parts["key heads"]
                parts["query heads"] = ((), old.query_groups, inside)
            for part, (kept, total, modules) in parts.items():
                starts = keys.module_prefixes(layer, modules)
                held = {key: spec for key, spec in there.specs.items() if key.startswith(starts)}
                if not set(kept) < set(total) or not held:
                    continue
                problems: list[str] = []
                removed = [place for place, unit in enumerate(total) if unit not in kept]
                if not kept:
                    over = [key for key in here.specs if key.startswith(starts)][:1]
                    rule = f"must not be there, as {RECIPE} says it is skipped"
                    problems = [f"{key}: {rule}" for key in over]
                elif part == "ffn":
                    at = (component, layer)
                    known = at in indices
                    index, problems = (indices[at], []) if known else _pair_left(here, there, *at)
                    removed = [] if index is None else sorted(set(total) - set(index.tolist()))
                else:
                    places = torch.tensor([total.index(unit) for unit in kept])
                    for key, spec in held.items():
                        dim = 1 if ".o_proj" in key else 0
                        cut = Cut(dim, spread(places, spec.shape[dim] // len(total)))
                        problems += _differences(key, here.specs.get(key), spec, cut)
                verdict = PrunedVerdict(
                    component=component,
                    layer=layer,
                    part=part,
                    kept=len(kept),
                    total=len(total),
                    removed=tuple(removed),
                    ok=not problems,
                    problems=tuple(problems),
                )
                yield verdict, starts


def _pair_left(
    here: Checkpoint, there: Checkpoint, component: str, layer: int
) -> tuple[np.ndarray | None, list[str]]:
    """Pairs the neurons of an FFN that is dense on both sides or sparse on both."""
    own, old = (side.ffns[component][layer].layout for side in (here, there))
    if (own is None) != (old is None):
        return None, ["FFN must be sparse as there, got a dense one"]
    index, problems = _pair_neurons(here, there, component, layer)
    if index is None or own is None or old is None:
        return index, problems
    holders, origins = (_owners(side, component, layer) for side in (here, there))
    moved = [n for n, origin in enumerate(index) if holders[n][0] != origins[origin][0]]
    if moved:
        problems.append(f"{len(moved)} neurons must stay in their expert, got others")
    for name in keys.router_names(component, old.time_router):
        key = keys.ffn_key(component, layer, name)
        problems += _differences(key, here.specs.get(key), there.spec(key))
    return index, problems

# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints compared: bytes that must be equal, neurons that may be reordered, outputs.

Neurons are paired from the bytes alone. Those of each (gate row, up row, down column) are hashed on
both sides, neurons with the same hashes are paired, and every pair is then compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified._common import Progress, list_some
from sparse_unified.checkpoint import keys
from sparse_unified.checkpoint.files import CHUNK_BYTES, Stamp, open_source
from sparse_unified.checkpoint.model_dir import VAE_FILE, Checkpoint
from sparse_unified.checkpoint.rewrite import row_blocks
from sparse_unified.checkpoint.safetensors_io import (
    TensorSpec,
    read_bytes,
    read_words,
)
from sparse_unified.checkpoint.shapes import CONFIG, ffn_parts
from sparse_unified.experts import ExpertLayout
from sparse_unified.nn import SparseMoE, SwiGLU

_COLUMNS = 512
_MAX_PROBLEMS = 3
_NUM_TOKENS = 16
_BLOCK_NEURONS = 512

# One list per projection, one digest per neuron.
Digests = tuple[list[bytes], ...]

_MOE_FIELDS = {"num_experts", "num_shared_experts", "top_k", "num_experts_per_tok"}
_MOE_FIELDS |= set(keys.TRANSFORMED.values())
# Files besides the weights that decide what the model answers; those of the tokenizer go by the
# names that transformers gives the files of a Qwen2 tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_MODEL_FILES = (VAE_FILE, "vit_config.json", "config.json", *_TOKENIZER_FILES)


class ByteCounter:
    """Counts compared bytes and tells a progress callback (done, total)."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done = 0
        self.total = total
        self._progress = progress

    def advance(self, nbytes: int) -> None:
        """Adds bytes that were compared."""
        self.done += nbytes
        if self._progress is not None:
            self._progress(self.done, self.total)


def compare_specs(got: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Yields a sentence for missing and extra keys and for each other dtype or shape."""
    missing, extra = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    if missing:
        yield f"keys: all tensors beside the FFNs must be there, got no {list_some(missing)}"
    if extra:
        yield f"keys: tensors must be those of the dense checkpoint, got {list_some(extra)} too"
    for key in sorted(wanted.keys() & got.keys()):
        a, b = got[key], wanted[key]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{key}: must be {b.dtype} {list(b.shape)}, got {a.dtype} {list(a.shape)}"


def compare_tensors(
    got: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], counter: ByteCounter
) -> Iterator[str]:
    """Yields a sentence for each tensor of the same dtype and shape whose bytes differ."""
    for key in sorted(wanted.keys() & got.keys()):
        a, b = got[key], wanted[key]
        if a.nbytes != b.nbytes:
            continue
        sides = (a.file, a.stamp, a.start), (b.file, b.stamp, b.start)
        first = _first_difference(*sides, a.nbytes)
        if first is not None:
            element = first // a.dtype.itemsize
            yield f"{key}: must be equal, got another value at element {element}"
        counter.advance(a.nbytes)


def compare_files(got: Checkpoint, wanted: Checkpoint) -> Iterator[str]:
    """Yields a sentence for each model file beside the weights that differs or only one has."""
    for name in _MODEL_FILES:
        a, b = got.directory / name, wanted.directory / name
        if not (a.exists() and b.exists()):
            if b.exists():
                yield f"{name}: file must be there as in {wanted.directory}, got nothing"
            elif a.exists():
                yield f"{name}: file must be absent as in {wanted.directory}, got one"
            continue
        sizes = a.stat().st_size, b.stat().st_size
        if sizes[0] != sizes[1]:
            yield f"{name}: file must have {sizes[1]} bytes, got {sizes[0]}"
        elif (first := _first_difference((a, None, 0), (b, None, 0), sizes[0])) is not None:
            yield f"{name}: file must be equal, got another value at byte {first}"


def compare_configs(got: Checkpoint, wanted: Checkpoint) -> Iterator[str]:
    """Yields a sentence for each field of llm_config.json that differs beside those of the MoE."""
    a, b = got.llm_config, wanted.llm_config
    for field in sorted((a.keys() | b.keys()) - _MOE_FIELDS):
        left, right = a.get(field, "nothing"), b.get(field, "nothing")
        if left != right:
            yield f"{CONFIG}: {field} must be {right!r:.120}, got {left!r:.120}"


_Place = tuple[Path, Stamp | None, int]  # a file, what it was when it was opened, the first byte


def _first_difference(a: _Place, b: _Place, nbytes: int) -> int | None:
    with open_source(*a[:2]) as left, open_source(*b[:2]) as right:
        buffers = [np.empty(min(nbytes, CHUNK_BYTES), dtype=np.uint8) for _ in range(2)]
        for start in range(0, nbytes, CHUNK_BYTES):
            x, y = (buffer[: min(CHUNK_BYTES, nbytes - start)] for buffer in buffers)
            read_bytes(left, a[2] + start, x)
            read_bytes(right, b[2] + start, y)
            if x.data != y.data:
                return start + int(np.flatnonzero(x != y)[0])
    return None


def find_bijection(
    sparse: Checkpoint,
    dense: Checkpoint,
    component: str,
    layer: int,
    layout: ExpertLayout | None,
    *,
    dense_layout: ExpertLayout | None = None,
) -> tuple[np.ndarray | None, list[str]]:
    """Pairs every neuron of a layer with a dense neuron of its own that has the same bytes.

    Args:
        layout: of the experts; None where the layer is dense, as one that was made narrower.
        dense_layout: the same of the other side, whose neurons are then counted in expert order.

    Returns:
        neuron_index [I] int64 (None when there is no such pairing), and a sentence for the first
        few neurons that differ, which names expert and neuron.
    """
    here, there = (
        tuple(_part_digests(side, component, layer, name, own) for name in keys.PROJECTIONS)
        for side, own in ((sparse, layout), (dense, dense_layout))
    )
    index, problems = _pair(there, here, layout)
    if index is None:
        return None, problems
    problems = list(_compare(sparse, dense, component, layer, (layout, dense_layout), index))
    return (None, problems) if problems else (index, [])


def _parts(
    sparse: Checkpoint, component: str, layer: int, projection: str, layout: ExpertLayout | None
) -> list[tuple[TensorSpec, int, int]]:
    """Returns (tensor, first neuron, end) of each tensor that a projection is made of."""
    prefix = keys.ffn_prefix(component, layer)
    ffn = layout or sparse.ffns[component][layer].intermediate_size
    return [
        (sparse.spec(f"{prefix}{part}{projection}.weight"), start, stop)
        for part, (start, stop) in ffn_parts(ffn).items()
    ]


def _part_digests(
    sparse: Checkpoint, component: str, layer: int, projection: str, layout: ExpertLayout | None
) -> list[bytes]:
    digests: list[bytes] = []
    for spec, _, _ in _parts(sparse, component, layer, projection, layout):
        digests += _digests(read_words(spec), projection)
    return digests


def _digests(words: np.ndarray, projection: str) -> Iterator[bytes]:
    """Yields the hash of each neuron: of each row, or of each column of down_proj."""
    if projection != "down_proj":
        yield from (blake2b(row.data, digest_size=16).digest() for row in words)
        return
    for start in range(0, words.shape[1], _COLUMNS):
        columns = np.ascontiguousarray(words[:, start : start + _COLUMNS].T)
        yield from (blake2b(column.data, digest_size=16).digest() for column in columns)


def _pair(
    dense: Digests, sparse: Digests, layout: ExpertLayout | None
) -> tuple[np.ndarray | None, list[str]]:
    free: dict[tuple[bytes, ...], list[int]] = {}
    for neuron, key in enumerate(zip(*dense, strict=True)):
        free.setdefault(key, []).append(neuron)
    for neurons in free.values():
        neurons.reverse()  # so that pop() gives equal neurons out in dense order

    index = np.full(len(sparse[0]), -1, dtype=np.int64)
    holders: dict[tuple[bytes, ...], str] = {}
    problems: list[str] = []
    num_wrong = 0
    for position, key in enumerate(zip(*sparse, strict=True)):
        name = _name(layout, position)
        if free.get(key):
            index[position] = free[key].pop()
            holders[key] = name
            continue
        num_wrong += 1
        if len(problems) < _MAX_PROBLEMS:
            reason = (
                f"its dense neuron is held by {holders[key]} already"
                if key in holders
                else _explain(dense, key)
            )
            problems.append(f"{name}: must be a dense neuron of its own, but {reason}")
    if not num_wrong:
        return index, []
    unused = [neuron for neurons in free.values() for neuron in neurons]
    problems.append(
        f"{num_wrong} of {len(index)} neurons differ; dense neuron {min(unused)} is the first of "
        f"{len(unused)} that no expert holds"
    )
    return None, problems


def _explain(dense: Digests, key: tuple[bytes, ...]) -> str:
    """Says which dense neuron each projection of an unmatched neuron comes from, if any."""
    parts = []
    for name, digests, digest in zip(keys.PROJECTIONS, dense, key, strict=True):
        origin = f"of dense neuron {digests.index(digest)}" if digest in digests else "unknown"
        parts.append(f"{name} is {origin}")
    return ", ".join(parts)


def _name(layout: ExpertLayout | None, position: int) -> str:
    if layout is None:
        return f"neuron {position}"
    if position < layout.shared_width:
        return f"shared expert, neuron {position}"
    expert, neuron = divmod(position - layout.shared_width, layout.expert_width)
    return f"expert {expert}, neuron {neuron}"


def _compare(
    sparse: Checkpoint,
    dense: Checkpoint,
    component: str,
    layer: int,
    layouts: tuple[ExpertLayout | None, ExpertLayout | None],
    index: np.ndarray,
) -> Iterator[str]:
    """Yields a sentence for each pair of equal hashes whose bytes differ after all."""
    layout, dense_layout = layouts
    for projection in keys.PROJECTIONS:
        wanted = [spec for spec, _, _ in _parts(dense, component, layer, projection, dense_layout)]
        parts = _parts(sparse, component, layer, projection, layout)
        if projection == "down_proj":
            for top, bottom in row_blocks(parts[0][0]):
                rows = [read_words(spec.rows(top, bottom)) for spec in wanted]
                block = np.take(np.concatenate(rows, axis=1), index, axis=1)
                for part, start, stop in parts:
                    differs = (block[:, start:stop] != read_words(part.rows(top, bottom))).any(
                        axis=0
                    )
                    for neuron in np.flatnonzero(differs):
                        yield f"{_name(layout, start + int(neuron))}: {projection} must be equal"
            continue
        words = np.concatenate([read_words(spec) for spec in wanted])
        for part, start, stop in parts:
            differs = (words[index[start:stop]] != read_words(part)).any(axis=1)
            for neuron in np.flatnonzero(differs):
                yield f"{_name(layout, start + int(neuron))}: {projection} must be equal"


def compare_outputs(
    sparse: Checkpoint,
    dense: Checkpoint,
    component: str,
    layer: int,
    layout: ExpertLayout,
    *,
    seed: int,
    kept: np.ndarray | None = None,
) -> tuple[float, float]:
    """Runs both FFNs of one layer on the same random tokens, in fp32 whatever the files hold.

    Half precision rounds each expert's output, which could hide a mistake or look like one.

    Args:
        kept: the neurons of the dense FFN that the experts are made of; None for all.

    Returns:
        max|sparse - ref| and the most it may be, 2 * max|dense - ref| + 1e-5 * max|ref|, where ref
        is the dense FFN in fp64. One layer's weights are in memory at a time.
    """
    ffn = dense.ffns[component][layer]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    x = torch.randn(_NUM_TOKENS, ffn.hidden_size, generator=generator)
    with torch.no_grad():
        y = _run_sparse(sparse, component, layer, layout, x)
        y_dense, ref = _run_dense(dense, component, layer, x, kept)
    error = (y.double() - ref).abs().max().item()
    own_error = (y_dense.double() - ref).abs().max().item()
    return error, 2 * own_error + 1e-5 * ref.abs().max().item()


def _run_sparse(
    sparse: Checkpoint, component: str, layer: int, layout: ExpertLayout, x: Tensor
) -> Tensor:
    block = SparseMoE(
        x.shape[1],
        layout.intermediate_size,
        layout.num_experts,
        layout.num_experts,
        layout.num_shared_experts,
        shared_intermediate_size=layout.shared_width,
        return_router_logits=False,
        device="meta",
        dtype=x.dtype,
    ).to_empty(device="cpu")
    views = block.official_views()
    for view in (views["gate.weight"], views["gate_shared.weight"]):
        view.zero_()
    prefix = keys.ffn_prefix(component, layer)
    for part in ffn_parts(layout):
        for name in keys.PROJECTIONS:
            views[f"{part}{name}.weight"].copy_(sparse.read(f"{prefix}{part}{name}.weight"))
    y: Tensor = block(x)
    return y


def _run_dense(
    dense: Checkpoint, component: str, layer: int, x: Tensor, kept: np.ndarray | None
) -> tuple[Tensor, Tensor]:
    weights = [
        dense.read(keys.dense_key(component, layer, name)).to(x.dtype) for name in keys.PROJECTIONS
    ]
    if kept is not None:
        index = torch.from_numpy(kept)
        weights = [weights[0][index], weights[1][index], weights[2][:, index]]
    gate_proj, up_proj, down_proj = weights
    ffn = SwiGLU(x.shape[1], gate_proj.shape[0], device="meta", dtype=x.dtype)
    ffn.load_state_dict(
        {f"{name}.weight": w for name, w in zip(keys.PROJECTIONS, weights, strict=True)},
        assign=True,
    )
    y = ffn(x)
    wide = x.double()
    ref = torch.zeros_like(wide)
    for start in range(0, gate_proj.shape[0], _BLOCK_NEURONS):
        part = slice(start, start + _BLOCK_NEURONS)
        hidden = F.silu(wide @ gate_proj[part].double().T) * (wide @ up_proj[part].double().T)
        ref += hidden @ down_proj[:, part].double().T
    return y, ref

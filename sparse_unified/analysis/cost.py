# SPDX-License-Identifier: Apache-2.0
"""What a model costs: counted where counting is exact, measured where it is not.

Parameters and bytes are those of the tensors the model holds. FLOPs and the memory of activations
are counted over the operations of one real forward, so that what a transform claims to have removed
and still runs is seen. Time is the median of several forwards.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# A forward, set up for the model as it is now: contexts of another model would not fit.
Workload = Callable[[], Callable[[], object]]
Shape = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one forward of a model takes.

    Attributes:
        parameters: of the model, in all.
        weight_bytes: of its parameters and buffers.
        flops: multiplications and additions of the forward's matrix products, attention included.
        seconds: median of the forwards.
        peak_bytes: weights, and the most that the results of operations held at one time; what a
            kernel allocates inside is not seen.
    """

    parameters: int
    weight_bytes: int
    flops: int
    seconds: float
    peak_bytes: int


def measure_cost(
    model: nn.Module, workload: Workload, *, repeats: int = 5, warmup: int = 1
) -> Cost:
    """Measures a model at work.

    Args:
        model: its weights count, every tensor once.
        workload: sets the forward up.
        repeats: timed forwards.
        warmup: forwards before them.
    """
    weights = [*model.parameters(), *model.buffers()]
    device = weights[0].device if weights else torch.device("cpu")
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    with torch.no_grad():
        forward = workload()
        memory = ActivationMemory()
        with FlopCounterMode(display=False, custom_mapping=_formulas()) as flops, memory:
            forward()
        for _ in range(warmup):
            forward()
        seconds = [_timed(forward, device) for _ in range(repeats)]
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=weight_bytes,
        flops=flops.get_total_flops(),
        seconds=median(seconds),
        peak_bytes=weight_bytes + memory.peak,
    )


def _timed(forward: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    forward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class ActivationMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._bytes = 0
        self._live: dict[int, int] = {}  # storage -> bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {key for key, _ in _storages((args, kwargs))}
        for key, storage in _storages(out):
            if key not in given and key not in self._live:
                self._live[key] = storage.nbytes()
                self._bytes += storage.nbytes()
                self.peak = max(self.peak, self._bytes)
                weakref.finalize(storage, self._remove, key)
        return out

    def _remove(self, key: int) -> None:
        self._bytes -= self._live.pop(key)


def _storages(tree: object) -> list[tuple[int, torch.UntypedStorage]]:
    """Returns the storages of the tensors in nested containers, each with what identifies it."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [(t.untyped_storage()._cdata, t.untyped_storage()) for t in tensors]


def _formulas() -> dict[Any, Callable[..., int]]:
    """Returns the FLOPs, from shapes, of operations that torch's counter does not know."""

    def attention(query: Shape, key: Shape, *rest: Any, **options: Any) -> int:
        batch, heads, length, head_dim = query
        return 4 * batch * heads * length * key[-2] * head_dim

    def route(x: Shape, gate: Shape, *rest: Any, **options: Any) -> int:
        return 2 * x[0] * gate[0] * gate[1]

    def grouped(
        x: Shape, row_token: Shape, offsets: Shape, gate: Shape, *rest: Any, **options: Any
    ) -> int:
        return 6 * row_token[0] * (gate[0] // (offsets[0] - 1)) * gate[1]

    def grouped_combine(x: Shape, weights: Shape, *rest: Any, **options: Any) -> int:
        row_token, _, offsets, gate = rest[:4]
        return grouped(x, row_token, offsets, gate)

    def pruned(x: Shape, kept_blocks: Shape, *rest: Any, **options: Any) -> int:
        return 6 * x[0] * kept_blocks[0] * rest[3] * x[1]  # rest: three weights, the block size

    ours = torch.ops.sparse_unified
    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        ours.route_topk: route,
        ours.grouped_ffn: grouped,
        ours.grouped_ffn_combine: grouped_combine,
        ours.pruned_ffn: pruned,
    }

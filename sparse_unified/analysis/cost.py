# SPDX-License-Identifier: Apache-2.0
"""What a model costs: counted where counting is exact, measured where it is not.

Parameters and bytes are those of the tensors the model holds. FLOPs and the memory of activations
are counted over the operations of one real forward, so that what a transform claims to have removed
and still runs is seen. Time is the median of several forwards.
"""

from __future__ import annotations

import math
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


def measure_cost(model: nn.Module, workload: Workload, *, repeats: int = 5) -> Cost:
    """Measures a model at work.

    Args:
        model: its weights count, every tensor once.
        workload: sets the forward up.
        repeats: timed forwards, after two that are not.
    """
    weights = [*model.parameters(), *model.buffers()]
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    is_cuda = any(weight.is_cuda for weight in weights)
    seconds = []
    with torch.no_grad():
        forward = workload()
        memory = ActivationMemory()
        with FlopCounterMode(display=False, custom_mapping=_formulas()) as flops, memory:
            forward()
        forward()
        for _ in range(repeats):
            if is_cuda:
                torch.cuda.synchronize(weights[0].device)
            start = time.perf_counter()
            forward()
            if is_cuda:
                torch.cuda.synchronize(weights[0].device)
            seconds.append(time.perf_counter() - start)
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=weight_bytes,
        flops=flops.get_total_flops(),
        seconds=median(seconds),
        peak_bytes=weight_bytes + memory.peak,
    )


class ActivationMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}  # storage -> bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        for key, storage in _storages(out).items():
            if key not in given and key not in self._live:
                self._live[key] = storage.nbytes()
                self.peak = max(self.peak, sum(self._live.values()))
                weakref.finalize(storage, self._live.pop, key)
        return out


def _storages(tree: object) -> dict[int, torch.UntypedStorage]:
    """Returns the storages of the tensors in nested containers, by what identifies them."""
    storages = [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor)]
    return {storage._cdata: storage for storage in storages}


def _formulas() -> dict[Any, Callable[..., int]]:
    """Returns the FLOPs, from shapes, of operations that torch's counter does not know."""

    def grouped(
        x: Shape, row_token: Shape, offsets: Shape, gate_proj: Shape, *rest: Any, **_: Any
    ) -> int:
        return 6 * row_token[0] * math.prod(gate_proj) // (offsets[0] - 1)

    ours = torch.ops.sparse_unified
    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda query, key, *_, **__: 4 * math.prod(query) * key[-2]
        ),
        ours.route_topk: lambda x, gate, *_, **__: 2 * x[0] * math.prod(gate),
        ours.grouped_ffn: grouped,
        # x, weights, row_token, token_rows, expert_offsets, gate_proj, ...
        ours.grouped_ffn_combine: lambda *a, **_: grouped(a[0], a[2], a[4], a[5]),
        ours.pruned_ffn: lambda x, kept, gate, up, down, block_size, *_, **__: (
            6 * math.prod(x) * kept[0] * block_size
        ),
    }

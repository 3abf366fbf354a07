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
from dataclasses import asdict, dataclass
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

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return asdict(self)


def measure_cost(
    model: nn.Module, workload: Workload, *, repeats: int = 5, warmup: int = 1
) -> Cost:
    """Measures a model at work.

    Args:
        model: whose weights count; every tensor once.
        workload: sets the forward up.
        repeats: timed forwards; warmup: forwards before them.

    Raises:
        ValueError: repeats is below 1 or warmup below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(
            "measure_cost: repeats must be at least 1 and warmup at least 0, "
            f"got {repeats} and {warmup}"
        )
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
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in given | self._known:
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def storage_of(tensor: Tensor) -> int:
    """Identifies the storage of a tensor."""
    return tensor.untyped_storage()._cdata


def _formulas() -> dict[Any, Callable[..., int]]:
    """Returns the FLOPs, from shapes, of operations that torch's counter does not know."""
    ours = torch.ops.sparse_unified
    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        ours.route_topk: _route,
        ours.grouped_ffn: _grouped,
        ours.grouped_ffn_combine: _grouped_combine,
        ours.pruned_ffn: _pruned,
    }


def _attention(query: Shape, key: Shape, *rest: Any, **options: Any) -> int:
    batch, heads, length, head_dim = query
    return 4 * batch * heads * length * key[-2] * head_dim


def _route(x: Shape, gate: Shape, *rest: Any, **options: Any) -> int:
    return 2 * x[0] * gate[0] * gate[1]


def _grouped(
    x: Shape, row_token: Shape, offsets: Shape, gate_proj: Shape, *rest: Any, **options: Any
) -> int:
    expert_width = gate_proj[0] // (offsets[0] - 1)
    return 6 * row_token[0] * expert_width * gate_proj[1]


def _grouped_combine(
    x: Shape,
    weights: Shape,
    row_token: Shape,
    token_rows: Shape,
    offsets: Shape,
    gate_proj: Shape,
    *rest: Any,
    **options: Any,
) -> int:
    return _grouped(x, row_token, offsets, gate_proj)


def _pruned(
    x: Shape,
    kept_blocks: Shape,
    gate_proj: Shape,
    up_proj: Shape,
    down_proj: Shape,
    block_size: int,
    **options: Any,
) -> int:
    return 6 * x[0] * kept_blocks[0] * block_size * x[1]

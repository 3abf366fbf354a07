# SPDX-License-Identifier: Apache-2.0
"""Sharding over processes with FSDP2, and tensors of shards to and from whole ones.

FSDP2 reduces the gradients of a group of parameters together, so the same parameters must have one
in every process. What a process does not use in a pass (the ViT without a picture, a stream
without tokens) gets a gradient of zero here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def num_processes() -> int:
    """Returns the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def this_process() -> int:
    """Returns the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def shard_(root: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Shards the parameters of a module over all processes: each layer a group, the rest one more.

    Gradients are summed over the processes, in fp32.

    Args:
        root: returns (loss, ...) from its forward. layers: inside it; return their two streams.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(root.parameters()).device.type
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device, (num_processes(),)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    listed = list(layers)
    in_layers = {id(p) for layer in listed for p in layer.parameters()}
    names = [n for n, p in root.named_parameters() if p.requires_grad and id(p) not in in_layers]
    # Our hooks come before FSDP's own, which free the whole parameters.
    if names:
        root.register_forward_hook(_UseAll(names))
    for layer in listed:
        if any(p.requires_grad for p in layer.parameters()):
            layer.register_forward_hook(_use_all_of_layer)
        fully_shard(layer, **settings)
    fully_shard(root, **settings)
    for module in (root, *listed):
        sharded: Any = module
        sharded.set_gradient_divide_factor(1.0)
        # Not every backend can scale while it reduces.
        sharded.set_force_sum_reduction_for_comms(True)


def gather(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """Returns the whole tensor of which each process holds the part that its parameter has.

    Args:
        parameter: a parameter, sharded or not. shard: what belongs to the local part of it.
    """
    if not hasattr(parameter, "to_local"):
        return shard
    from torch.distributed.tensor import DTensor

    sharded: Any = parameter
    whole = DTensor.from_local(
        shard.to(sharded.device_mesh.device_type),
        sharded.device_mesh,
        sharded.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    full: Tensor = whole.full_tensor()
    return full


def local_rows(parameter: nn.Parameter) -> tuple[int, int] | None:
    """Returns the first row and the end of the rows that lie in this process; None is all."""
    if not hasattr(parameter, "to_local"):
        return None
    rows = parameter.shape[0]
    each = -(-rows // num_processes())
    start = min(this_process() * each, rows)
    return start, min(start + each, rows)


def _nothing_of(parameters: Iterable[Tensor]) -> Tensor:
    """Returns a zero that depends on every parameter."""
    return torch.stack([p.flatten()[:1].sum().float() * 0 for p in parameters]).sum()


def _use_all_of_layer(layer: nn.Module, _: Any, streams: Any) -> Any:
    nothing = _nothing_of(p for p in layer.parameters() if p.requires_grad)
    return tuple(None if x is None else x + nothing.to(x.dtype) for x in streams)


class _UseAll:
    """A forward hook of the root for the parameters that belong to no layer."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def __call__(self, root: nn.Module, _: Any, output: Any) -> Any:
        loss, *rest = output
        parameters = [root.get_parameter(name) for name in self._names]
        return (loss + _nothing_of(parameters), *rest)

# SPDX-License-Identifier: Apache-2.0
"""AdamW on float32 master weights, and FSDP2 where several processes train together.

A trained parameter in float32 on the optimizer's device is its own master weight. Any other has a
master weight there, takes its rounded value after every step, and hands over its gradient after
every backward pass, so that gradients are accumulated in float32. Of a sharded parameter each
process holds the state of its own shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_unified.adapt.config import TrainingConfig


def num_processes() -> int:
    """Returns the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def this_process() -> int:
    """Returns the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait_for_all() -> None:
    """Waits until every process is here."""
    if num_processes() > 1:
        dist.barrier()


def of_all_processes(value: Any) -> list[Any]:
    """Returns a plain value of each process, in every process."""
    values = [value] * num_processes()
    if num_processes() > 1:
        dist.all_gather_object(values, value)
    return values


def sum_over_processes(values: Tensor) -> Tensor:
    """Adds values up over all processes, in place, and returns them."""
    if num_processes() > 1:
        dist.all_reduce(values)
    return values


class Optimizer:
    """Master weights, gradients, moments and average of the parameters with `requires_grad`.

    Attributes:
        parameters: what is trained, by name.
        weights: master weights; of a sharded parameter, as everywhere below, the local part.
        gradients: accumulated, fp32.
        ema: average of the master weights, None where none is kept.
        state: what a run has to keep, `kind.parameter`: master, exp_avg, exp_avg_sq and ema.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("Trainer: model must have parameters with requires_grad, got none")
        for name, parameter in self.parameters.items():
            if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(
                    f"Trainer: {name} must be float32, bfloat16 or float16, got {parameter.dtype}"
                )
        self._config = config
        self.weights: dict[str, Tensor] = {}
        self._own: set[str] = set()  # parameters that are their own master weights
        for name, parameter in self.parameters.items():
            local = _local(parameter.detach())
            self.weights[name] = local.to(config.optimizer_device or local.device, torch.float32)
            if self.weights[name] is local:
                self._own.add(name)
        self.gradients = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        groups: dict[float, list[Tensor]] = {}
        for name, weight in self.weights.items():
            weight.grad = self.gradients[name]
            if weight.numel():  # a shard may be empty, which fused steps do not take
                decay = config.weight_decay if self.parameters[name].ndim > 1 else 0.0
                groups.setdefault(decay, []).append(weight)
        self._adamw = torch.optim.AdamW(
            [{"params": own, "weight_decay": decay} for decay, own in groups.items()],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self.state = {f"master.{name}": weight for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            moments: dict[str, Tensor] = self._adamw.state[weight]  # as AdamW would make them
            moments["step"] = torch.zeros((), device=weight.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                moments[moment] = self.state[f"{moment}.{name}"] = torch.zeros_like(weight)
        self.ema: dict[str, Tensor] | None = None
        if config.ema_decay is not None:
            self.ema = {name: weight.clone() for name, weight in self.weights.items()}
            self.state |= {f"ema.{name}": average for name, average in self.ema.items()}

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Accumulates the gradients of the backward passes inside the block.

        Where a parameter is its own master weight they are added in place; elsewhere each is moved
        as soon as it is there, of a sharded one when it was reduced, so that few exist at a time.
        """
        hooks = []
        for name, parameter in self.parameters.items():
            if name in self._own and not _is_sharded(parameter):
                parameter.grad = self.gradients[name]
            else:
                move = partial(_move_gradient, self.gradients[name])
                hooks.append(parameter.register_post_accumulate_grad_hook(move))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in self.parameters.values():
                parameter.grad = None

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Returns the norm of the gradient, over all parameters and processes."""
        norms = torch.stack(torch._foreach_norm(list(self.gradients.values())))
        return math.sqrt(self._over_shards(norms.double().square().sum()))

    def _over_shards(self, value: Tensor) -> float:
        """Adds a number up over all processes, on the device of the model."""
        device = next(iter(self.parameters.values())).device
        return sum_over_processes(value.to(device)).item()

    @torch.no_grad()
    def step(self, learning_rate: float, norm: float) -> None:
        """Takes a step along the gradient, of finite `norm`, clips it first, and clears it."""
        limit = self._config.max_grad_norm
        if limit is not None and norm > limit:
            torch._foreach_mul_(list(self.gradients.values()), limit / norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        if self.ema is not None and self._config.ema_decay is not None:
            torch._foreach_lerp_(
                list(self.ema.values()), list(self.weights.values()), 1 - self._config.ema_decay
            )
        self.clear()
        self._assign()

    @torch.no_grad()
    def add(self, name: str, change: Tensor) -> None:
        """Adds to a whole weight, past the gradient; every process gives the same."""
        parameter: Any = self.parameters[name]
        if _is_sharded(parameter):
            from torch.distributed.tensor import distribute_tensor

            change = _local(distribute_tensor(change, parameter.device_mesh, parameter.placements))
        self.weights[name].add_(change.to(self.weights[name]))
        self._assign()

    @torch.no_grad()
    def clear(self) -> None:
        """Forgets the gradient of a step that is not taken."""
        torch._foreach_zero_(list(self.gradients.values()))

    @torch.no_grad()
    def are_finite(self) -> bool:
        """Whether the trained weights of the model are finite, in all processes."""
        parts = [part for p in self.parameters.values() if (part := _local(p.detach())).numel()]
        largest = torch.stack(torch._foreach_norm(parts, math.inf)) if parts else torch.zeros(1)
        return self._over_shards((~largest.isfinite()).sum()) == 0

    @torch.no_grad()
    def restored(self, steps: int) -> None:
        """Says that `state` now holds what it held after so many steps."""
        for weight in self.weights.values():
            self._adamw.state[weight]["step"].fill_(float(steps))
        self._assign()

    def whole(self, name: str) -> Tensor:
        """Returns a whole weight on the CPU, its average where one is kept, to all processes."""
        parameter, shard = self.parameters[name], (self.ema or self.weights)[name]
        if _is_sharded(parameter):
            shard = as_global(parameter, shard.to(parameter.device)).full_tensor()
        return shard.cpu()

    def _assign(self) -> None:
        """Gives the model the values of its master weights."""
        for name in self.parameters.keys() - self._own:
            _local(self.parameters[name].detach()).copy_(self.weights[name])


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def _local(tensor: Any) -> Tensor:
    """Returns the part of a tensor that lies in this process: all of it unless it is sharded."""
    part: Tensor = tensor.to_local() if _is_sharded(tensor) else tensor
    return part


@torch.no_grad()
def _move_gradient(total: Tensor, parameter: Tensor) -> None:
    """Adds the gradient of a parameter to its sum and frees it."""
    if parameter.grad is not None:
        total.add_(_local(parameter.grad).to(total.device, torch.float32))
        parameter.grad = None


def shard_(root: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Shards the parameters of a module over all processes: each layer a group, the rest one more.

    They are on `device`, or on the meta device and will be there.

    Gradients are summed over the processes, in fp32. FSDP2 reduces the gradients of a group
    together, so the same parameters must have one in every process; what a process does not use in
    a pass (the ViT without an image, a stream without tokens) gets a gradient of zero here.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (num_processes(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    modules = [*layers, root]
    grouped: set[int] = set()
    # Our hooks come before FSDP's own, which free the whole parameters.
    for module in modules:
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        own = [name for name, p in trained.items() if id(p) not in grouped]
        grouped |= {id(p) for p in module.parameters()}
        if own:
            module.register_forward_hook(partial(_use_all, own))
    for module in modules:
        sharded: Any = fully_shard(module, mesh=mesh, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        # Not every backend can scale while it reduces.
        sharded.set_force_sum_reduction_for_comms(True)


def _use_all(names: list[str], module: nn.Module, _: Any, outputs: Any) -> Any:
    """A forward hook that lets every output depend on the named parameters, by a zero."""
    parameters = [module.get_parameter(name) for name in names]
    nothing = torch.stack([p.flatten()[:1].sum().float() * 0 for p in parameters]).sum()
    return tuple(x + nothing.to(x.dtype) if isinstance(x, Tensor) else x for x in outputs)


def as_global(parameter: Any, shard: Tensor) -> Any:
    """Returns the part of a tensor that its parameter has in this process as one of the whole."""
    if not _is_sharded(parameter):
        return shard
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = parameter.device_mesh
    if shard.device.type != mesh.device_type:  # nothing is moved
        mesh = init_device_mesh(shard.device.type, (num_processes(),))
    placements, shape, stride = parameter.placements, parameter.shape, parameter.stride()
    return DTensor.from_local(shard, mesh, placements, shape=shape, stride=stride)

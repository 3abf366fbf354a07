# SPDX-License-Identifier: Apache-2.0
"""What an optimizer step works on: fp32 gradients, masters, moments and average of the weights.

A trained parameter in fp32 on the optimizer's device is its own master. Any other has a master
there, takes its rounded value after every step, and hands over its gradient after every backward
pass, so that gradients of several passes are summed in fp32. Parameters that are not trained have
nothing here. Of a sharded parameter each process holds the state of its own shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_unified.adapt.config import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER, _EMA = "master", "ema"


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that lies in this process: all of it unless it is sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold parts of a tensor."""
    return hasattr(tensor, "to_local")


@torch.no_grad()
def _move_gradient(total: Tensor, parameter: Tensor) -> None:
    """Adds the gradient of a parameter to its sum and frees it."""
    if parameter.grad is not None:
        total.add_(local(parameter.grad).to(total.device, torch.float32))
        parameter.grad = None


class Masters:
    """AdamW in fp32 for the trained parameters of a model.

    Args:
        model: parameters with `requires_grad` are trained.
        config: of optimizer and average.

    Raises:
        ValueError: nothing is to be trained, or a trained parameter is not fp32, bf16 or fp16.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.parameters: dict[str, nn.Parameter] = {
            name: p for name, p in model.named_parameters() if p.requires_grad
        }
        if not self.parameters:
            raise ValueError("Trainer: model must have parameters with requires_grad, got none")
        for name, parameter in self.parameters.items():
            if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(
                    f"Trainer: {name} must be float32, bfloat16 or float16, got {parameter.dtype}"
                )
        self._config = config
        self.weights: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                own = local(parameter.detach())
                device = torch.device(config.optimizer_device or own.device)
                self.weights[name] = own.to(device, torch.float32)
        self._sharded = {n: p for n, p in self.parameters.items() if is_sharded(p)}
        whole = {n: p for n, p in self.parameters.items() if n not in self._sharded}
        self._own = {n: p for n, p in whole.items() if self._is_own(n)}
        self._copies = {n: p for n, p in whole.items() if n not in self._own}
        self.ema: dict[str, Tensor] | None = None
        if config.ema_decay is not None:
            self.ema = {name: weight.clone() for name, weight in self.weights.items()}
        self._sum = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.grad = self._sum[name]
        self._summed = [(parameter, self._sum[name]) for name, parameter in self._own.items()]
        # A shard may be empty, which fused steps do not take.
        decayed = [w for n, w in self.weights.items() if self.parameters[n].ndim > 1 and w.numel()]
        plain = [w for n, w in self.weights.items() if self.parameters[n].ndim <= 1 and w.numel()]
        groups: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": plain, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @contextmanager
    def collecting(self) -> Iterator[Callable[[], None]]:
        """Sums the gradients of the backward passes inside the block.

        Where a parameter is its own master they are added in place; elsewhere each is moved as soon
        as it is there, so that few exist at a time. Of sharded parameters they are there only after
        the pass, so the block gets a function to call then.
        """
        for parameter, total in self._summed:
            parameter.grad = total
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_move_gradient, self._sum[name]))
            for name, parameter in self._copies.items()
        ]
        try:
            yield self._collect_shards
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in self.parameters.values():
                parameter.grad = None

    def _collect_shards(self) -> None:
        for name, parameter in self._sharded.items():
            _move_gradient(self._sum[name], parameter)

    @torch.no_grad()
    def step(self, learning_rate: float, norm: float) -> None:
        """Takes a step along the collected gradients, and clears them.

        Args:
            norm: of these gradients, finite; decides whether they are clipped.
        """
        limit = self._config.max_grad_norm
        if limit is not None and norm > limit:
            torch._foreach_mul_(list(self._sum.values()), limit / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        if self.ema is not None and self._config.ema_decay is not None:
            torch._foreach_lerp_(
                list(self.ema.values()), list(self.weights.values()), 1 - self._config.ema_decay
            )
        self.clear()
        self._publish(self.weights)

    @torch.no_grad()
    def clear(self) -> None:
        """Forgets the gradients collected for a step that is not taken."""
        torch._foreach_zero_(list(self._sum.values()))

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Lets the model compute with the averages inside the block.

        Raises:
            ValueError: no average is kept.
        """
        if self.ema is None:
            raise ValueError("Trainer: ema_decay must be given for an average, got None")
        kept = {n: w.clone() if self._is_own(n) else w for n, w in self.weights.items()}
        self._publish(self.ema)
        try:
            yield
        finally:
            self._publish(kept)

    @torch.no_grad()
    def copy_ema_(self) -> None:
        """Gives model and masters the averages.

        Raises:
            ValueError: no average is kept.
        """
        if self.ema is None:
            raise ValueError("Trainer: ema_decay must be given for an average, got None")
        for name, average in self.ema.items():
            self.weights[name].copy_(average)
        self._publish(self.weights)

    def state(self) -> dict[str, Tensor]:
        """Names what a run has to keep: masters, moments and averages, by kind and parameter.

        The tensors are the state itself, of a sharded parameter the local part.
        """
        self._prepare_moments()
        found = {f"{_MASTER}.{name}": weight for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            for moment in MOMENTS:
                found[f"{moment}.{name}"] = self._optimizer.state[weight][moment]
        found |= {f"{_EMA}.{name}": average for name, average in (self.ema or {}).items()}
        return found

    @torch.no_grad()
    def restored(self, steps: int) -> None:
        """Says that `state()` now holds what it held after so many steps."""
        for weight in self.weights.values():
            self._optimizer.state[weight]["step"].fill_(float(steps))
        self._publish(self.weights)

    def _is_own(self, name: str) -> bool:
        """Whether a parameter is its own master."""
        own = local(self.parameters[name].detach())
        return own.data_ptr() == self.weights[name].data_ptr() and own.dtype == torch.float32

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Returns the norm of the collected gradients, over all parameters and processes."""
        norms = torch.stack(torch._foreach_norm(list(self._sum.values())))
        square = norms.double().square().sum()
        first = next(iter(self.parameters.values()))
        if is_sharded(first):
            square = square.to(first.device)
            dist.all_reduce(square)
        return float(square.sqrt())

    @torch.no_grad()
    def are_finite(self) -> bool:
        """Whether the trained weights of the model are finite, in all processes."""
        parts = [local(p.detach()) for p in self.parameters.values()]
        parts = [part for part in parts if part.numel()]
        # One read of the weights. Their norm can be infinite where they are not: then look closer.
        norms = list(torch._foreach_norm(parts)) if parts else []
        finite = all(map(math.isfinite, torch.stack(norms).tolist())) if norms else True
        finite = finite or all(bool(part.isfinite().all()) for part in parts)
        if self._sharded:
            device = next(iter(self.parameters.values())).device
            flag = torch.tensor(int(finite), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
            finite = bool(flag)
        return finite

    @torch.no_grad()
    def _publish(self, weights: Mapping[str, Tensor]) -> None:
        apart = {**self._copies, **self._sharded}
        targets = apart if weights is self.weights else self.parameters
        for name, parameter in targets.items():
            own = local(parameter.detach())
            if own.data_ptr() != weights[name].data_ptr():
                own.copy_(weights[name])

    def _prepare_moments(self) -> None:
        """Gives the optimizer the state that it would make at its first step."""
        for weight in self.weights.values():
            state: dict[str, Any] = self._optimizer.state[weight]
            if not state:
                state["step"] = torch.zeros((), device=weight.device)
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(weight)

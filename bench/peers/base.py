# SPDX-License-Identifier: Apache-2.0
"""What the benchmark asks of an implementation of the sparse FFN, and the weights of all."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cases import Case
from ..measure import first_line, name_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is to be computed, and where."""

    case: Case
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One sparse FFN: expert e is rows, and in the third columns, [e * h, (e + 1) * h).

    Args:
        gate: router [E, D].
        gate_proj, up_proj: [I, D].
        down_proj: [D, I].
    """

    gate: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor


def draw_weights(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Weights:
    """Normal weights; tokens of unit variance get logits and outputs of about unit size."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device)
        return drawn.mul_(std).to(dtype)

    d, i = case.hidden_size, case.intermediate_size
    return Weights(
        gate=normal(case.num_experts, d, d**-0.5),
        gate_proj=normal(i, d, d**-0.5),
        up_proj=normal(i, d, d**-0.5),
        down_proj=normal(d, i, 0.5 * (case.top_k * case.expert_width) ** -0.5),
    )


class Provider(nn.Module):
    """One implementation, built for a case: x [T, D] -> y [T, D].

    Router parameters are named `...gate.weight`; all others belong to experts.
    """

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What forward uses: weights [T, K] fp32 and experts [T, K]; the result is judged by it."""
        raise NotImplementedError


class StackedExperts(Provider):
    """A router of torch ops before experts `gate_up_proj` [E, 2h, D] and `down_proj` [E, D, h]."""

    def __init__(self, setting: Setting, weights: Weights) -> None:
        super().__init__()
        self.num_experts, self.top_k = setting.case.num_experts, setting.case.top_k
        hidden_size = setting.case.hidden_size
        options = {"device": "meta", "dtype": setting.dtype}
        self.gate = nn.Linear(hidden_size, self.num_experts, bias=False, **options)
        self.gate.weight = nn.Parameter(weights.gate.clone())
        gate, up = (
            w.view(self.num_experts, -1, hidden_size) for w in (weights.gate_proj, weights.up_proj)
        )
        down = weights.down_proj.view(hidden_size, self.num_experts, -1).transpose(0, 1)
        self.gate_up_proj = nn.Parameter(torch.cat((gate, up), dim=1))
        self.down_proj = nn.Parameter(down.contiguous())

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        topk_logits, topk_idx = torch.topk(self.gate(x), self.top_k, dim=-1)
        return 1 + topk_logits.float(), topk_idx

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.routing(x))

    def run(self, x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        """The experts: x [T, D], weights [T, K] fp32, topk_idx [T, K] int64 -> y [T, D]."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """An implementation, before it is built.

    Args:
        name: in tables and results.
        unavailable: why it cannot run in a setting, or None.
        build: makes it; may raise anything, which is then the reason why it was not measured.
        formula: of `work`, what it computes.
        trains: it has a backward pass.
        synchronises: it reads sizes back to the host, so no graph can hold it.
    """

    name: str
    build: Callable[[Setting, Weights], Provider]
    unavailable: Callable[[Setting], str | None] = lambda _: None
    formula: str = "sparse_ffn"
    trains: bool = True
    synchronises: bool = False


def missing_package(module: str, distribution: str) -> str | None:
    """Why a package cannot be used, or None; importing it is the only proof."""
    try:
        importlib.import_module(module)
    except Exception as error:  # an import may raise anything
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"{distribution} is not installed"
        return f"{distribution} cannot be imported: {first_line(error)}"
    return None


def needs_cuda(setting: Setting, capability: tuple[int, int] = (8, 0)) -> str | None:
    """Why a peer whose kernels are for CUDA alone cannot run, or None."""
    if setting.device.type != "cuda":
        return f"needs CUDA, got {setting.device.type}"
    found = torch.cuda.get_device_capability(setting.device)
    if found < capability:
        wanted = ".".join(map(str, capability))
        return f"needs compute capability {wanted}, got {'.'.join(map(str, found))}"
    return None


def needs_dtype(setting: Setting, *dtypes: torch.dtype) -> str | None:
    """Why a peer does not take the dtype, or None; bf16 and fp16 by default."""
    allowed = dtypes or (torch.bfloat16, torch.float16)
    if setting.dtype not in allowed:
        names = " or ".join(map(name_of, allowed))
        return f"takes {names}, got {name_of(setting.dtype)}"
    return None

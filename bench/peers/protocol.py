# SPDX-License-Identifier: Apache-2.0
"""What the benchmark asks of an implementation of the sparse FFN."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cases import Case
from .weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is to be computed, and where."""

    case: Case
    dtype: torch.dtype
    device: torch.device


class Provider(nn.Module):
    """One implementation, built for a case: x [T, D] -> y [T, D].

    Router parameters are named `...gate.weight`; all others belong to experts.
    """

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What forward uses: weights [T, K] fp32 and experts [T, K]; the result is judged by it."""
        raise NotImplementedError

    def expert_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the experts as gate_proj [I, D], up_proj [I, D], down_proj [D, I]."""
        raise NotImplementedError

    def set_frozen(self, frozen: bool) -> None:
        """Lets the experts learn, or not; the router always does."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not frozen or name.endswith("gate.weight"))


def gradient(parameter: Tensor) -> Tensor:
    """The gradient that a backward pass left."""
    if parameter.grad is None:
        raise RuntimeError(f"a weight {list(parameter.shape)} got no gradient")
    return parameter.grad


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """An implementation, before it is built.

    Args:
        name: in tables and results.
        unavailable: why it cannot run in a setting, or None.
        build: makes it; may raise anything, which is then the reason why it was not measured.
        formula: of `work`, what it computes.
        trains: it has a backward pass.
        waits: it reads sizes back to the host, so that no graph can hold it.
    """

    name: str
    unavailable: Callable[[Setting], str | None]
    build: Callable[[Setting, Weights], Provider]
    formula: str = "sparse_ffn"
    trains: bool = True
    waits: bool = False


def always(setting: Setting) -> str | None:
    """Of peers that need nothing but torch."""
    return None


def missing_package(module: str, distribution: str) -> str | None:
    """Why a package cannot be used, or None; importing it is the only proof."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"{distribution} is not installed"
        return f"{distribution} cannot be imported: {first_line(error)}"
    except Exception as error:  # what a package does while it is imported is its own affair
        return f"{distribution} fails to import: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    """The kind of an error, and the first line of its text, cut to what fits a table."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {line}"[:200].rstrip(": ")


def needs_cuda(setting: Setting, capability: tuple[int, int] = (8, 0)) -> str | None:
    """Why a peer whose kernels are for CUDA alone cannot run, or None."""
    if setting.device.type != "cuda":
        return f"needs CUDA, got {setting.device.type}"
    found = torch.cuda.get_device_capability(setting.device)
    if found < capability:
        wanted = ".".join(map(str, capability))
        return f"needs compute capability {wanted}, got {'.'.join(map(str, found))}"
    return None


def needs_half(setting: Setting, *dtypes: torch.dtype) -> str | None:
    """Why a peer does not take the dtype, or None."""
    allowed = dtypes or (torch.bfloat16, torch.float16)
    if setting.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        return f"takes {names}, got {str(setting.dtype).removeprefix('torch.')}"
    return None

# SPDX-License-Identifier: Apache-2.0
"""Properties of the ops, each a function of a device: one statement for every backend.

pytest runs them on the CPU kernels, on the CUDA bindings over emulated kernels (`make emulated`),
and on a GPU (`test_checks.py`); `bench/gpu_check.py` runs them where there is nothing but torch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MODULES = ("checks_routing", "checks_experts", "checks_torch")
CPU, EMULATED, CUDA = "cpu", "emulated", "cuda"
EVERYWHERE = (CPU, EMULATED, CUDA)
# In a process with this variable the CUDA bindings over emulated kernels replace the CPU's.
VARIABLE = "SPARSE_UNIFIED_TEST_EMULATED"


class Skip(Exception):
    """The device cannot be asked this; the text says why."""


def backend_of(device: torch.device) -> str:
    """What runs the ops on tensors of a device, in this process."""
    if device.type == "cuda":
        return CUDA
    return EMULATED if VARIABLE in os.environ else CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A property under some parameters.

    Args:
        function, parameters: what to call, besides the device.
        backends: where it holds.
        is_small: seconds on a CPU, and enough for a sanitizer.
    """

    function: Callable[..., None]
    parameters: Mapping[str, Any]
    backends: tuple[str, ...]
    is_small: bool

    def __call__(self, device: torch.device) -> None:
        """Runs with random numbers of its own.

        Raises:
            Skip: the device cannot be asked this.
            AssertionError: the property does not hold.
        """
        torch.manual_seed(0)
        self.function(device, **self.parameters)


_checks: dict[str, Check] = {}


def check(
    *parameters: Mapping[str, Any],
    on: tuple[str, ...] | Callable[..., tuple[str, ...]] = EVERYWHERE,
    small: bool | Callable[..., bool] = True,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function of the device, once for each set of further parameters.

    Args:
        parameters: of each check; one without any by default.
        on: the backends, or a function of the parameters.
        small: whether it is `is_small`, or a function of the parameters.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for one in parameters or ({},):
            values = "-".join(str(value).removeprefix("torch.") for value in one.values())
            name = f"{function.__module__}.{function.__name__}" + (f"[{values}]" if values else "")
            assert name not in _checks, f"{name} is registered twice"
            _checks[name] = Check(
                function=function,
                parameters=one,
                backends=on(**one) if callable(on) else on,
                is_small=small(**one) if callable(small) else small,
            )
        return function

    return register


def all_checks(backend: str | None = None) -> dict[str, Check]:
    """module.function[parameters] -> check of a backend, or all, those that say most first."""
    for module in MODULES:
        importlib.import_module(module)
    return {
        name: check
        for name, check in _checks.items()
        if backend is None or (backend in check.backends and (check.is_small or backend == CUDA))
    }

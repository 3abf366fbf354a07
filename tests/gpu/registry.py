# SPDX-License-Identifier: Apache-2.0
"""The list of checks that a device must pass; each is a function of the device.

pytest runs them (`test_gpu.py`), and so does `run.py`, which needs nothing but torch and goes on
after a check that took the process or the device with it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MODULES = (
    "checks_routing",
    "checks_ffn",
    "checks_pruned",
    "checks_gradients",
    "checks_torch",
    "checks_block",
    "checks_model",
    "checks_large",
)


class Skip(Exception):
    """The device cannot be asked this; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A property under some parameters.

    Args:
        name: module.function[parameters].
        function, parameters: what to call, besides the device.
        is_small: seconds on a CPU, and enough for a sanitizer.
    """

    name: str
    function: Callable[..., None]
    parameters: Mapping[str, Any]
    is_small: bool

    def __call__(self, device: torch.device) -> None:
        """Runs with the random numbers of its own.

        Raises:
            Skip: the device cannot be asked this.
            AssertionError: the property does not hold.
        """
        torch.manual_seed(0)
        self.function(device, **self.parameters)


_checks: dict[str, Check] = {}


def check(
    *parameters: Mapping[str, Any], small: bool | Callable[..., bool] = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function of the device, once for each set of further parameters.

    Args:
        parameters: of each check; one without any by default.
        small: whether it is `is_small`; may depend on the parameters.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for one in parameters or ({},):
            unknown = set(one) - set(inspect.signature(function).parameters)
            assert not unknown, f"{function.__name__} has no parameter {unknown}"
            values = "-".join(str(value).removeprefix("torch.") for value in one.values())
            name = f"{function.__module__}.{function.__name__}" + (f"[{values}]" if values else "")
            assert name not in _checks, f"{name} is registered twice"
            is_small = small(**one) if callable(small) else small
            _checks[name] = Check(name=name, function=function, parameters=one, is_small=is_small)
        return function

    return register


def all_checks() -> dict[str, Check]:
    """Every check by name, in the order in which they say most when the first of them fails."""
    for module in MODULES:
        importlib.import_module(module)
    return dict(_checks)

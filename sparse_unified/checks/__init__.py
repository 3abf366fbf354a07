# SPDX-License-Identifier: Apache-2.0
"""Properties of the ops, each a function of a device: one statement for every backend.

`sparse-unified doctor` runs those of `kernels` on a user's device, each family of kernels in a
child process; tests add more, and run all on the CPU, on the CUDA bindings over emulated kernels
and on a GPU, where `bench/gpu_check.py` needs no pytest.
"""

from __future__ import annotations

import importlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

CPU, EMULATED, CUDA = "cpu", "emulated", "cuda"
EVERYWHERE = (CPU, EMULATED, CUDA)
# Seconds that a child process may take to begin: torch on a cold disk.
_START = 300.0
# How a result says that its process did not come to the end of a check.
STARTED = "started"


class Skip(Exception):
    """The device cannot be asked this; the text says why."""


def backend_of(device: torch.device) -> str:
    """What runs the ops on tensors of a device, in this process."""
    if device.type == "cuda":
        return CUDA
    return EMULATED if hasattr(torch.ops.sparse_unified_emulation, "set_device") else CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A property under some parameters, and the backends where it holds."""

    function: Callable[..., Mapping[str, Any] | None]
    parameters: Mapping[str, Any]
    backends: tuple[str, ...]
    is_small: bool  # seconds on a CPU, and enough for a sanitizer

    def __call__(self, device: torch.device) -> dict[str, Any]:
        """Runs with random numbers of its own; `Skip` where the device cannot be asked this.

        Returns "error", the largest relative one that was compared, and what the function returns;
        AssertionError if the property does not hold.
        """
        torch.manual_seed(0)
        _errors[:] = [0.0]
        facts = self.function(device, **self.parameters)
        return {"error": max(_errors), **(facts or {})}


_errors: list[float] = []


def note_error(relative: float) -> None:
    """Remembers a relative error for the result of the check that runs."""
    _errors.append(relative)


_checks: dict[str, Check] = {}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def check(
    *parameters: Mapping[str, Any],
    on: tuple[str, ...] | Callable[..., tuple[str, ...]] = EVERYWHERE,
    small: bool | Callable[..., bool] = True,
) -> Callable[[_Function], _Function]:
    """Registers a function of the device, once for each set of further parameters.

    Args:
        parameters: of each check; one without any by default.
        on: the backends, or a function of the parameters.
        small: whether it is `is_small`, or a function of the parameters.
    """

    def register(function: _Function) -> _Function:
        for one in parameters or ({},):
            values = "-".join(str(value).removeprefix("torch.") for value in one.values())
            module = function.__module__.rpartition(".")[2]
            name = f"{module}.{function.__name__}" + (f"[{values}]" if values else "")
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
    """module.function[parameters] -> check of a backend, or all, in the order of their modules.

    Those of `kernels`, and of every other module with checks that was imported.
    """
    importlib.import_module("sparse_unified.checks.kernels")
    return {
        name: check
        for name, check in _checks.items()
        if backend is None or (backend in check.backends and (check.is_small or backend == CUDA))
    }


# In a process of their own, which a fault may end


def work(device: str, names: Sequence[str], more: Mapping[str, Any] | None = None) -> None:
    """Runs checks, or what `more` names, in this process; a line of JSON before and after each."""
    checks: dict[str, Callable[[torch.device], dict[str, Any]]] = {**all_checks(), **(more or {})}
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    for name in names:
        show(name=name, outcome=STARTED)
        facts: dict[str, Any] = {"outcome": "passed"}
        try:
            facts |= checks[name](torch.device(device))
            synchronize()
        except (Skip, torch.OutOfMemoryError) as reason:  # neither is the kernels' fault
            facts = {"outcome": "skipped", "text": str(reason)[:200]}
        except Exception as error:
            facts = {"outcome": "failed", "text": f"{type(error).__name__}: {error}"[:2000]}
        show(name=name, **facts)
        if facts["outcome"] == "failed":
            try:
                synchronize()
            except RuntimeError:
                return  # the context is broken, and with it all that this process would compute


def show(**said: Any) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def results(
    command: Sequence[str],
    names: Sequence[str],
    *,
    stall: float = 60.0,
    seconds: float = float("inf"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Runs checks in a child process and yields the result of each as it comes.

    A check that ends the process or hangs it has failed, and another process goes on behind it.

    Args:
        command: of a process that calls `work` with the names, JSON in its last argument.
        stall: seconds that a check may take.
        seconds: for all; what does not begin by then has no result.
        environment: of the process.

    Raises:
        RuntimeError: a process ended before its first check.
    """
    left, deadline = list(names), time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        child = subprocess.Popen(
            [*command, json.dumps(left)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        )
        lines, errors = queue.Queue[str](), list[str]()
        for stream, put in ((child.stdout, lines.put), (child.stderr, errors.append)):
            threading.Thread(target=_read, args=(stream, put), daemon=True).start()
        running, why, before, allowed = "", "", len(left), max(stall, _START)
        try:
            while not why:
                wait = min(allowed, deadline - time.monotonic())
                try:
                    line = lines.get(timeout=max(wait, 0))
                except queue.Empty:
                    why = f"did not end within {max(wait, 0):.0f} s"
                    continue
                if not line:
                    break
                if not line.startswith('{"name"'):
                    continue  # of a compiler or a library
                said, allowed = json.loads(line), stall
                running = said["name"] if said["outcome"] == STARTED else ""
                if not running:
                    left.remove(said["name"])
                    yield said
        finally:
            child.kill()
            with suppress(subprocess.TimeoutExpired):  # a hung device can keep it
                child.wait(timeout=10)
        told = f"ended with status {child.returncode}: {''.join(errors).strip()[-500:]}"
        if running:
            left.remove(running)
            yield {"name": running, "outcome": "failed", "text": why or f"the process {told}"}
        elif len(left) == before and time.monotonic() < deadline:
            raise RuntimeError(f"checks: their process must begin, got one that {why or told}")


def _read(stream: Any, put: Callable[[str], object]) -> None:
    """Passes lines on; an empty one is the end."""
    for line in stream:
        put(line)
    put("")

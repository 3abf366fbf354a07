# SPDX-License-Identifier: Apache-2.0
"""How the repeated step is run: op by op, compiled as one graph, or replayed as a CUDA graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_unified._common import context, require
from sparse_unified.bagel.model import Bagel, Denoiser

Step = Callable[[Sequence[Tensor], Tensor], list[Tensor]]

# Modes in which the compiler records CUDA graphs of its own.
_MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")
_MODES = ("default", *_MODES_WITH_GRAPHS, "max-autotune-no-cudagraphs")
# Graphs of one model: every number of images, their sizes, and guidance on or off need their own.
_MOST_GRAPHS = 64


class ReplayedStep:
    """A step that is run once, recorded once as a CUDA graph, and from then on replayed; it reads
    its arguments and what stays as it is. Graphs of one `pool` of memory are replayed in turn."""

    def __init__(self, step: Step, device: torch.device, pool: Any) -> None:
        self._step, self._device, self._pool = step, device, pool
        self._inputs: list[Tensor] = []  # where a replay finds them: the images, then the time
        self._outputs: list[Tensor] = []
        self._replay: Callable[[], object] | None = None

    @torch.no_grad()
    def __call__(self, tokens: Sequence[Tensor], time: Tensor) -> list[Tensor]:
        """As `Denoiser`; what it returns is the caller's to keep."""
        if not self._inputs:
            self._inputs = [x.clone() for x in (*tokens, time)]
            return self._warm_up()
        for own, given in zip(self._inputs, (*tokens, time), strict=True):
            own.copy_(given)
        if self._replay is None:
            self._replay, self._outputs = self._record()  # a capture computes nothing
        self._replay()
        return [out.clone() for out in self._outputs]

    def _run(self) -> list[Tensor]:
        *tokens, time = self._inputs
        return self._step(tokens, time)

    def _warm_up(self) -> list[Tensor]:
        """Runs on a stream of its own, as a capture will, so that all that is done once is done."""
        stream, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results = self._run()
        current.wait_stream(stream)
        return [result.clone() for result in results]

    def _record(self) -> tuple[Callable[[], object], list[Tensor]]:
        """Returns what replays a run, and the tensors into which it does."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
            return graph.replay, self._run()


class Execution:
    """How a pipeline runs the steps of denoising.

    Args:
        compile: True, or a mode of torch.compile: the step is compiled as one graph, once for each
            number and size of images with guidance on and off; prompts of any length share it.
        cuda_graphs: the first step of an image runs as usual, the second is recorded, and all
            others are replayed. Weights must be on one CUDA device.
        backend: of torch.compile, a name or a function.
    """

    @context("Execution")
    def __init__(
        self,
        *,
        compile: bool | str = False,
        cuda_graphs: bool = False,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        is_mode = isinstance(compile, bool) or compile in _MODES
        rule = f"compile must be True, False or one of {', '.join(_MODES)}"
        require(is_mode, rule, repr(compile))
        fits = not cuda_graphs or compile not in _MODES_WITH_GRAPHS
        reason = f"compile={compile!r}, which records graphs itself"
        require(fits, f"cuda_graphs must be False with {reason}", True)
        self.compile = compile
        self.cuda_graphs = cuda_graphs
        self._predict: Callable[..., list[Tensor]] = Denoiser.__call__
        self._pools: dict[torch.device, Any] = {}  # memory of graphs
        if compile is not False:
            # Newer versions of torch count graphs for each function that is compiled.
            known = inspect.signature(torch.compile).parameters
            limit: Any = {"recompile_limit": _MOST_GRAPHS} if "recompile_limit" in known else {}
            options: Any = {"fullgraph": True, "dynamic": False, "backend": backend, **limit}
            mode = None if compile is True else compile
            self._predict = torch.compile(Denoiser.__call__, mode=mode, **options)

    @property
    def is_plain(self) -> bool:
        """Whether steps are run op by op."""
        return not self.compile and not self.cuda_graphs

    @context("Execution")
    def check(self, device: torch.device, model: Bagel | None = None) -> None:
        """Raises ValueError for a device, and for a model on it, that cannot be run so."""
        can_record = not self.cuda_graphs or device.type == "cuda"
        require(can_record, f"cuda_graphs must be False for a model on {device}", True)
        if self.is_plain or model is None:
            return
        places = {str(weight.device) for weight in model.parameters()} - {str(device)}
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            places.add("places that accelerate manages")
        rule = f"compile and cuda_graphs must be False unless all weights are on {device}"
        require(not places, rule, f"weights on {', '.join(sorted(places))}")

    def start(self, denoiser: Denoiser) -> Step:
        """Returns what runs the steps of a batch of images."""
        if self.is_plain:
            return denoiser
        if self.compile:  # what was read before is of any length
            caches: Any = [group.cache for group in denoiser.packing.groups]
            for past in (x for cache in caches for x in (*cache.keys, *cache.values)):
                if past is not None:
                    torch._dynamo.maybe_mark_dynamic(past, 1)

        @torch.no_grad()
        def step(tokens: Sequence[Tensor], time: Tensor) -> list[Tensor]:
            # Images that come from an earlier step may not be what the compiler reads later.
            return self._predict(denoiser, list(tokens), time)

        if not self.cuda_graphs:
            return step
        device = denoiser.model.device
        if device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        return ReplayedStep(step, device, self._pools[device])

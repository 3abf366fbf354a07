# SPDX-License-Identifier: Apache-2.0
"""Gathers the statistics of FFNs while a model runs, by hooks that change nothing.

`collect` observes any block of code, `calibrate` runs a model on samples and observes that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified._common import Progress, context
from sparse_unified.analysis.bagel_task import Settings, run_task
from sparse_unified.analysis.samples import Task
from sparse_unified.analysis.statistics import (
    FfnStatistics,
    FfnSums,
    StatisticsConfig,
    keep_lowest,
    no_inputs,
)
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import composed
from sparse_unified.surgery.decoder import Decoder, Ffn, find_adapter, hash_ffns


class Observer:
    """Counts by hooks while a model runs, each time in the range of the denoising time."""

    def __init__(self, config: StatisticsConfig) -> None:
        self.config, self.time_range = config, 0

    def set_time(self, time: float | None) -> None:
        """Sets the time of denoising at which the model runs; None for tokens that have none.

        Of BAGEL models it is read from their time embedder, and need not be set.
        """
        count = self.config.num_time_ranges
        self.time_range = min(math.ceil(time * count), count) if time else 0

    @contextmanager
    def observing(
        self, model: object, hooks: Iterable[tuple[nn.Module, Callable[..., None]]]
    ) -> Iterator[None]:
        """Hooks modules before their forward, and reads the time from embedder to last layer."""
        host: Any = model if hasattr(model, "time_embedder") else getattr(model, "model", None)
        embedder = getattr(host, "time_embedder", None)
        with ExitStack() as stack:
            for module, before in hooks:
                stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            if isinstance(embedder, nn.Module):
                begin = embedder.register_forward_pre_hook(
                    lambda _, given: self.set_time(float(given[0].reshape(-1)[0]))
                )
                end = host.language_model.model.register_forward_hook(
                    lambda *_: self.set_time(None), always_call=True
                )
                stack.enter_context(begin)
                stack.enter_context(end)
            yield


class Collector(Observer):
    """What `collect` yields: samples begin with `begin`; `statistics` gives the result."""

    def __init__(
        self, adapter: Decoder, task: str, config: StatisticsConfig, components: Sequence[str]
    ) -> None:
        super().__init__(config)
        self.adapter, self.task = adapter, task
        self.samples: list[str] = []
        # Each FFN, or `SparseMoE` with all of its experts.
        self.sums: dict[nn.Module, list[_Sums]] = {}
        for ffn in (ffn for component in components for ffn in adapter.ffns(component)):
            self.sums.setdefault(ffn.module, []).append(_Sums(ffn, config))

    def begin(self, sample: str) -> None:
        """Starts a sample, of a name that no other has: what runs from here on belongs to it."""
        if sample in self.samples:
            raise ValueError(f"collect: samples must be distinct, got {sample!r} twice")
        self.samples.append(sample)
        seed = int.from_bytes(hashlib.sha256(sample.encode()).digest()[:8], "little") % 2**63
        for own in chain(*self.sums.values()):
            own.begin(seed)

    def statistics(self) -> FfnStatistics:
        """Returns what was gathered, the running sample included; may be asked for repeatedly."""
        watched = list(chain(*self.sums.values()))
        # Tasks leave components out: text-only understanding runs no gen FFN.
        seen = {own.ffn.component: "" for own in watched if any(map(Tensor.any, own.sample_tokens))}
        of = [(own.ffn.component, own.ffn.key, own) for own in watched]
        return FfnStatistics(
            model_hashes={component: hash_ffns(self.adapter, component) for component in seen},
            config=self.config,
            samples={self.task: tuple(self.samples)},
            ffns={(self.task, name, key): own.result() for name, key, own in of if name in seen},
        )

    def before(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Counts the tokens that a FFN, or the experts of a mixture, are about to see."""
        if not self.samples:
            raise RuntimeError("collect: begin must be called before the model runs")
        given = arguments[0] if arguments else next(iter(named.values()))
        x = given.detach().reshape(-1, given.shape[-1])
        watched = self.sums[module]
        parts = [x] * len(watched)
        if isinstance(module, SparseMoE):
            with torch.no_grad():
                chosen = module.route(*arguments, **named)[2]  # [T, K]
            flat = chosen.flatten().long()
            counts = torch.bincount(flat, minlength=module.num_experts).tolist()
            rows = (flat.argsort(stable=True) // chosen.shape[1]).split(counts)
            parts[-len(rows) :] = [x[own] for own in rows]  # after those of the shared expert
        for own, tokens in zip(watched, parts, strict=True):
            if len(tokens):
                own.add(tokens, self.time_range)


class _Sums:
    """Sums of one FFN on its device: of all samples, and of the one that runs.

    Of the inputs a bounded random sample is kept: every token draws a number from its sample's name
    and its place there, and those with the lowest numbers stay. So the tokens are the same in every
    layer, and passes over parts of the samples merge into one.
    """

    def __init__(self, ffn: Ffn, config: StatisticsConfig) -> None:
        self.ffn, self.config = ffn, config
        shape = (config.num_time_ranges + 1, ffn.intermediate_size)
        self.sum_abs, self.sum_squares, self.num_fired, self.running = (
            torch.zeros(shape, dtype=torch.float64, device=ffn.gate_proj.device) for _ in range(4)
        )
        # Tokens are counted on the CPU, the rest stays on the device until it is asked for.
        self.sample_tokens: list[Tensor] = []
        self.active: list[Tensor] = []
        self.kept = no_inputs(ffn.gate_proj.shape[1] if config.num_inputs else 0)
        self.generator = torch.Generator()

    def begin(self, seed: int) -> None:
        if self.sample_tokens:
            self.active.append(self._active())
            self.sum_abs += self.running
            self.running.zero_()
        self.generator.manual_seed(seed)
        self.sample_tokens.append(torch.zeros(len(self.running), dtype=torch.int64))

    @torch.no_grad()
    def add(self, x: Tensor, time_range: int) -> None:
        """Adds the tokens x [T, D] that the FFN is about to see."""
        importance = ops.ffn_importance if x.device.type == "cpu" else composed.ffn_importance
        gate, up = self.ffn.gate_proj, self.ffn.up_proj
        found = importance(x.to(gate.dtype), gate, up, self.config.threshold)
        totals = (self.running, self.sum_squares, self.num_fired)
        for total, own in zip(totals, found, strict=True):
            total[time_range] += own
        self.sample_tokens[-1][time_range] += len(x)
        if self.config.num_inputs:
            draws = torch.randint(2**62, (len(x),), generator=self.generator)
            known = self.kept["input_draws"]
            is_full = len(known) == self.config.num_inputs
            near = (draws < known[-1]).nonzero()[:, 0] if is_full else torch.arange(len(x))
            new = x[near.to(x.device)].to("cpu", torch.bfloat16)
            self.kept = keep_lowest(
                torch.cat([self.kept["inputs"], new]),
                torch.cat([known, draws[near]]),
                self.config.num_inputs,
            )

    def _active(self) -> Tensor:
        """Returns the active set of the running sample as bits, [R + 1, B]."""
        count = max(1, round(self.config.active_fraction * self.running.shape[1]))
        order = self.running.sort(descending=True, stable=True).indices[:, :count]
        active = torch.zeros_like(self.running, dtype=torch.bool).scatter_(1, order, True).cpu()
        active[self.sample_tokens[-1] == 0] = False
        return torch.from_numpy(np.packbits(active.numpy(), axis=-1, bitorder="little"))

    def result(self) -> FfnSums:
        sample_tokens = torch.stack(self.sample_tokens)
        return FfnSums(
            tokens=sample_tokens.sum(0),
            sum_abs=(self.sum_abs + self.running).cpu(),
            sum_squares=self.sum_squares.to("cpu", copy=True),
            num_fired=self.num_fired.to("cpu", copy=True),
            sample_tokens=sample_tokens,
            active=torch.stack([*self.active, self._active()]),
            **self.kept,
        )


@contextmanager
def collect(
    model: object,
    task: str,
    *,
    config: StatisticsConfig | None = None,
    components: Sequence[str] | None = None,
    adapter: Decoder | None = None,
) -> Iterator[Collector]:
    """Observes the FFNs of a model while the block runs; hooks are gone afterwards.

        with collect(model, "captions") as collector:
            for name, batch in samples:
                collector.begin(name)
                model(**batch)
        statistics = collector.statistics()

    Args:
        model: a model or pipeline.
        task: under which name the statistics are kept.
        config: what is counted.
        components: None is all that the adapter names.
        adapter: None finds one.
    """
    adapter = find_adapter(model) if adapter is None else adapter
    wanted = adapter.components if components is None else components
    collector = Collector(adapter, task, config or StatisticsConfig(), wanted)
    with collector.observing(model, [(module, collector.before) for module in collector.sums]):
        yield collector


@context("calibrate")
def calibrate(
    model: Any,
    task: Task | str,
    samples: Sequence[Any],
    *,
    run: Callable[[Any], object] | None = None,
    settings: Settings | None = None,
    config: StatisticsConfig | None = None,
    components: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> FfnStatistics:
    """Runs a model on samples and returns what its FFNs did.

    The same model, samples and settings give the same statistics: noise comes from the seed of each
    sample, and text is the likeliest.

    Example:
        statistics = calibrate(pipeline, "generation", read_samples("prompts.txt"))
        save_scores("scores.safetensors", score("wanda", pipeline, statistics))

    Args:
        model: a BAGEL pipeline; with `run`, any model that an adapter fits, or its adapter.
        task: generation, understanding or editing; with `run`, any name.
        samples: `Sample`s; with `run`, whatever it takes, one after the other. Those have their
            number as name, so that statistics of two such runs do not merge.
        run: what to do with a sample, for models that are no BAGEL pipeline.
        settings: of the built-in runs: size, steps, length of answers.
        config: what is counted.
        components: None is all of them.
        progress: called with the number of finished samples and of all.

    Raises:
        ValueError: there are no samples, the task or model is none that can be run, no adapter
            fits, or a FFN gave a value that is not finite.
    """
    name = task.value if isinstance(task, Task) else task
    with collect(model, name, config=config, components=components) as collector:
        run_task(model, name, samples, collector.begin, run, settings, progress)
    return collector.statistics()

# SPDX-License-Identifier: Apache-2.0
"""Gathers the statistics of FFNs while a model runs, by hooks that change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_unified import ops
from sparse_unified.analysis.active_sets import most_active, pack_bits
from sparse_unified.analysis.kept_inputs import KeptInputs
from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.analysis.sums import FfnSums, StatisticsConfig, hash_ffns
from sparse_unified.nn import SparseMoE
from sparse_unified.ops import composed
from sparse_unified.surgery.decoder import Adapter, Ffn, FfnKey, find_adapter


@dataclass(slots=True)
class _Running:
    """Sums of one FFN on its device: of all samples, and of the one that runs."""

    tokens: Tensor  # [R + 1] int64, on the CPU like everything that counts
    sum_abs: Tensor  # [R + 1, I] fp64
    sum_squares: Tensor
    num_fired: Tensor
    own_tokens: Tensor  # of the running sample
    own_sum_abs: Tensor
    sample_tokens: list[Tensor]
    active: list[Tensor]
    kept: KeptInputs


class Collector:
    """What `collect` yields: samples begin with `begin`; `statistics` gives the result."""

    def __init__(
        self, adapter: Adapter, task: str, config: StatisticsConfig, components: Sequence[str]
    ) -> None:
        self.adapter, self.task, self.config = adapter, task, config
        self.samples: list[str] = []
        self.ffns = {name: adapter.ffns(name) for name in components}
        self._range = 0
        self._sums: dict[tuple[str, FfnKey], _Running] = {}
        for component, ffns in self.ffns.items():
            for ffn in ffns:
                self._sums[component, ffn.key] = self._empty(ffn)

    def begin(self, sample: str) -> None:
        """Says that what runs from here on belongs to another sample.

        Args:
            sample: what it is told from others by, such as a fingerprint.

        Raises:
            ValueError: there was a sample of this name.
        """
        if sample in self.samples:
            raise ValueError(f"collect: samples must be distinct, got {sample!r} twice")
        self._finish_sample()
        self.samples.append(sample)
        for own in self._sums.values():
            own.kept.begin(sample)

    def set_time(self, time: float | None) -> None:
        """Says at which time of denoising the model runs; None for tokens that have none.

        Of BAGEL models it is read from their time embedder, and need not be said.
        """
        self._range = self.config.range_of(time)

    def observe(self, component: str, ffn: Ffn, x: Tensor) -> None:
        """Adds the tokens x [..., D] that a FFN is about to see.

        Raises:
            RuntimeError: no sample has begun.
        """
        if not self.samples:
            raise RuntimeError("collect: begin must be called before the model runs, got no sample")
        x = x.detach().reshape(-1, x.shape[-1])
        if not len(x):
            return
        importance = ops.ffn_importance if x.device.type == "cpu" else composed.ffn_importance
        gate, up = ffn.gate_proj, ffn.up_proj
        with torch.no_grad():
            sum_abs, sum_squares, num_fired = importance(
                x.to(gate.dtype), gate, up, self.config.threshold
            )
        own, at = self._sums[component, ffn.key], self._range
        own.own_tokens[at] += len(x)
        own.own_sum_abs[at] += sum_abs
        own.sum_squares[at] += sum_squares
        own.num_fired[at] += num_fired
        own.kept.add(x)

    def statistics(self) -> FfnStatistics:
        """Returns what was gathered, the running sample included; may be asked for repeatedly.

        Raises:
            ValueError: no FFN of a component saw a token, or a sum is not finite.
        """
        self._finish_sample()
        ffns: dict[str, dict[FfnKey, FfnSums]] = {}
        for component, listed in self.ffns.items():
            ffns[component] = {ffn.key: self._result(component, ffn) for ffn in listed}
        # Tasks leave components out: text-only understanding runs no gen FFN.
        seen = {
            component: keyed
            for component, keyed in ffns.items()
            if any(int(sums.tokens.sum()) for sums in keyed.values())
        }
        return FfnStatistics(
            model_hashes={component: hash_ffns(self.adapter, component) for component in seen},
            config=self.config,
            samples={self.task: tuple(self.samples)},
            ffns={self.task: seen},
        )

    def _empty(self, ffn: Ffn) -> _Running:
        ranges, device = self.config.num_ranges, ffn.gate_proj.device
        counts, sums = ((ranges,), (ranges, ffn.intermediate_size))
        return _Running(
            tokens=torch.zeros(counts, dtype=torch.int64),
            sum_abs=torch.zeros(sums, dtype=torch.float64, device=device),
            sum_squares=torch.zeros(sums, dtype=torch.float64, device=device),
            num_fired=torch.zeros(sums, dtype=torch.float64, device=device),
            own_tokens=torch.zeros(counts, dtype=torch.int64),
            own_sum_abs=torch.zeros(sums, dtype=torch.float64, device=device),
            sample_tokens=[],
            active=[],
            kept=KeptInputs(self.config.num_inputs, ffn.gate_proj.shape[1]),
        )

    def _finish_sample(self) -> None:
        for own in self._sums.values():
            if len(own.sample_tokens) == len(self.samples):
                continue  # finished before
            own.sample_tokens.append(own.own_tokens.clone())
            active = most_active(own.own_sum_abs, self.config.active_fraction).cpu()
            active[own.own_tokens == 0] = False
            own.active.append(pack_bits(active))
            own.tokens += own.own_tokens
            own.sum_abs += own.own_sum_abs
            own.own_tokens.zero_()
            own.own_sum_abs.zero_()

    def _result(self, component: str, ffn: Ffn) -> FfnSums:
        own = self._sums[component, ffn.key]
        ranges, width = self.config.num_ranges, ffn.intermediate_size
        empty = torch.zeros(0, ranges, (width + 7) // 8, dtype=torch.uint8)
        return FfnSums(
            tokens=own.tokens.clone(),
            sum_abs=own.sum_abs.to("cpu", copy=True),
            sum_squares=own.sum_squares.to("cpu", copy=True),
            num_fired=own.num_fired.to("cpu", copy=True),
            sample_tokens=torch.stack(own.sample_tokens) if own.sample_tokens else own.tokens[:0],
            active=torch.stack(own.active) if own.active else empty,
            inputs=own.kept.inputs.clone(),
            input_draws=own.kept.draws.clone(),
        )


@contextmanager
def collect(
    model: object,
    task: str,
    *,
    config: StatisticsConfig | None = None,
    components: Sequence[str] | None = None,
    adapter: Adapter | None = None,
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

    Raises:
        ValueError: no adapter fits, or a component is lacking.
    """
    adapter = find_adapter(model) if adapter is None else adapter
    collector = Collector(
        adapter,
        task,
        config or StatisticsConfig(),
        adapter.components if components is None else components,
    )
    with ExitStack() as hooks:
        for component, ffns in collector.ffns.items():
            by_module: dict[int, list[Ffn]] = {}
            for ffn in ffns:
                by_module.setdefault(id(ffn.module), []).append(ffn)
            for own in by_module.values():
                _observe_module(hooks, collector, component, own)
        observe_time(hooks, collector.set_time, model)
        yield collector


def _observe_module(
    hooks: ExitStack, collector: Collector, component: str, ffns: Sequence[Ffn]
) -> None:
    """Watches one module: an FFN, or a `SparseMoE` with all of its experts."""
    module = ffns[0].module

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = arguments[0] if arguments else next(iter(named.values()))
        if not isinstance(module, SparseMoE):
            for ffn in ffns:
                collector.observe(component, ffn, x)
            return
        with torch.no_grad():
            chosen = module.route(*arguments, **named)[2]
        tokens = x.detach().reshape(-1, x.shape[-1])
        routed = ffns[-module.num_experts :]
        for shared in ffns[: -module.num_experts]:
            collector.observe(component, shared, tokens)
        for ffn, rows in zip(routed, _rows(chosen, module.num_experts), strict=True):
            collector.observe(component, ffn, tokens[rows])

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    hooks.callback(handle.remove)


def _rows(chosen: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """Returns the tokens of each expert, ascending; reads the counts back once.

    Args:
        chosen: [T, K] experts of each token.
    """
    flat = chosen.flatten().long()
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    return (flat.argsort(stable=True) // chosen.shape[1]).split(counts)


def observe_time(hooks: ExitStack, set_time: Callable[[float | None], None], model: object) -> None:
    """Reads the time where a denoising model takes it: from its time embedder to its last layer.

    Args:
        hooks: what removes the hooks again. set_time: told each time, and None after the layers.
    """
    host: Any = next(
        (
            holder
            for holder in (model, getattr(model, "model", None))
            if isinstance(getattr(holder, "time_embedder", None), nn.Module)
        ),
        None,
    )
    if host is None:
        return
    decoder: nn.Module = host.language_model.model

    def embedding(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        set_time(float(arguments[0].reshape(-1)[0]))

    def decoded(*_: object) -> None:
        set_time(None)

    handles = (
        host.time_embedder.register_forward_pre_hook(embedding),
        decoder.register_forward_hook(decoded, always_call=True),
    )
    for handle in handles:
        hooks.callback(handle.remove)

# SPDX-License-Identifier: Apache-2.0
"""What the neurons of a model did on a task: sums over tokens, and who was active on each sample.

Everything is kept per task, component, FFN and *range* of the denoising time. Range 0 holds the
tokens that have no time: text, ViT tokens, and finished images (t = 0). Range r of R holds the
times ((r - 1) / R, r / R], 1 being noise.

A file is safetensors. Of each FFN, under the name `TASK.COMPONENT.LAYER` (then `.PATH` for one
expert of a mixture), it has the tensors of `FfnSums`; the metadata says where it comes from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_unified._common import list_some
from sparse_unified.analysis.active_sets import mean_overlap, successive_overlap
from sparse_unified.analysis.kept_inputs import keep_lowest, no_inputs
from sparse_unified.analysis.statistics_check import check_sums, walk
from sparse_unified.analysis.sums import (
    INPUT_TENSORS,
    TENSORS,
    FfnSums,
    StatisticsConfig,
    hash_ffns,
)
from sparse_unified.checkpoint import strict_json
from sparse_unified.checkpoint.atomic import replace_file
from sparse_unified.checkpoint.safetensors_file import read_header, read_tensor
from sparse_unified.checkpoint.sidecar import tool_version
from sparse_unified.checkpoint.writer import encode_tensors
from sparse_unified.surgery.decoder import FfnKey, find_adapter

FORMAT, FORMAT_VERSION = "sparse_unified.statistics", "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnStatistics:
    """Statistics of the FFNs of one model on one or several tasks.

    Attributes:
        model_hashes: component -> hash of its FFN weights, see `hash_ffns`.
        config: what was counted.
        samples: task -> fingerprints of its samples, in order.
        ffns: task -> component -> key -> sums.
        tool: name and version of what gathered them.

    Raises:
        ValueError: there are no tokens, a value is not finite, or shapes do not fit.
    """

    model_hashes: Mapping[str, str]
    config: StatisticsConfig
    samples: Mapping[str, tuple[str, ...]]
    ffns: Mapping[str, Mapping[str, Mapping[FfnKey, FfnSums]]]
    tool: str = field(default_factory=tool_version)

    def __post_init__(self) -> None:
        check_sums(self)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.ffns)

    def keys(self, task: str, component: str) -> list[FfnKey]:
        """Returns the keys of the FFNs, in the order of the rows of the tensors below."""
        return list(self._component(task, component))

    def mean_abs(self, task: str, component: str, key: FfnKey) -> Tensor:
        """Returns the mean of |h| over all tokens of a task, [I] fp64.

        Raises:
            ValueError: the FFN is not there, or has seen no token (an expert may not).
        """
        found = self._component(task, component)
        if key not in found:
            raise ValueError(f"statistics: FFN must be one of {list_some(found)}, got {key!r:.120}")
        tokens = int(found[key].tokens.sum())
        if not tokens:
            raise ValueError(
                f"statistics: {component} {key!r:.120} must have seen tokens of {task}, got none"
            )
        return found[key].sum_abs.sum(0) / tokens

    def inputs(self, component: str, tasks: Sequence[str] | None = None) -> dict[FfnKey, Tensor]:
        """Returns the inputs x [N, D] fp32 that are kept of each FFN, of all or some tasks.

        Raises:
            ValueError: there are none: config.num_inputs was 0, or an FFN saw no token.
        """
        chosen = [task for task in self.ffns if component in self.ffns[task]]
        chosen = chosen if tasks is None else list(tasks)
        parts = [self._component(task, component) for task in chosen]
        found = {
            key: torch.cat([own[key].inputs.float() for own in parts if key in own])
            for key in dict.fromkeys(key for own in parts for key in own)
        }
        lacking = [key for key, kept in found.items() if not len(kept)]
        if not found or lacking:
            raise ValueError(
                f"statistics: inputs of {component} must be kept, as calibrate does with --inputs "
                f"(num_inputs), got none for {list_some(lacking) if found else 'any FFN'} with "
                f"num_inputs = {self.config.num_inputs}"
            )
        return found

    def firing_rate(self, task: str, component: str) -> Tensor:
        """Returns the share of (token, neuron) that fire, [F, R + 1] fp64; NaN without tokens."""
        rates = [
            sums.num_fired.mean(1) / sums.tokens.double()  # 0 / 0 where there were none
            for sums in self._component(task, component).values()
        ]
        return torch.stack(rates)

    def sample_overlap(self, task: str, component: str) -> Tensor:
        """Returns the mean Jaccard overlap of the active sets of two samples, [F, R + 1] fp64.

        NaN where fewer than two samples have tokens. Two sets drawn at random, a share q of the
        neurons each, overlap by about q / (2 - q).
        """
        sums = self._component(task, component).values()
        return torch.stack([mean_overlap(one.active, one.sample_tokens > 0) for one in sums])

    def step_overlap(self, task: str, component: str) -> Tensor:
        """Returns the mean overlap of a sample's active sets in successive ranges of time.

        [F, R - 1] fp64, entry r - 1 for ranges r and r + 1; NaN where no sample has both.
        """
        sums = self._component(task, component).values()
        return torch.stack(
            [successive_overlap(one.active[:, 1:], one.sample_tokens[:, 1:] > 0) for one in sums]
        )

    def merge(self, *others: FfnStatistics) -> FfnStatistics:
        """Returns the statistics of all samples of all, as one pass over them would give them.

        Raises:
            ValueError: they are of another model or config, share a sample, or of one task have
                other FFNs.
        """
        merged = self
        for other in others:
            merged = _merge(merged, other)
        return merged

    def check(self, model: object) -> None:
        """Raises ValueError unless the statistics are of this model, judged by its FFNs.

        Args:
            model: a model, pipeline or adapter.
        """
        adapter = find_adapter(model)
        for task, components in self.ffns.items():
            for component, found in components.items():
                wanted = {ffn.key: ffn.intermediate_size for ffn in adapter.ffns(component)}
                where = f"statistics: {component} FFNs of {task}"
                if set(wanted) != set(found):
                    raise ValueError(
                        f"{where}: keys must be those of the model, {list_some(wanted)}, "
                        f"got {list_some(found)}"
                    )
                for key, width in wanted.items():
                    if found[key].intermediate_size != width:
                        raise ValueError(
                            f"{where}: {key!r:.120} must have {width} neurons as in the model, "
                            f"got {found[key].intermediate_size}"
                        )
        for component, wanted_hash in self.model_hashes.items():
            own = hash_ffns(adapter, component)
            if own != wanted_hash:
                raise ValueError(
                    f"statistics: model must have the {component} FFNs they were gathered on, with "
                    f"hash {wanted_hash}, got {own}"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file; an existing one is replaced whole or not at all."""
        tensors: dict[str, Tensor] = {}
        listed: list[tuple[str, str, int, str | None]] = []
        for task, component, key, sums in walk(self.ffns):
            layer, name = key if isinstance(key, tuple) else (key, None)
            listed.append((task, component, layer, name))
            for tensor in _tensors_of(self.config):
                tensors[f"{_prefix(*listed[-1])}.{tensor}"] = getattr(sums, tensor)
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "tool": self.tool,
            "model_hashes": json.dumps(dict(self.model_hashes)),
            "config": json.dumps(asdict(self.config)),
            "samples": json.dumps({task: list(own) for task, own in self.samples.items()}),
            "ffns": json.dumps(listed),
        }
        replace_file(Path(path), encode_tensors(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FfnStatistics:
        """Reads a file that `save` wrote.

        Raises:
            ValueError: it is missing, damaged, no statistics, of a later format, or holds NaN,
                infinities or no tokens.
        """
        header = read_header(path)
        form = header.metadata.get("format"), header.metadata.get("format_version")
        if form != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"{path}: format must be {FORMAT} {FORMAT_VERSION}, got {form!r:.120}")
        try:
            config = StatisticsConfig(**strict_json.loads(header.metadata["config"]))
            samples = {
                str(task): tuple(map(str, own))
                for task, own in strict_json.loads(header.metadata["samples"]).items()
            }
            listed = [_parse_entry(entry) for entry in strict_json.loads(header.metadata["ffns"])]
            hashes = strict_json.loads(header.metadata["model_hashes"])
            model_hashes = {str(component): str(own) for component, own in hashes.items()}
            tool = header.metadata["tool"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: metadata must be what calibrate writes, got {error!s:.400}"
            ) from error
        held = _tensors_of(config)
        names = [f"{_prefix(*entry)}.{tensor}" for entry in listed for tensor in held]
        missing, extra = set(names) - set(header.tensors), set(header.tensors) - set(names)
        if missing or extra or len(set(names)) != len(names):
            raise ValueError(
                f"{path}: tensors must be those that its metadata lists, got none of "
                f"{list_some(sorted(missing))} and also {list_some(sorted(extra))}"
            )
        ffns: dict[str, dict[str, dict[FfnKey, FfnSums]]] = {}
        for task, component, layer, name in listed:
            prefix = _prefix(task, component, layer, name)
            own = {
                tensor: read_tensor(header.tensors[f"{prefix}.{tensor}"], what=str(path))
                for tensor in held
            }
            if not config.num_inputs:
                own |= zip(INPUT_TENSORS, no_inputs(), strict=True)
            key = layer if name is None else (layer, name)
            ffns.setdefault(task, {}).setdefault(component, {})[key] = FfnSums(**own)
        try:
            return cls(
                model_hashes=model_hashes, config=config, samples=samples, ffns=ffns, tool=tool
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _component(self, task: str, component: str) -> Mapping[FfnKey, FfnSums]:
        for what, name, legal in (
            ("task", task, self.ffns),
            ("component", component, self.ffns.get(task, {})),
        ):
            if name not in legal:
                raise ValueError(
                    f"statistics: {what} must be one of {', '.join(legal)}, got {name!r:.120}"
                )
        return self.ffns[task][component]


def _merge(first: FfnStatistics, second: FfnStatistics) -> FfnStatistics:
    if first.config != second.config:
        raise ValueError(f"merge: config must be the same, {first.config}, got {second.config}")
    for component in first.model_hashes.keys() & second.model_hashes.keys():
        hashes = [s.model_hashes[component] for s in (first, second)]
        if hashes[0] != hashes[1]:
            raise ValueError(
                f"merge: model must be the same, with hash {hashes[0]} of its {component} FFNs, "
                f"got {hashes[1]}"
            )
    for task in first.ffns.keys() & second.ffns.keys():
        twice = set(first.samples[task]) & set(second.samples[task])
        if twice:
            raise ValueError(
                f"merge: samples of {task} must be distinct, got {list_some(sorted(twice))} twice"
            )
        keys = [[entry[1:3] for entry in walk({task: s.ffns[task]})] for s in (first, second)]
        if keys[0] != keys[1]:
            raise ValueError(
                f"merge: FFNs of {task} must be the same, {list_some(keys[0])}, "
                f"got {list_some(keys[1])}"
            )
    samples: dict[str, tuple[str, ...]] = {}
    ffns: dict[str, Any] = {}
    for task in dict.fromkeys([*first.ffns, *second.ffns]):
        sources = [s for s in (first, second) if task in s.ffns]
        samples[task] = tuple(name for s in sources for name in s.samples[task])
        ffns[task] = {
            component: {
                key: _add([s.ffns[task][component][key] for s in sources], first.config)
                for key in keyed
            }
            for component, keyed in sources[0].ffns[task].items()
        }
    return FfnStatistics(
        model_hashes={**first.model_hashes, **second.model_hashes},
        config=first.config,
        samples=samples,
        ffns=ffns,
    )


def _tensors_of(config: StatisticsConfig) -> list[str]:
    """Names the tensors of an FFN that a file holds."""
    return [name for name in TENSORS if config.num_inputs or name not in INPUT_TENSORS]


def _add(parts: Sequence[FfnSums], config: StatisticsConfig) -> FfnSums:
    summed = {
        name: torch.stack([getattr(part, name) for part in parts]).sum(0)
        for name in ("tokens", "sum_abs", "sum_squares", "num_fired")
    }
    listed = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("sample_tokens", "active")
    }
    inputs, draws = (torch.cat([getattr(part, name) for part in parts]) for name in INPUT_TENSORS)
    kept = keep_lowest(inputs, draws, config.num_inputs)
    return FfnSums(**summed, **listed, inputs=kept[0], input_draws=kept[1])


def _prefix(task: str, component: str, layer: int, name: str | None) -> str:
    return ".".join([task, component, str(layer), *([] if name is None else [name])])


def _parse_entry(entry: Any) -> tuple[str, str, int, str | None]:
    task, component, layer, name = entry
    if not (isinstance(task, str) and isinstance(component, str) and type(layer) is int):
        raise ValueError(f"the FFN {entry!r:.120}")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"the FFN {entry!r:.120}")
    return task, component, layer, name

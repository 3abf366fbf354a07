# SPDX-License-Identifier: Apache-2.0
"""What the neurons of a model did on a task: sums over tokens, and active neurons per sample.

Statistics are kept per task, component, FFN and *range* of the denoising time. Range 0 holds the
tokens without a time: text, ViT tokens, and finished images (t = 0). Range r of R holds the times
((r - 1) / R, r / R], 1 being noise.

A file is safetensors. It holds the tensors of `FfnSums` of each FFN, under `TASK.COMPONENT.LAYER`
(then `.PATH` for one expert of a mixture); the metadata says where they come from.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import list_some, naming
from sparse_unified.analysis.activation import mean_overlap, successive_overlap
from sparse_unified.checkpoint import Checkpoint, keys
from sparse_unified.checkpoint.files import loads_strict
from sparse_unified.checkpoint.safetensors_io import (
    TensorSpec,
    load_tensors,
    read_tensor,
    save_tensors,
)
from sparse_unified.checkpoint.sidecar import tool_version
from sparse_unified.surgery.decoder import FfnKey, find_adapter

FORMAT, FORMAT_VERSION = "sparse_unified.statistics", "1"
NO_TIME = "no time"  # text, ViT tokens, finished images

# Files of a config that keeps no inputs do not have these.
_INPUT_TENSORS = ("inputs", "input_draws")
_HASHED = 256  # values of each weight that its hash looks at


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsConfig:
    """What is counted.

    Args:
        threshold: a neuron fires on a token when |h| is above.
        active_fraction: the active set of a sample is this share of the neurons, those of the
            largest mean |h|.
        num_time_ranges: R, into how many ranges the times of denoising are cut.
        num_inputs: number of tokens of a task, drawn at random, whose FFN inputs are kept.

    Raises:
        ValueError: a value is out of range.
    """

    threshold: float = 0.1
    active_fraction: float = 0.25
    num_time_ranges: int = 4
    num_inputs: int = 0

    def __post_init__(self) -> None:
        for name, kinds, is_legal, rule in (
            ("threshold", (int, float), lambda x: 0 <= x < math.inf, "finite and at least 0"),
            ("active_fraction", (int, float), lambda x: 0 < x < 1, "above 0 and below 1"),
            ("num_time_ranges", (int,), lambda x: x >= 1, "an integer of at least 1"),
            ("num_inputs", (int,), lambda x: x >= 0, "an integer of at least 0"),
        ):
            value = getattr(self, name)
            if type(value) not in kinds or not is_legal(value):
                raise ValueError(f"StatisticsConfig: {name} must be {rule}, got {value!r}")

    @property
    def num_ranges(self) -> int:
        """R + 1, the range without a time among them."""
        return self.num_time_ranges + 1

    def range_of(self, time: float | None) -> int:
        """Returns the range of a time from 0 to 1, or of tokens without one."""
        return 0 if not time else min(math.ceil(time * self.num_time_ranges), self.num_time_ranges)

    def range_names(self) -> list[str]:
        """Returns a name for each range: `NO_TIME`, then its times from image to noise."""
        count = self.num_time_ranges
        return [NO_TIME, *(f"{r / count:.3g}-{(r - 1) / count:.3g}" for r in range(1, count + 1))]


class Kind(NamedTuple):
    """A tensor of `FfnSums`.

    Attributes:
        shape: a letter a dimension: R ranges, I neurons, B bytes of I bits, S samples, T tokens
            whose inputs are kept, D hidden.
        is_summed: merging adds it; else it joins it along the first dimension.
    """

    dtype: torch.dtype
    shape: str
    is_summed: bool = False


# In the order of a file.
TENSORS: Mapping[str, Kind] = {
    "tokens": Kind(torch.int64, "R", is_summed=True),
    "sum_abs": Kind(torch.float64, "RI", is_summed=True),
    "sum_squares": Kind(torch.float64, "RI", is_summed=True),
    "num_fired": Kind(torch.float64, "RI", is_summed=True),
    "sample_tokens": Kind(torch.int64, "SR"),
    "active": Kind(torch.uint8, "SRB"),
    "inputs": Kind(torch.bfloat16, "TD"),
    "input_draws": Kind(torch.int64, "T"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnSums:
    """Sums of one FFN of I neurons on one task, over R + 1 ranges and S samples.

    Attributes:
        tokens: [R + 1] int64.
        sum_abs: [R + 1, I] fp64, of |h|.
        sum_squares: [R + 1, I] fp64, of h^2.
        num_fired: [R + 1, I] fp64, of the tokens that fire.
        sample_tokens: [S, R + 1] int64.
        active: [S, R + 1, ceil(I / 8)] uint8, the active set of each sample, a bit per neuron.
        inputs: [n, D] bf16, what the FFN was given on the n tokens that are kept.
        input_draws: [n] int64, ascending: what those were drawn by, the lowest of all tokens.
    """

    tokens: Tensor
    sum_abs: Tensor
    sum_squares: Tensor
    num_fired: Tensor
    sample_tokens: Tensor
    active: Tensor
    inputs: Tensor
    input_draws: Tensor

    @property
    def intermediate_size(self) -> int:
        return self.sum_abs.shape[1]

    def mean_abs(self) -> Tensor:
        """Returns the mean of |h| over all tokens, [I] fp64.

        Raises:
            ValueError: there was no token; an expert may have none.
        """
        if not self.tokens.sum():
            raise ValueError("tokens must be at least one, got none")
        return self.sum_abs.sum(0) / self.tokens.sum()

    def firing_rate(self) -> Tensor:
        """Returns the share of (token, neuron) that fire, [R + 1] fp64; NaN without tokens."""
        return self.num_fired.mean(1) / self.tokens.double()

    def sample_overlap(self) -> Tensor:
        """Returns the mean Jaccard overlap of the active sets of two samples, [R + 1] fp64.

        NaN where fewer than two samples have tokens. Two sets drawn at random, a share q of the
        neurons each, overlap by about q / (2 - q).
        """
        return mean_overlap(self.active, self.sample_tokens > 0)

    def step_overlap(self) -> Tensor:
        """Returns the mean overlap of a sample's active sets in successive ranges of time.

        [R - 1] fp64, entry r - 1 for ranges r and r + 1; NaN where no sample has both.
        """
        return successive_overlap(self.active[:, 1:], self.sample_tokens[:, 1:] > 0)

    def check(self, config: StatisticsConfig, num_samples: int) -> None:
        """Raises ValueError that names the first tensor that is not as `TENSORS` says."""
        width = [0, *self.sum_abs.shape][-1]
        sizes = {
            "R": config.num_ranges,
            "I": width,
            "B": (width + 7) // 8,
            "S": num_samples,
            "T": min(config.num_inputs, int(self.tokens.sum())),
            "D": [0, *self.inputs.shape][-1],
        }
        for name, kind in TENSORS.items():
            tensor, shape = getattr(self, name), [sizes[letter] for letter in kind.shape]
            if tensor.dtype != kind.dtype or list(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must be {kind.dtype} of shape {shape}, "
                    f"got {tensor.dtype} of {list(tensor.shape)}"
                )
            illegal = (~torch.isfinite(tensor) | ((tensor < 0) & (name != "inputs"))).nonzero()
            if len(illegal):
                at = illegal[0].tolist()
                rule = "finite" if name == "inputs" else "finite and at least 0"
                raise ValueError(f"{name} must be {rule}, got {tensor[tuple(at)].item()} at {at}")


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
        if not self.ffns or self.ffns.keys() != self.samples.keys():
            raise ValueError(
                f"statistics: tasks must be those of the samples, {list_some(self.samples)}, "
                f"got {list_some(self.ffns)}"
            )
        components = {component for own in self.ffns.values() for component in own}
        if components != set(self.model_hashes):
            raise ValueError(
                f"statistics: model_hashes must be of {list_some(sorted(components))}, "
                f"got {list_some(sorted(self.model_hashes))}"
            )
        tokens: dict[str, int] = dict.fromkeys(self.ffns, 0)
        for task, component, key, sums in self._walk():
            with naming(f"statistics: {task}.{component} {key!r:.120}"):
                sums.check(self.config, len(self.samples[task]))
            tokens[task] += int(sums.tokens.sum())
        idle = [task for task, count in tokens.items() if not count]
        if idle:
            raise ValueError(
                f"statistics: tokens of {list_some(idle)} must be at least one, got none"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.ffns)

    def of(self, task: str, component: str) -> Mapping[FfnKey, FfnSums]:
        """Returns the sums of the FFNs of a component in a task; ValueError if it has none."""
        components = self.ffns.get(task, {})
        for what, name, legal in (("task", task, self.ffns), ("component", component, components)):
            if name not in legal:
                raise ValueError(
                    f"statistics: {what} must be one of {', '.join(legal)}, got {name!r:.120}"
                )
        return components[component]

    def inputs(self, component: str, tasks: Sequence[str] | None = None) -> dict[FfnKey, Tensor]:
        """Returns the inputs x [N, D] fp32 that are kept of each FFN, of all or some tasks.

        Raises:
            ValueError: there are none: config.num_inputs was 0, or an FFN saw no token.
        """
        chosen = [task for task in self.ffns if component in self.ffns[task]]
        found: dict[FfnKey, list[Tensor]] = {}
        for task in chosen if tasks is None else tasks:
            for key, sums in self.of(task, component).items():
                found.setdefault(key, []).append(sums.inputs.float())
        inputs = {key: torch.cat(parts) for key, parts in found.items()}
        lacking = [key for key, kept in inputs.items() if not len(kept)]
        if not inputs or lacking:
            raise ValueError(
                f"statistics: inputs of {component} must be kept, as calibrate does with --inputs "
                f"(num_inputs), got none for {list_some(lacking) if inputs else 'any FFN'} with "
                f"num_inputs = {self.config.num_inputs}"
            )
        return inputs

    def activation_maps(self, task: str) -> list[dict[str, Any]]:
        """Returns plain values per component that show how its neurons fire in a task, for JSON.

        Of L layers (of a mixture, the mean over its experts), None where there were no tokens:

            ranges   names of the C ranges that have tokens, from noise to image, then `NO_TIME`
            firing   [L][C] share of the neurons that fire on a token, 0 to 1
            overlap  [L] share of the active neurons that two samples have in common (Jaccard), the
                     mean over the ranges
            steps    [L] the same of one sample in successive ranges of time
            chance   what sets drawn at random would overlap by
        """
        columns = [*range(self.config.num_time_ranges, 0, -1), 0]
        names, fraction = self.config.range_names(), self.config.active_fraction
        maps = []
        for component, keyed in self.ffns.get(task, {}).items():
            by_layer: dict[int, list[FfnSums]] = {}  # one, or one per expert
            for key, sums in keyed.items():
                by_layer.setdefault(key if isinstance(key, int) else key[0], []).append(sums)
            layers = sorted(by_layer)
            firing, overlap, steps = (
                torch.stack(
                    [
                        torch.stack([number(sums) for sums in by_layer[layer]]).nanmean(0)
                        for layer in layers
                    ]
                )
                for number in (
                    lambda sums: sums.firing_rate()[columns],
                    lambda sums: sums.sample_overlap().nanmean(),
                    lambda sums: sums.step_overlap().nanmean(),
                )
            )
            seen = (~firing.isnan().all(0)).nonzero()[:, 0]
            maps.append(
                {
                    "component": component,
                    "layers": layers,
                    "ranges": [names[columns[i]] for i in seen.tolist()],
                    "firing": plain(firing[:, seen]),
                    "overlap": plain(overlap),
                    "steps": plain(steps),
                    "chance": fraction / (2 - fraction),
                }
            )
        return maps

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
        for component in self.model_hashes:
            self._check_hash(component, hash_ffns(model, component))

    def check_checkpoint(self, checkpoint: Checkpoint, component: str) -> None:
        """Raises ValueError unless the statistics are of the FFNs in a model directory.

        Args:
            checkpoint: its FFNs of the component are dense; it is read, not loaded.
        """
        if component not in self.model_hashes:
            raise ValueError(
                f"statistics: component must be one of {', '.join(self.model_hashes)}, "
                f"got {component!r}"
            )
        specs = {
            layer: [checkpoint.spec(keys.dense_key(component, layer, p)) for p in keys.PROJECTIONS]
            for layer in checkpoint.ffns.get(component, {})
        }
        self._check_hash(
            component,
            _hash((key, [_read_spaced(spec) for spec in own]) for key, own in specs.items()),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file; an existing one is replaced whole or not at all."""
        tensors: dict[str, Tensor] = {}
        listed: list[_Entry] = []
        for task, component, key, sums in self._walk():
            listed.append((task, component, *(key if isinstance(key, tuple) else (key, None))))
            for name in _stored(self.config):
                tensors[f"{_prefix(listed[-1])}.{name}"] = getattr(sums, name)
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "tool": self.tool,
            "model_hashes": json.dumps(dict(self.model_hashes)),
            "config": json.dumps(asdict(self.config)),
            "samples": json.dumps({task: list(own) for task, own in self.samples.items()}),
            "ffns": json.dumps(listed),
        }
        save_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FfnStatistics:
        """Reads a file that `save` wrote.

        Raises:
            ValueError: it is missing, damaged, no statistics, of a later format, or holds NaN,
                infinities or no tokens.
        """
        header = load_tensors(path, kind=FORMAT, version=FORMAT_VERSION)
        meta = header.metadata
        try:
            fields = ("config", "samples", "ffns", "model_hashes")
            found = {name: loads_strict(meta[name]) for name in fields}
            config = StatisticsConfig(**found["config"])
            samples = {task: tuple(map(str, own)) for task, own in found["samples"].items()}
            listed = [_parse_entry(entry) for entry in found["ffns"]]
            model_hashes = {component: str(own) for component, own in found["model_hashes"].items()}
            tool = meta["tool"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: metadata must be what calibrate writes, got {error!s:.400}"
            ) from error
        stored = _stored(config)
        names = [f"{_prefix(entry)}.{name}" for entry in listed for name in stored]
        if sorted(names) != sorted(header.tensors):
            differing = sorted(set(names) ^ set(header.tensors))
            raise ValueError(
                f"{path}: tensors must be those of its metadata, each once, "
                f"got a difference in {list_some(differing)}"
            )
        ffns: dict[str, dict[str, dict[FfnKey, FfnSums]]] = {}
        for entry in listed:
            task, component, layer, name = entry
            tensors = {
                tensor: read_tensor(header.tensors[f"{_prefix(entry)}.{tensor}"], what=str(path))
                for tensor in stored
            }
            if not config.num_inputs:
                tensors |= zip(_INPUT_TENSORS, no_inputs(), strict=True)
            key = layer if name is None else (layer, name)
            ffns.setdefault(task, {}).setdefault(component, {})[key] = FfnSums(**tensors)
        with naming(path):
            return cls(
                model_hashes=model_hashes, config=config, samples=samples, ffns=ffns, tool=tool
            )

    def _walk(self) -> Iterator[tuple[str, str, FfnKey, FfnSums]]:
        for task, components in self.ffns.items():
            for component, keyed in components.items():
                for key, sums in keyed.items():
                    yield task, component, key, sums

    def _check_hash(self, component: str, own: str) -> None:
        if own != self.model_hashes[component]:
            raise ValueError(
                f"statistics: model must have the {component} FFNs they were gathered on, with "
                f"hash {self.model_hashes[component]}, got {own}"
            )


def plain(values: Tensor) -> Any:
    """Returns a tensor as numbers or lists of them, None for NaN, for JSON."""
    if values.ndim:
        return [plain(row) for row in values]
    return None if values.isnan() else values.item()


def hash_ffns(model: object, component: str) -> str:
    """Returns a hash of the FFN weights of one component, 16 hex digits.

    Of every weight it takes the shape and evenly spaced values, rounded to bf16, so that a model
    has one hash whether it was loaded in fp32 or bf16; it reads little, and two models that differ
    in a few values alone may have the same.

    Args:
        model: a model, pipeline or adapter.
    """
    return _hash(
        (
            ffn.key,
            [
                (w.shape, w.reshape(-1)[:: _step(w.numel())])
                for w in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)
            ],
        )
        for ffn in find_adapter(model).ffns(component)
    )


def hash_model(model: torch.nn.Module) -> str:
    """Returns a hash of names, shapes, dtypes and evenly spaced values of all weights."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        values = weight.detach().reshape(-1)[:: _step(weight.numel())]
        digest.update(values.to("cpu", torch.float64).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def no_inputs(hidden_size: int = 0) -> tuple[Tensor, Tensor]:
    """Returns the inputs [0, D] and draws [0] of an FFN of which none are kept."""
    inputs = torch.empty(0, hidden_size, dtype=torch.bfloat16)
    return inputs, torch.empty(0, dtype=torch.int64)


def keep_lowest(inputs: Tensor, draws: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the inputs [n, D] of the `count` lowest draws [n], and these, ascending."""
    draws, order = draws.sort(stable=True)
    return inputs[order[:count]].clone(), draws[:count].clone()


def _merge(first: FfnStatistics, second: FfnStatistics) -> FfnStatistics:
    pairs: dict[str, tuple[object, object]] = {"config": (first.config, second.config)}
    for component in first.model_hashes.keys() & second.model_hashes.keys():
        pairs[f"hash of the {component} FFNs"] = (
            first.model_hashes[component],
            second.model_hashes[component],
        )
    for task in first.ffns.keys() & second.ffns.keys():
        keys_of = [[entry[:3] for entry in s._walk() if entry[0] == task] for s in (first, second)]
        pairs[f"FFNs of {task}"] = (keys_of[0], keys_of[1])
        twice = set(first.samples[task]) & set(second.samples[task])
        if twice:
            raise ValueError(
                f"merge: samples of {task} must be distinct, got {list_some(sorted(twice))} twice"
            )
    for what, (own, other) in pairs.items():
        if own != other:
            raise ValueError(f"merge: {what} must be the same, {own!s:.240}, got {other!s:.240}")
    samples: dict[str, tuple[str, ...]] = {}
    ffns: dict[str, dict[str, dict[FfnKey, FfnSums]]] = {}
    for source in (first, second):
        for task, own in source.samples.items():
            samples[task] = samples.get(task, ()) + own
        for task, component, key, sums in source._walk():
            keyed = ffns.setdefault(task, {}).setdefault(component, {})
            keyed[key] = _add(keyed[key], sums, first.config) if key in keyed else sums
    return FfnStatistics(
        model_hashes={**first.model_hashes, **second.model_hashes},
        config=first.config,
        samples=samples,
        ffns=ffns,
    )


def _add(first: FfnSums, second: FfnSums, config: StatisticsConfig) -> FfnSums:
    added = {}
    for name, kind in TENSORS.items():
        a, b = getattr(first, name), getattr(second, name)
        added[name] = a + b if kind.is_summed else torch.cat([a, b])
    kept = keep_lowest(added["inputs"], added["input_draws"], config.num_inputs)
    return FfnSums(**added | dict(zip(_INPUT_TENSORS, kept, strict=True)))


# The FFN of a file: task, component, layer, and its path if it is one expert of a mixture.
_Entry = tuple[str, str, int, str | None]


def _stored(config: StatisticsConfig) -> list[str]:
    """Names the tensors of an FFN that a file holds."""
    return [name for name in TENSORS if config.num_inputs or name not in _INPUT_TENSORS]


def _prefix(entry: _Entry) -> str:
    return ".".join(str(part) for part in entry if part is not None)


def _parse_entry(entry: Any) -> _Entry:
    task, component, layer, name = entry
    texts = (task, component, *([] if name is None else [name]))
    if not all(isinstance(text, str) for text in texts) or type(layer) is not int:
        raise ValueError(f"the FFN {entry!r:.120}")
    return task, component, layer, name


def _step(count: int) -> int:
    """Returns how far apart the values lie that a hash looks at, of a weight of `count`."""
    return max(1, count // _HASHED)


def _hash(ffns: Iterable[tuple[FfnKey, Sequence[tuple[Sequence[int], Tensor]]]]) -> str:
    """Hashes (key, (shape, spaced values) of each weight) of FFNs."""
    digest = hashlib.sha256()
    for key, weights in ffns:
        digest.update(f"{key!r}".encode())
        for shape, values in weights:
            digest.update(f" {list(shape)}".encode())
            rounded = values.bfloat16().cpu().view(torch.int16)
            digest.update(rounded.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_spaced(spec: TensorSpec) -> tuple[Sequence[int], Tensor]:
    """Reads the pages of a file that hold the values a hash looks at."""
    count = math.prod(spec.shape)
    words = {2: np.int16, 4: np.int32, 8: np.int64}[spec.dtype.itemsize]
    mapped = np.memmap(spec.file, words, "r", spec.start, (count,))
    return spec.shape, torch.from_numpy(mapped[:: _step(count)].copy()).view(spec.dtype)

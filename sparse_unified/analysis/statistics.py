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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import check_int, check_number, context, list_some, naming
from sparse_unified.checkpoint import Checkpoint, keys
from sparse_unified.checkpoint.files import loads_strict, open_source
from sparse_unified.checkpoint.safetensors_io import (
    TensorSpec,
    as_bytes,
    load_tensors,
    read_bytes,
    read_tensor,
    save_tensors,
)
from sparse_unified.checkpoint.sidecar import tool_version
from sparse_unified.surgery.decoder import FfnKey, find_adapter

FORMAT, FORMAT_VERSION = "sparse_unified.statistics", "1"
NO_TIME = "no time"  # text, ViT tokens, finished images

# The tensors of `FfnSums` in the order of a file, with a letter for each dimension: R ranges, I
# neurons, B bytes of I bits, S samples, T tokens whose inputs are kept, D hidden.
TENSORS = {
    "tokens": (torch.int64, "R"),
    "sum_abs": (torch.float64, "RI"),
    "sum_squares": (torch.float64, "RI"),
    "num_fired": (torch.float64, "RI"),
    "sample_tokens": (torch.int64, "SR"),
    "active": (torch.uint8, "SRB"),
    "inputs": (torch.bfloat16, "TD"),
    "input_draws": (torch.int64, "T"),
}
SUMMED = ("tokens", "sum_abs", "sum_squares", "num_fired")  # when merged; others are joined
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
    """

    threshold: float = 0.1
    active_fraction: float = 0.25
    num_time_ranges: int = 4
    num_inputs: int = 0

    def __post_init__(self) -> None:
        with context("StatisticsConfig"):
            check_number("threshold", self.threshold, 0)
            check_number("active_fraction", self.active_fraction, 0, 1)
            check_int("num_time_ranges", self.num_time_ranges, 1)
            check_int("num_inputs", self.num_inputs, 0)

    def range_of(self, time: float | None) -> int:
        """Returns the range of a time from 0 to 1, or of tokens without one."""
        return 0 if not time else min(math.ceil(time * self.num_time_ranges), self.num_time_ranges)

    def range_names(self) -> list[str]:
        """Returns a name for each range: `NO_TIME`, then its times from image to noise."""
        count = self.num_time_ranges
        return [NO_TIME, *(f"{r / count:.3g}-{(r - 1) / count:.3g}" for r in range(1, count + 1))]


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

    def mean_abs(self) -> Tensor:
        """Returns the mean of |h| over all tokens, [I] fp64; ValueError if there was none."""
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

    def merge(self, other: FfnSums, config: StatisticsConfig) -> FfnSums:
        """Returns the sums over the samples of both."""
        made = {}
        for name in TENSORS:
            own, others = getattr(self, name), getattr(other, name)
            made[name] = own + others if name in SUMMED else torch.cat([own, others])
        return replace(
            FfnSums(**made),
            **keep_lowest(made["inputs"], made["input_draws"], config.num_inputs),
        )

    def check(self, config: StatisticsConfig, num_samples: int) -> None:
        """Raises ValueError that names the first tensor that is not as `TENSORS` says."""
        width = [0, *self.sum_abs.shape][-1]
        sizes = {
            "R": config.num_time_ranges + 1,
            "I": width,
            "B": (width + 7) // 8,
            "S": num_samples,
            "T": min(config.num_inputs, int(self.tokens.sum())),
            "D": [0, *self.inputs.shape][-1],
        }
        for name, (dtype, letters) in TENSORS.items():
            tensor, shape = getattr(self, name), [sizes[letter] for letter in letters]
            if tensor.dtype != dtype or list(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must be {dtype} of shape {shape}, "
                    f"got {tensor.dtype} of {list(tensor.shape)}"
                )
            legal = torch.isfinite(tensor) & ((tensor >= 0) | (name == "inputs"))
            if not legal.all():
                raise ValueError(
                    f"{name} must be finite{'' if name == 'inputs' else ' and at least 0'}, "
                    f"got {tensor[~legal][0].item()}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnStatistics:
    """Statistics of the FFNs of one model on one or several tasks; `calibrate` gathers them.

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
        components = {component for own in self.ffns.values() for component in own}
        for name, found, wanted in (
            ("tasks", set(self.samples), set(self.ffns)),
            ("model_hashes", set(self.model_hashes), components),
        ):
            if found != wanted:
                raise ValueError(
                    f"statistics: {name} must be of {list_some(sorted(wanted))}, "
                    f"got {list_some(sorted(found))}"
                )
        tokens: dict[str, int] = dict.fromkeys(self.ffns, 0)
        for task, component, key, sums in self._walk():
            with naming(f"statistics: {task}.{component} {key!r:.120}"):
                sums.check(self.config, len(self.samples[task]))
            tokens[task] += int(sums.tokens.sum())
        if not tokens or not all(tokens.values()):
            raise ValueError(f"statistics: tokens must be at least one a task, got {tokens}")

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.ffns)

    def of(self, task: str, component: str) -> Mapping[FfnKey, FfnSums]:
        """Returns the sums of the FFNs of a component in a task; ValueError if it has none."""
        components = self.ffns.get(task, {})
        if component not in components:
            raise ValueError(
                f"statistics: task must be one of {list_some(self.ffns)} with component "
                f"{component}, got {task!r:.120} with {list_some(components)}"
            )
        return components[component]

    def inputs(self, component: str, tasks: Sequence[str] | None = None) -> dict[FfnKey, Tensor]:
        """Returns the inputs x [N, D] fp32 that are kept of each FFN, of all or some tasks.

        ValueError if there are none: config.num_inputs was 0, or an FFN saw no token.
        """
        found: dict[FfnKey, list[Tensor]] = {}
        for task in [t for t in self.ffns if component in self.ffns[t]] if tasks is None else tasks:
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
            layers: dict[int, list[FfnSums]] = {}  # one FFN, or one per expert
            for key, sums in keyed.items():
                layers.setdefault(key if isinstance(key, int) else key[0], []).append(sums)

            def means(
                number: Callable[[FfnSums], Tensor], layers: dict[int, list[FfnSums]] = layers
            ) -> Tensor:
                rows = [torch.stack([number(sums) for sums in own]) for own in layers.values()]
                return torch.stack([row.nanmean(0) for row in rows])

            firing = means(lambda sums: sums.firing_rate()[columns])
            seen = (~firing.isnan().all(0)).nonzero()[:, 0]
            maps.append(
                {
                    "component": component,
                    "layers": list(layers),
                    "ranges": [names[columns[i]] for i in seen.tolist()],
                    "firing": plain(firing[:, seen]),
                    "overlap": plain(means(lambda sums: sums.sample_overlap().nanmean())),
                    "steps": plain(means(lambda sums: sums.step_overlap().nanmean())),
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
            merged = merged._add(other)
        return merged

    def _add(self, other: FfnStatistics) -> FfnStatistics:
        hashes = {**self.model_hashes, **other.model_hashes}
        for what, own, others in (
            ("config", self.config, other.config),
            ("model_hashes", {**hashes, **self.model_hashes}, hashes),
        ):
            if own != others:
                raise ValueError(f"merge: {what} must be the same, {own}, got {others}")
        samples, ffns = dict(self.samples), {t: dict(own) for t, own in self.ffns.items()}
        for task, names in other.samples.items():
            if twice := set(names) & set(samples.get(task, ())):
                raise ValueError(f"merge: samples of {task} must differ, got {list_some(twice)}")
            samples[task] = samples.get(task, ()) + names
        for task, component, key, sums in other._walk():
            keyed = ffns.setdefault(task, {}).get(component, {})
            added = keyed[key].merge(sums, self.config) if key in keyed else sums
            ffns[task][component] = {**keyed, key: added}
        # Where one has other FFNs in a task, the samples of an FFN are not as many as the task's.
        with context("merge"):
            return FfnStatistics(
                model_hashes=hashes, config=self.config, samples=samples, ffns=ffns
            )

    def check(self, model: object) -> None:
        """Raises ValueError unless these are of a model, pipeline or adapter, by its FFNs."""
        for component in self.model_hashes:
            self._check_hash(component, hash_ffns(model, component))

    def check_checkpoint(self, checkpoint: Checkpoint, component: str) -> None:
        """Raises ValueError unless these are of the dense FFNs in a model directory."""
        layers = checkpoint.ffns.get(component, {})
        specs = (
            (n, [checkpoint.spec(keys.dense_key(component, n, p)) for p in keys.PROJECTIONS])
            for n in layers
        )
        self._check_hash(component, _hash((n, map(_read_spaced, own)) for n, own in specs))

    def _check_hash(self, component: str, own: str) -> None:
        if own != (known := self.model_hashes.get(component)):
            raise ValueError(
                f"statistics: model must have the {component} FFNs they were gathered on, with "
                f"hash {known}, got {own}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file; an existing one is replaced whole or not at all."""
        tensors: dict[str, Tensor] = {}
        entries = []
        for task, component, key, sums in self._walk():
            entry = (task, component, *(key if isinstance(key, tuple) else (key, None)))
            entries.append(entry)
            for name in _stored(self.config):
                tensors[_tensor_name(entry, name)] = getattr(sums, name)
        described = {
            "model_hashes": dict(self.model_hashes),
            "config": asdict(self.config),
            "samples": {task: list(own) for task, own in self.samples.items()},
            "ffns": entries,
        }
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "tool": self.tool}
        metadata |= {name: json.dumps(value) for name, value in described.items()}
        save_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FfnStatistics:
        """Reads a file that `save` wrote; ValueError if it is damaged or something else."""
        header = load_tensors(path, kind=FORMAT, version=FORMAT_VERSION)
        ffns: dict[str, dict[str, dict[FfnKey, FfnSums]]] = {}
        try:
            names = ("config", "samples", "ffns", "model_hashes")
            found = {name: loads_strict(header.metadata[name]) for name in names}
            config = StatisticsConfig(**found["config"])
            for task, component, layer, part in found["ffns"]:
                if type(layer) is not int:
                    raise TypeError(f"layer {layer!r:.80}")
                tensors = {
                    name: read_tensor(
                        header.tensors[_tensor_name((task, component, layer, part), name)]
                    )
                    for name in _stored(config)
                }
                keyed = ffns.setdefault(task, {}).setdefault(component, {})
                keyed[layer if part is None else (layer, part)] = FfnSums(**(no_inputs() | tensors))
            if len(header.tensors) != len(found["ffns"]) * len(_stored(config)):
                raise ValueError("tensors of other FFNs")
            return cls(
                model_hashes={c: str(own) for c, own in found["model_hashes"].items()},
                config=config,
                samples={task: tuple(map(str, own)) for task, own in found["samples"].items()},
                ffns=ffns,
                tool=header.metadata["tool"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: must be as calibrate writes it, got {error!s:.400}"
            ) from error

    def _walk(self) -> Iterator[tuple[str, str, FfnKey, FfnSums]]:
        for task, components in self.ffns.items():
            for component, keyed in components.items():
                for key, sums in keyed.items():
                    yield task, component, key, sums


def _stored(config: StatisticsConfig) -> list[str]:
    """Names the tensors of an FFN that a file holds."""
    return [name for name in TENSORS if config.num_inputs or not name.startswith("input")]


def _tensor_name(entry: Iterable[object], name: str) -> str:
    return ".".join([*(str(part) for part in entry if part is not None), name])


def plain(values: Tensor) -> Any:
    """Returns a tensor as numbers or lists of them, None for NaN, for JSON."""
    if values.ndim:
        return [plain(row) for row in values]
    return None if values.isnan() else values.item()


# Inputs that are kept


def no_inputs(hidden_size: int = 0) -> dict[str, Tensor]:
    """Returns the inputs [0, D] and draws [0] of an FFN of which none are kept."""
    inputs = torch.empty(0, hidden_size, dtype=torch.bfloat16)
    return {"inputs": inputs, "input_draws": torch.empty(0, dtype=torch.int64)}


def keep_lowest(inputs: Tensor, draws: Tensor, count: int) -> dict[str, Tensor]:
    """Returns the inputs [n, D] of the `count` lowest draws [n], and these, ascending."""
    draws, order = draws.sort(stable=True)
    return {"inputs": inputs[order[:count]].clone(), "input_draws": draws[:count].clone()}


# Hashes of weights: shapes, and evenly spaced values


def hash_ffns(model: object, component: str) -> str:
    """Returns a hash of the FFN weights of one component, 16 hex digits.

    Of every weight it takes the shape and evenly spaced values, rounded to bf16, so that a model
    has one hash whether it was loaded in fp32 or bf16; it reads little, and two models that differ
    in a few values alone may have the same.
    """
    return _hash(
        (ffn.key, [_spaced(w) for w in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)])
        for ffn in find_adapter(model).ffns(component)
    )


def hash_model(model: torch.nn.Module) -> str:
    """Returns a hash of names, shapes, dtypes and evenly spaced values of all weights."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        shape, values = _spaced(weight.detach())
        digest.update(f"{name} {shape} {weight.dtype}".encode())
        digest.update(values.to("cpu", torch.float64).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


_Spaced = tuple[list[int], Tensor]  # the shape of a weight, and its spaced values


def _hash(ffns: Iterable[tuple[FfnKey, Iterable[_Spaced]]]) -> str:
    digest = hashlib.sha256()
    for key, weights in ffns:
        digest.update(f"{key!r}".encode())
        for shape, values in weights:
            digest.update(f" {shape}".encode())
            rounded = values.bfloat16().cpu().view(torch.int16)
            digest.update(rounded.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _spaced(weight: Tensor) -> _Spaced:
    return list(weight.shape), weight.reshape(-1)[:: max(1, weight.numel() // _HASHED)]


def _read_spaced(spec: TensorSpec) -> _Spaced:
    """Reads the spaced values from a file, one by one."""
    count, size = math.prod(spec.shape), spec.dtype.itemsize
    places = range(0, count, max(1, count // _HASHED))
    values = torch.empty(len(places), dtype=spec.dtype)
    with open_source(spec.file, spec.stamp) as stream:
        for value, place in zip(values, places, strict=True):
            read_bytes(stream, spec.start + place * size, as_bytes(value))
    return list(spec.shape), values


# Sets of active neurons, as bits, and how much they have in common


def pack_bits(mask: Tensor) -> Tensor:
    """bool [..., I] -> uint8 [..., ceil(I / 8)], neuron i in bit i % 8 of byte i // 8."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def unpack_bits(packed: Tensor, size: int | None = None) -> Tensor:
    """uint8 [..., bytes] -> bool [..., size]; None is all bits."""
    bits = np.unpackbits(packed.numpy(), axis=-1, count=size, bitorder="little")
    return torch.from_numpy(bits).bool()


def most_active(values: Tensor, fraction: float) -> Tensor:
    """Marks the max(1, round(fraction * I)) largest of [..., I], lower indices in ties, as bool."""
    count = max(1, round(fraction * values.shape[-1]))
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def mean_overlap(active: Tensor, seen: Tensor) -> Tensor:
    """Mean Jaccard overlap |a & b| / |a | b| of the sets of all pairs of samples.

    Packed sets [S, R, bytes], and which of them count, [S, R] bool -> [R] fp64, NaN where fewer
    than two sets count.
    """
    means = []
    for column in range(active.shape[1]):
        sets = unpack_bits(active[seen[:, column], column]).double()
        common, sizes = sets @ sets.t(), sets.sum(1)  # [S, S], [S]
        jaccard = common / (sizes[:, None] + sizes - common)
        means.append(jaccard[torch.ones_like(jaccard, dtype=torch.bool).triu(1)].mean())
    return torch.stack(means)


def successive_overlap(active: Tensor, seen: Tensor) -> Tensor:
    """Mean Jaccard overlap of the sets of one sample in successive ranges.

    Packed sets [S, R, bytes], and which of them count, [S, R] bool -> [R - 1] fp64, NaN where no
    sample has both sets.
    """
    sets, both = unpack_bits(active), seen[:, :-1] & seen[:, 1:]
    common = (sets[:, :-1] & sets[:, 1:]).sum(2).double()
    jaccard = common / (sets[:, :-1] | sets[:, 1:]).sum(2)
    return jaccard.where(both, torch.nan).nanmean(0)  # [S, R - 1] -> [R - 1]

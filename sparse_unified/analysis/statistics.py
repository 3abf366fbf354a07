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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_unified._common import StrPath, check_int, check_number, context, list_some, naming
from sparse_unified.checkpoint import Checkpoint, safetensors_io
from sparse_unified.checkpoint.files import loads_strict
from sparse_unified.checkpoint.modes import TOOL
from sparse_unified.checkpoint.scores import hash_stored_ffns, spaced
from sparse_unified.surgery.decoder import FfnKey, hash_ffns

FORMAT, FORMAT_VERSION = "sparse_unified.statistics", "1"
NO_TIME = "no time"  # text, ViT tokens, finished images

# The tensors of `FfnSums` in the order of a file, with a letter for each dimension: R ranges of
# time and the one without, I neurons, B bytes of I bits, S samples, T tokens whose inputs are kept,
# D hidden.
TENSORS = {
    "tokens": (torch.int64, "R"),
    "sum_abs": (torch.float64, "RI"),  # of |h|
    "sum_squares": (torch.float64, "RI"),  # of h^2
    "num_fired": (torch.float64, "RI"),  # of the tokens that fire
    "sample_tokens": (torch.int64, "SR"),
    "active": (torch.uint8, "SRB"),  # the active set of each sample, a bit per neuron
    "inputs": (torch.bfloat16, "TD"),  # what the FFN was given on the tokens that are kept
    "input_draws": (torch.int64, "T"),  # ascending: what those were drawn by, the lowest of all
}
SUMMED = ("tokens", "sum_abs", "sum_squares", "num_fired")  # when merged; others are joined


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

    def range_names(self) -> list[str]:
        """Returns a name for each range: `NO_TIME`, then its times from image to noise."""
        count = self.num_time_ranges
        return [NO_TIME, *(f"{r / count:.3g}-{(r - 1) / count:.3g}" for r in range(1, count + 1))]


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnSums:
    """Sums of one FFN of I neurons on one task, over R + 1 ranges and S samples: see `TENSORS`."""

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
            raise ValueError(
                "tokens must be at least one, got none; run it on more samples, fit routers that "
                "leave an expert out (convert --router-init activation), or rank by magnitude, "
                "which needs no tokens"
            )
        return self.sum_abs.sum(0) / self.tokens.sum()

    def firing_rate(self) -> Tensor:
        """Returns the share of (token, neuron) that fire, [R + 1] fp64; NaN without tokens."""
        return self.num_fired.mean(1) / self.tokens.double()

    def sample_overlap(self) -> Tensor:
        """Returns the mean Jaccard overlap of the active sets of two samples, [R + 1] fp64.

        NaN where fewer than two samples have tokens. Two sets drawn at random, a share q of the
        neurons each, overlap by about q / (2 - q).
        """
        means = []
        for column, seen in enumerate((self.sample_tokens > 0).unbind(1)):
            sets = unpack_bits(self.active[seen, column]).double()
            common, sizes = sets @ sets.t(), sets.sum(1)  # [S, S], [S]
            first, second = torch.triu_indices(len(sets), len(sets), 1)
            means.append((common / (sizes[:, None] + sizes - common))[first, second].mean())
        return torch.stack(means)

    def never_and_always(self) -> tuple[Tensor, Tensor]:
        """Returns the shares of neurons in the active set of no sample, and of every one, [R + 2].

        Of each range, and last of all of them: active at no time, and at every time. NaN where
        fewer than two samples have tokens.
        """
        never, always, ranges = [], [], list(range(len(self.tokens)))
        for columns in (*([column] for column in ranges), ranges):
            seen = self.sample_tokens[:, columns] > 0
            sets = unpack_bits(self.active[:, columns][seen])[:, : self.sum_abs.shape[1]]
            count = sets.sum(0)
            is_known = 1.0 if seen.any(1).sum() > 1 else math.nan
            never.append((count == 0).double().mean() * is_known)
            always.append((count == len(sets)).double().mean() * is_known)
        return torch.stack(never), torch.stack(always)

    def step_overlap(self) -> Tensor:
        """Returns the mean overlap of a sample's active sets in successive ranges of time.

        [R - 1] fp64, entry r - 1 for ranges r and r + 1; NaN where no sample has both.
        """
        sets, seen = unpack_bits(self.active[:, 1:]), self.sample_tokens[:, 1:] > 0
        common = (sets[:, :-1] & sets[:, 1:]).sum(2).double()
        jaccard = common / (sets[:, :-1] | sets[:, 1:]).sum(2)
        return jaccard.where(seen[:, :-1] & seen[:, 1:], torch.nan).nanmean(0)

    def merge(self, other: FfnSums, config: StatisticsConfig) -> FfnSums:
        """Returns the sums over the samples of both."""
        made = {}
        for name in TENSORS:
            own, more = getattr(self, name), getattr(other, name)
            made[name] = own + more if name in SUMMED else torch.cat([own, more])
        kept = keep_lowest(made["inputs"], made["input_draws"], config.num_inputs)
        return FfnSums(**made | kept)

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
            own = f"{tensor.dtype} of {list(tensor.shape)}"
            if own != f"{dtype} of {shape}":
                raise ValueError(f"{name} must be {dtype} of shape {shape}, got {own}")
            legal = torch.isfinite(tensor) & ((tensor >= 0) | (name == "inputs"))
            if not legal.all():
                rule = "finite" if name == "inputs" else "finite and at least 0"
                raise ValueError(f"{name} must be {rule}, got {tensor[~legal][0].item()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnStatistics:
    """Statistics of the FFNs of one model on one or several tasks; `calibrate` gathers them.

    Attributes:
        model_hashes: component -> hash of its FFN weights, see `hash_ffns`.
        config: what was counted.
        samples: task -> fingerprints of its samples, in order.
        ffns: (task, component, key of the FFN) -> sums; `of` gives those of a component.
        tool: name and version of what gathered them.

    Raises:
        ValueError: there are no tokens, a value is not finite, or shapes do not fit.
    """

    model_hashes: Mapping[str, str]
    config: StatisticsConfig
    samples: Mapping[str, tuple[str, ...]]
    ffns: Mapping[tuple[str, str, FfnKey], FfnSums]
    tool: str = TOOL

    def __post_init__(self) -> None:
        tokens = dict.fromkeys(self.samples, 0)
        for (task, component, key), sums in self.ffns.items():
            with naming(f"statistics: {task}.{component} {key!r:.120}"):
                if task not in tokens or component not in self.model_hashes:
                    known = list_some((*tokens, *self.model_hashes))
                    raise ValueError(f"task and component must be of {known}, got others")
                sums.check(self.config, len(self.samples[task]))
            tokens[task] += int(sums.tokens.sum())
        if not tokens or not all(tokens.values()):
            raise ValueError(f"statistics: tokens must be at least one a task, got {tokens}")

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.samples)

    def components(self, task: str) -> list[str]:
        """Returns the components that have tokens in a task."""
        return list(dict.fromkeys(component for own, component, _ in self.ffns if own == task))

    def of(self, task: str, component: str) -> dict[FfnKey, FfnSums]:
        """Returns the sums of the FFNs of a component in a task; ValueError if it has none."""
        found = {key: sums for (*of, key), sums in self.ffns.items() if of == [task, component]}
        if not found:
            raise ValueError(
                f"statistics: task must be one of {list_some(self.tasks)} with component "
                f"{component}, got {task!r:.120} with {list_some(self.components(task))}"
            )
        return found

    def inputs(self, component: str, tasks: Sequence[str] | None = None) -> dict[FfnKey, Tensor]:
        """Returns the inputs x [N, D] fp32 that are kept of each FFN, of all or some tasks.

        ValueError if there are none: config.num_inputs was 0, or an FFN saw no token.
        """
        found: dict[FfnKey, list[Tensor]] = {}
        having = [task for task in self.tasks if component in self.components(task)]
        for task in having if tasks is None else tasks:
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
            never_by_time, always_by_time  [L][C] share of the neurons that are among the active
                     ones of no sample, and of every sample
            never_at_any_time, always_at_all_times  [L] the same over all ranges together
        """
        columns = [*range(self.config.num_time_ranges, 0, -1), 0]
        names, fraction = self.config.range_names(), self.config.active_fraction
        maps = []
        for component in self.components(task):
            layers: dict[int, list[list[Tensor]]] = {}  # of one FFN, or of each expert
            for key, sums in self.of(task, component).items():
                overlaps = (sums.sample_overlap(), sums.step_overlap())
                own = [sums.firing_rate()[columns], *(overlap.nanmean() for overlap in overlaps)]
                own += [shares[[*columns, -1]] for shares in sums.never_and_always()]
                layers.setdefault(key if isinstance(key, int) else key[0], []).append(own)
            parts = [zip(*own, strict=True) for own in layers.values()]
            means = [[torch.stack(values).nanmean(0) for values in own] for own in parts]
            firing, overlap, steps, never, always = map(torch.stack, zip(*means, strict=True))
            seen = (~firing.isnan().all(0)).nonzero()[:, 0]
            maps.append(
                {
                    "component": component,
                    "layers": list(layers),
                    "ranges": [names[columns[i]] for i in seen.tolist()],
                    "firing": plain(firing[:, seen]),
                    "overlap": plain(overlap),
                    "steps": plain(steps),
                    "chance": fraction / (2 - fraction),
                    "never_by_time": plain(never[:, seen]),
                    "always_by_time": plain(always[:, seen]),
                    "never_at_any_time": plain(never[:, -1]),
                    "always_at_all_times": plain(always[:, -1]),
                }
            )
        return maps

    @context("merge")
    def merge(self, *others: FfnStatistics) -> FfnStatistics:
        """Returns the statistics of all samples of all, as one pass over them would give them.

        Raises:
            ValueError: they are of another model or config, share a sample, or of one task have
                other FFNs.
        """
        hashes, samples, ffns = dict(self.model_hashes), dict(self.samples), dict(self.ffns)
        for other in others:
            known = {**other.model_hashes, **hashes}
            hashes |= other.model_hashes
            if (self.config, known) != (other.config, hashes):
                raise ValueError(
                    f"config and model_hashes must be the same, {self.config} and {known}, "
                    f"got {other.config} and {hashes}"
                )
            for task, names in other.samples.items():
                if twice := set(names) & set(samples.get(task, ())):
                    raise ValueError(f"samples of {task} must differ, got {list_some(twice)}")
                samples[task] = samples.get(task, ()) + names
            for key, sums in other.ffns.items():
                ffns[key] = ffns[key].merge(sums, self.config) if key in ffns else sums
        # Where one has other FFNs in a task, the samples of an FFN are not as many as the task's.
        return replace(self, model_hashes=hashes, samples=samples, ffns=ffns)

    def check(self, model: object, component: str | None = None) -> None:
        """Raises ValueError unless these are of a model, by the FFNs of one component or all.

        That is a model, pipeline or adapter, or the `Checkpoint` of a directory.
        """
        hash_of: Any = hash_stored_ffns if isinstance(model, Checkpoint) else hash_ffns
        for name in self.model_hashes if component is None else [component]:
            if (own := hash_of(model, name)) != (known := self.model_hashes.get(name)):
                raise ValueError(
                    f"statistics: model must have the {name} FFNs they were gathered on, with "
                    f"hash {known}, got {own}"
                )

    def save(self, path: StrPath) -> None:
        """Writes the file; an existing one is replaced whole or not at all."""
        entries, tensors = [], {}
        for (*of, key), sums in self.ffns.items():
            entries.append((*of, *(key if isinstance(key, tuple) else (key, None))))
            for name in _stored(self.config):
                tensors[_tensor_name(entries[-1], name)] = getattr(sums, name)
        described = {
            "model_hashes": dict(self.model_hashes),
            "config": asdict(self.config),
            "samples": dict(self.samples),
            "ffns": entries,
        }
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "tool": self.tool}
        metadata |= {name: json.dumps(value) for name, value in described.items()}
        safetensors_io.save_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: StrPath) -> FfnStatistics:
        """Reads a file that `save` wrote; ValueError if it is damaged or something else."""
        header = safetensors_io.load_tensors(path, kind=FORMAT, version=FORMAT_VERSION)
        ffns: dict[tuple[str, str, FfnKey], FfnSums] = {}
        try:
            names = ("config", "samples", "ffns", "model_hashes")
            found = {name: loads_strict(header.metadata[name]) for name in names}
            config = StatisticsConfig(**found["config"])
            stored = _stored(config)
            for entry in found["ffns"]:
                task, component, layer, part = entry
                if type(layer) is not int:
                    raise TypeError(f"layer {layer!r:.80}")
                specs = {name: header.tensors[_tensor_name(entry, name)] for name in stored}
                read = {name: safetensors_io.read_tensor(spec) for name, spec in specs.items()}
                key = layer if part is None else (layer, part)
                ffns[task, component, key] = FfnSums(**no_inputs() | read)
            if len(header.tensors) != len(found["ffns"]) * len(stored):
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


def unpack_bits(packed: Tensor) -> Tensor:
    """uint8 [..., B] -> bool [..., 8 * B], neuron i from bit i % 8 of byte i // 8."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, bitorder="little")).bool()


def no_inputs(hidden_size: int = 0) -> dict[str, Tensor]:
    """Returns the inputs [0, D] and draws [0] of an FFN of which none are kept."""
    inputs = torch.empty(0, hidden_size, dtype=torch.bfloat16)
    return {"inputs": inputs, "input_draws": torch.empty(0, dtype=torch.int64)}


def keep_lowest(inputs: Tensor, draws: Tensor, count: int) -> dict[str, Tensor]:
    """Returns the inputs [n, D] of the `count` lowest draws [n], and these, ascending."""
    draws, order = draws.sort(stable=True)
    return {"inputs": inputs[order[:count]].clone(), "input_draws": draws[:count].clone()}


# Hashes of weights: shapes, and evenly spaced values


def hash_model(model: torch.nn.Module) -> str:
    """Returns a hash of names, shapes, dtypes and evenly spaced values of all weights."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        shape, values = spaced(weight.detach())
        digest.update(f"{name} {shape} {weight.dtype}".encode())
        digest.update(values.to("cpu", torch.float64).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

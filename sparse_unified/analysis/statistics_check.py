# SPDX-License-Identifier: Apache-2.0
"""What statistics must be, whoever made them: shapes, dtypes, finite values, at least one token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from sparse_unified._common import list_some
from sparse_unified.analysis.sums import TENSORS, FfnSums
from sparse_unified.surgery.decoder import FfnKey

if TYPE_CHECKING:
    from sparse_unified.analysis.statistics import FfnStatistics


def walk(
    ffns: Mapping[str, Mapping[str, Mapping[FfnKey, FfnSums]]],
) -> Iterator[tuple[str, str, FfnKey, FfnSums]]:
    """Yields (task, component, key, sums) of every FFN."""
    for task, components in ffns.items():
        for component, keyed in components.items():
            for key, sums in keyed.items():
                yield task, component, key, sums


def check_sums(statistics: FfnStatistics) -> None:
    """Raises ValueError that names the first FFN and tensor that is not as it must be."""
    where = "statistics"
    num_ranges = statistics.config.num_ranges
    tokens: dict[str, int] = dict.fromkeys(statistics.ffns, 0)
    if not tokens or tokens.keys() != statistics.samples.keys():
        raise ValueError(
            f"{where}: tasks must be those of the samples, {list_some(statistics.samples)}, "
            f"got {list_some(tokens)}"
        )
    components = {component for own in statistics.ffns.values() for component in own}
    if components != set(statistics.model_hashes):
        raise ValueError(
            f"{where}: model_hashes must be of {list_some(sorted(components))}, "
            f"got {list_some(sorted(statistics.model_hashes))}"
        )
    for task, component, key, sums in walk(statistics.ffns):
        what = f"{where}: {task}.{component} {key!r:.120}"
        num_samples, width = len(statistics.samples[task]), sums.sum_abs.shape[-1]
        shapes = {
            "tokens": [num_ranges],
            "sum_abs": [num_ranges, width],
            "sum_squares": [num_ranges, width],
            "num_fired": [num_ranges, width],
            "sample_tokens": [num_samples, num_ranges],
            "active": [num_samples, num_ranges, (width + 7) // 8],
        }
        kept = min(statistics.config.num_inputs, int(sums.tokens.sum()))
        shapes |= {"inputs": [kept, sums.inputs.shape[-1]], "input_draws": [kept]}
        for name, dtype in TENSORS.items():
            tensor = getattr(sums, name)
            if tensor.dtype != dtype or list(tensor.shape) != shapes[name]:
                raise ValueError(
                    f"{what}: {name} must be {dtype} of shape {shapes[name]}, "
                    f"got {tensor.dtype} of {list(tensor.shape)}"
                )
            if name == "active":
                continue
            legal = torch.isfinite(tensor.double())
            if name != "inputs":
                legal &= tensor >= 0
            bad = torch.nonzero(~legal)
            if len(bad):
                at = tuple(bad[0].tolist())
                rule = "finite" if name == "inputs" else "finite and at least 0"
                raise ValueError(
                    f"{what}: {name} must be {rule}, got {tensor[at].item()} at {list(at)}"
                )
        tokens[task] += int(sums.tokens.sum())
    idle = [task for task, count in tokens.items() if not count]
    if idle:
        raise ValueError(
            f"{where}: statistics of {list_some(idle)} must be gathered on at least one token, "
            "got none"
        )

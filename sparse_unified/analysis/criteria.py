# SPDX-License-Identifier: Apache-2.0
"""Criteria: how important each neuron of a FFN is, from its weights and what it did on a task."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from sparse_unified._common import naming
from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.checkpoint.atomic import replace_file
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.checkpoint.writer import encode_tensors
from sparse_unified.experts import check_scores, magnitude_scores, random_scores
from sparse_unified.surgery.decoder import Ffn, FfnKey, find_adapter

NeuronScores = dict[str, dict[FfnKey, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """A way to rank neurons.

    Attributes:
        name: how it is asked for.
        formula: what it computes, for people.
        needs_statistics: whether it looks at what neurons did.
        score: (FFN, mean |h| [I] or None, seed) -> scores [I].
    """

    name: str
    formula: str
    needs_statistics: bool
    score: Callable[[Ffn, Tensor | None, int], Tensor]


def _activation(ffn: Ffn, mean_abs: Tensor | None, seed: int) -> Tensor:
    assert mean_abs is not None
    return mean_abs


def _wanda(ffn: Ffn, mean_abs: Tensor | None, seed: int) -> Tensor:
    assert mean_abs is not None
    return mean_abs * _column_norms(ffn.down_proj)


def _reference(ffn: Ffn, mean_abs: Tensor | None, seed: int) -> Tensor:
    # NOTE: the fault of the official code, kept for comparison: on packed 2-D input its mean runs
    # over neurons too, so every neuron gets the same number, and the column norm alone ranks.
    assert mean_abs is not None
    return mean_abs.mean() * _column_norms(ffn.down_proj)


def _magnitude(ffn: Ffn, mean_abs: Tensor | None, seed: int) -> Tensor:
    return magnitude_scores(ffn.gate_proj, ffn.up_proj, ffn.down_proj)


def _random(ffn: Ffn, mean_abs: Tensor | None, seed: int) -> Tensor:
    if ffn.is_expert:  # several in a layer, each with its own draw
        seed += int.from_bytes(hashlib.sha256(ffn.name.encode()).digest()[:6], "little")
    return random_scores(ffn.intermediate_size, seed=seed, layer=ffn.layer)


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        criterion.name: criterion
        for criterion in (
            Criterion(
                name="activation",
                formula="mean |h|",
                needs_statistics=True,
                score=_activation,
            ),
            Criterion(
                name="wanda",
                formula="mean |h| * norm of the down_proj column",
                needs_statistics=True,
                score=_wanda,
            ),
            Criterion(
                name="magnitude",
                formula="norms of gate row * up row * down column",
                needs_statistics=False,
                score=_magnitude,
            ),
            Criterion(
                name="random",
                formula="uniform, by seed",
                needs_statistics=False,
                score=_random,
            ),
            Criterion(
                name="reference",
                formula="mean |h| over tokens and neurons * norm of the down_proj column",
                needs_statistics=True,
                score=_reference,
            ),
        )
    }
)


def find_criterion(criterion: str | Criterion) -> Criterion:
    """Returns a criterion by its name; ValueError names the legal ones."""
    if isinstance(criterion, Criterion):
        return criterion
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: name must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    return CRITERIA[criterion]


def score(
    criterion: str | Criterion,
    model: object,
    statistics: FfnStatistics | None = None,
    *,
    tasks: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
    seed: int = 0,
) -> NeuronScores:
    """Scores every neuron; the larger, the more important.

    Args:
        criterion: a name of `CRITERIA`, or one of your own.
        model: a model, pipeline or adapter.
        statistics: of this very model; for criteria that need none, None.
        tasks: whose means are averaged, one like the other; None is all that the statistics hold.
        components: None is all of the statistics, or of the model without any.
        seed: of the criterion `random`.

    Returns:
        component -> key of the FFN (its layer; (layer, path) for experts) -> scores [I] fp32 on the
        CPU, as `apply_moe_`, `prune_width_` and, through `save_scores`, `convert` take them.

    Raises:
        ValueError: the criterion is unknown, statistics are missing or of another model, or a FFN
            has seen no token.
    """
    chosen, adapter = find_criterion(criterion), find_adapter(model)
    if chosen.needs_statistics and statistics is None:
        raise ValueError(f"{chosen.name}: statistics must be given, got none")
    used: Sequence[str] = ()
    if statistics is not None:
        statistics.check(adapter)
        used = statistics.tasks if tasks is None else tasks
        if not used:
            raise ValueError(f"{chosen.name}: tasks must name at least one, got none")
    if components is None:
        components = (
            adapter.components if not used or statistics is None else _common(statistics, used)
        )
    scores: NeuronScores = {}
    for component in components:
        scores[component] = {}
        for ffn in adapter.ffns(component):
            mean_abs = None
            if chosen.needs_statistics and statistics is not None:
                means = [statistics.mean_abs(task, component, ffn.key) for task in used]
                mean_abs = torch.stack(means).mean(0)
            own = chosen.score(ffn, mean_abs, seed).to("cpu", torch.float32)
            with naming(f"{chosen.name}: {ffn.name}"):
                check_scores(own, ffn.intermediate_size)
            scores[component][ffn.key] = own
    return scores


def save_scores(
    path: str | os.PathLike[str], scores: Mapping[str, Mapping[FfnKey, Tensor]]
) -> None:
    """Writes scores as a file that `convert` and `prune` take with `--scores`.

    Of a sparse layer, the scores of its experts are joined in expert order, the shared one first.

    Raises:
        ValueError: there are none, or a component is not one of a checkpoint.
    """
    tensors: dict[str, Tensor] = {}
    for component, keyed in scores.items():
        if component not in FFN_NAMES:
            raise ValueError(
                f"{path}: component must be one of {', '.join(FFN_NAMES)}, got {component!r}"
            )
        for layer, own in join_experts(keyed).items():
            tensors[f"{component}.{layer}"] = own
    if not tensors:
        raise ValueError(f"{path}: scores must be given for at least one layer, got none")
    replace_file(Path(path), encode_tensors(tensors))


def join_experts(scores: Mapping[FfnKey, Tensor]) -> dict[int, Tensor]:
    """Returns scores by layer, [I]: of experts in expert order, the shared one first."""
    parts: dict[int, list[tuple[bool, Tensor]]] = {}
    for key, own in scores.items():
        layer, name = (key, "") if isinstance(key, int) else key
        parts.setdefault(layer, []).append((name.rpartition(".")[2].isdigit(), own))
    return {
        layer: torch.cat([own for _, own in sorted(found, key=lambda part: part[0])])
        for layer, found in parts.items()
    }


def _common(statistics: FfnStatistics, tasks: Sequence[str]) -> list[str]:
    """Components that every task has."""
    for task in tasks:
        if task not in statistics.ffns:
            raise ValueError(
                f"statistics: task must be one of {', '.join(statistics.tasks)}, got {task!r}"
            )
    first, *others = (statistics.ffns[task] for task in tasks)
    return [component for component in first if all(component in other for other in others)]


def _column_norms(down_proj: Tensor) -> Tensor:
    """L2 norm of each column of [D, I], fp64 on the CPU."""
    squares = torch.zeros(down_proj.shape[1], dtype=torch.float64, device=down_proj.device)
    for rows in down_proj.split(64):
        squares += rows.double().square().sum(0)
    return squares.sqrt().cpu()

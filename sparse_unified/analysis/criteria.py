# SPDX-License-Identifier: Apache-2.0
"""Criteria: how important each neuron of a FFN is, from its weights and what it did on a task."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparse_unified._common import list_some, naming
from sparse_unified.analysis.statistics import FfnStatistics
from sparse_unified.checkpoint.keys import FFN_NAMES
from sparse_unified.checkpoint.safetensors_io import save_tensors
from sparse_unified.experts.keep import check_scores, column_norms, magnitude_scores, random_scores
from sparse_unified.surgery.decoder import Ffn, FfnKey, find_adapter
from sparse_unified.surgery.temporary import join_experts

NeuronScores = dict[str, dict[FfnKey, Tensor]]
Criterion = Callable[[Ffn, Callable[[], Tensor], int], Tensor]


def _random(ffn: Ffn, mean_abs: Callable[[], Tensor], seed: int) -> Tensor:
    if ffn.is_expert:  # several in a layer, each with its own draw
        seed += int.from_bytes(hashlib.sha256(ffn.name.encode()).digest()[:6], "little")
    return random_scores(ffn.intermediate_size, seed=seed, layer=ffn.layer)


def _column_norms(down_proj: Tensor) -> Tensor:
    return column_norms(down_proj, torch.float64).cpu()


# A criterion maps (FFN, function that returns the mean of |h| [I] fp64, seed) to scores [I]; the
# larger, the more important. One that never asks for the mean needs no statistics.
CRITERIA: Mapping[str, Criterion] = {
    "activation": lambda ffn, mean_abs, seed: mean_abs(),
    "wanda": lambda ffn, mean_abs, seed: mean_abs() * _column_norms(ffn.down_proj),
    "magnitude": lambda ffn, mean_abs, seed: magnitude_scores(
        ffn.gate_proj, ffn.up_proj, ffn.down_proj
    ),
    "random": _random,
    # NOTE: the fault of the official code, kept for comparison: on packed 2-D input its mean runs
    # over neurons too, so every neuron gets the same number, and the column norm alone ranks.
    "reference": lambda ffn, mean_abs, seed: mean_abs().mean() * _column_norms(ffn.down_proj),
}


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

        scores = score("wanda", model, statistics)
        prune_width_(model, PruneWidthConfig(component="gen", keep_ratio=0.5), scores["gen"])

    Args:
        criterion: a name of `CRITERIA`, or a function such as those there.
        model: a model, pipeline or adapter.
        statistics: of this very model; for criteria that need none, None.
        tasks: their means are averaged, with equal weights; None is all that the statistics hold.
        components: None is all of the statistics, or of the model without any.
        seed: of the criterion `random`.

    Returns:
        component -> key of the FFN (its layer; (layer, path) for experts) -> scores [I] fp32 on the
        CPU, as `apply_moe_`, `prune_width_` and, through `save_scores`, `convert` take them.

    Raises:
        ValueError: statistics are missing or of another model, or a FFN has seen no token.
    """
    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "score")
    chosen = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
    if chosen is None:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {name!r}")
    adapter = find_adapter(model)
    used: Sequence[str] = ()
    if statistics is not None:
        statistics.check(adapter)
        used = statistics.tasks if tasks is None else tasks
        if not used or not set(used) <= set(statistics.tasks):
            legal = ", ".join(statistics.tasks)
            raise ValueError(f"{name}: tasks must be of {legal}, got {list_some(used)}")
        if components is None:
            first, *others = map(statistics.components, used)
            components = [c for c in first if all(c in held for held in others)]

    def mean_abs(ffn: Ffn) -> Tensor:
        ffns = statistics.ffns if statistics is not None else {}
        sums = [ffns.get((task, ffn.component, ffn.key)) for task in used]
        if not sums or None in sums:
            raise ValueError("statistics must be given of it, got none")
        return torch.stack([own.mean_abs() for own in sums if own]).mean(0)

    scores: NeuronScores = {}
    for component in adapter.components if components is None else components:
        scores[component] = {}
        for ffn in adapter.ffns(component):
            with naming(f"{name}: {ffn.name}"):
                own = chosen(ffn, partial(mean_abs, ffn), seed).to("cpu", torch.float32)
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
    if not set(scores) <= set(FFN_NAMES):
        raise ValueError(
            f"{path}: component must be one of {', '.join(FFN_NAMES)}, got {', '.join(scores)}"
        )
    joined = {component: join_experts(keyed) for component, keyed in scores.items()}
    tensors = {f"{c}.{layer}": own for c, layers in joined.items() for layer, own in layers.items()}
    if not tensors:
        raise ValueError(f"{path}: scores must be given for at least one layer, got none")
    save_tensors(Path(path), tensors)

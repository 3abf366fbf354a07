# SPDX-License-Identifier: Apache-2.0
"""What decides between the neurons, or the groups of heads, of a file: scores, a seed, weights.

Where scores come from: see `experts.scores`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparse_unified._common import naming
from sparse_unified.checkpoint.model_dir import Checkpoint
from sparse_unified.checkpoint.scores import HEADS, Scores, given_scores
from sparse_unified.experts import random_scores
from sparse_unified.experts.scores import check_scores
from sparse_unified.surgery.cuts import head_magnitudes, neuron_magnitudes

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def ranking(
    source: Checkpoint,
    component: str,
    layers: Sequence[int],
    *,
    heads: bool = False,
    scores: Scores | None,
    seed: int | None,
) -> tuple[Callable[[int], Tensor], str]:
    """Returns a function from layer to scores, [I] in expert order or [G], and their origin.

    Given scores are checked at once; without them and without a seed of random ones, weights are
    ranked by magnitude, when they are asked for. `heads`: groups of heads in the place of neurons.
    """
    if scores is not None and seed is not None:
        raise ValueError(f"scores and seed must not both be given, got seed {seed}")
    if seed is not None and type(seed) is not int:
        raise ValueError(f"seed must be an integer, got {seed!r:.120}")
    shapes = source.shapes[component]
    sizes = {n: len(shapes[n].query_groups) if heads else shapes[n].width for n in layers}
    given = given_scores(scores, component + HEADS * heads, sizes, source.num_layers)
    if given is not None:
        if isinstance(scores, str | os.PathLike):
            return given.__getitem__, f"file {Path(scores).name}"
        return given.__getitem__, "given"
    if seed is not None:
        return lambda n: random_scores(sizes[n], seed=seed, layer=n), f"random, seed {seed}"

    def read(key: str) -> Tensor:
        tensor = source.read(key)
        return tensor if tensor.dtype in _DTYPES else tensor.float()

    def magnitudes(layer: int) -> Tensor:
        with naming(f"{component} layer {layer} of the weights"):
            if heads:
                values = head_magnitudes(read, component, layer, shapes[layer])
            else:
                values = neuron_magnitudes(read, component, layer, shapes[layer].ffn)
            check_scores(values, sizes[layer])
        return values

    return magnitudes, "weight magnitude"

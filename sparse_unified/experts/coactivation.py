# SPDX-License-Identifier: Apache-2.0
"""Experts of neurons that fire together: balanced k-means on what neurons did on some tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified.experts.layout import ExpertLayout
from sparse_unified.experts.scores import check_scores
from sparse_unified.experts.snake import rank_neurons

MIN_TOKENS = 8
_WHERE = "coactivation_partition"
_ITERATIONS = 16
_RESTARTS = 3
_TILE_NEURONS = 1024


def check_inputs(inputs: Tensor, hidden_size: int, *, where: str) -> None:
    """Raises ValueError unless inputs of an FFN are finite floats [N >= 8, hidden_size]."""
    if inputs.ndim != 2 or inputs.shape[1] != hidden_size or inputs.shape[0] < MIN_TOKENS:
        raise ValueError(
            f"{where}: inputs must have shape [N, {hidden_size}] of at least {MIN_TOKENS} tokens, "
            f"got {list(inputs.shape)}"
        )
    if not inputs.dtype.is_floating_point:
        raise ValueError(f"{where}: inputs must be floating point, got {inputs.dtype}")
    bad = (~torch.isfinite(inputs)).nonzero()
    if len(bad):
        at = tuple(bad[0].tolist())
        raise ValueError(
            f"{where}: inputs must be finite, got {inputs[at].item()} of token {at[0]} at {at[1]}"
        )


def hidden_activations(inputs: Tensor, gate_proj: Tensor, up_proj: Tensor) -> Tensor:
    """What the neurons of a SwiGLU FFN give: h = silu(gate_proj x) * up_proj x.

    Args:
        inputs: [N, D], any float dtype. gate_proj, up_proj: [I, D], any float dtype.

    Returns:
        [N, I] fp32, on the device of the weights.
    """
    x = inputs.to(gate_proj.device, torch.float32)
    tiles = zip(gate_proj.split(_TILE_NEURONS), up_proj.split(_TILE_NEURONS), strict=True)
    return torch.cat([F.silu(x @ gate.float().t()) * (x @ up.float().t()) for gate, up in tiles], 1)


def coactivation_partition(
    scores: Tensor, layout: ExpertLayout, hidden: Tensor, *, seed: int = 0, layer: int = 0
) -> Tensor:
    """Orders the neurons of a dense FFN by expert, those that fire on the same tokens together.

    The first `layout.shared_width` neurons by score form the shared expert, as in the snake. Of the
    others, |h| over the tokens, minus its mean and divided by its norm, is the profile p. Spherical
    k-means with clusters of exactly I_routed / E neurons maximises sum_i p_i . c_{a(i)}, where c_e
    is the normalised sum of the profiles of expert e: the correlation of neurons with their expert.
    Of three starts (k-means++) and all their iterations the best assignment is taken.

    Args:
        scores: importance of each neuron, [I], any float dtype, finite.
        layout: the widths to deal to.
        hidden: what the neurons gave on N >= 8 tokens, [N, I], any float dtype, finite; see
            `hidden_activations`.
        seed, layer: what the starts are drawn from.

    Returns:
        neuron_index [I] int64 on the CPU, position in expert order -> dense neuron; a permutation.
        Within an expert the neurons ascend.

    Raises:
        ValueError: scores or hidden have another shape or are not finite.
    """
    check_scores(scores, layout.intermediate_size, where=_WHERE)
    if hidden.ndim != 2 or hidden.shape[1] != layout.intermediate_size or len(hidden) < MIN_TOKENS:
        raise ValueError(
            f"{_WHERE}: hidden must have shape [N, {layout.intermediate_size}] of at least "
            f"{MIN_TOKENS} tokens, got {list(hidden.shape)}"
        )
    if not bool(torch.isfinite(hidden).all()):
        raise ValueError(f"{_WHERE}: hidden must be finite, got NaN or infinity")
    ranked = rank_neurons(scores)
    shared = ranked[: layout.shared_width]
    routed = ranked[layout.shared_width :].sort().values
    size = hidden[:, routed.to(hidden.device)].abs().float()  # [N, n]
    profiles = F.normalize((size - size.mean(0)).t(), dim=1)  # [n, N]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)
    owner = _balanced_kmeans(profiles, layout.num_experts, generator)
    return torch.cat([shared, routed[owner.sort(stable=True).indices]])


def _balanced_kmeans(profiles: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Assigns unit rows [n, N] to `count` clusters of n / count rows; [n] int64 on the CPU."""
    best, most = torch.empty(0), -math.inf
    for _ in range(_RESTARTS):
        centres = profiles[_spread_out(profiles, count, generator)]
        previous: Tensor | None = None
        for _ in range(_ITERATIONS):
            similarity = (profiles @ centres.t()).cpu()  # [n, E]
            owner = _assign_evenly(similarity)
            total = float(similarity.gather(1, owner[:, None]).double().sum())
            if total > most:
                best, most = owner, total
            if previous is not None and torch.equal(owner, previous):
                break
            previous = owner
            sums = torch.zeros_like(centres).index_add_(0, owner.to(centres.device), profiles)
            centres = F.normalize(sums, dim=1)
    return best


def _spread_out(profiles: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Draws rows to start from, by the square of the distance to those drawn before."""
    chosen = [int(torch.randint(len(profiles), (1,), generator=generator))]
    distance = torch.full((len(profiles),), math.inf)
    for _ in range(count - 1):
        distance = torch.minimum(distance, 1 - (profiles @ profiles[chosen[-1]]).cpu())
        weights = distance.clamp_min(0).square()
        weights[chosen] = 0
        if not bool(weights.sum() > 0):  # the rest are copies of those chosen
            weights = torch.ones_like(weights)
            weights[chosen] = 0
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return chosen


def _assign_evenly(similarity: Tensor) -> Tensor:
    """Gives every row of [n, E] an owner, n / E rows to each, those first that have most to lose.

    In each round all rows that are left ask for the most similar owner with room. An owner with
    too little room takes those whose second choice is worst by comparison.
    """
    count, num_owners = similarity.shape
    owner = torch.full((count,), -1)
    room = torch.full((num_owners,), count // num_owners)
    while len(free := (owner < 0).nonzero()[:, 0]):
        open_owners = (room > 0).nonzero()[:, 0]
        best = similarity[free][:, open_owners].topk(min(2, len(open_owners)), dim=1)
        loss = best.values[:, 0] - best.values[:, -1]
        for place, taker in enumerate(open_owners.tolist()):
            asking = (best.indices[:, 0] == place).nonzero()[:, 0]
            order = loss[asking].sort(descending=True, stable=True).indices[: int(room[taker])]
            owner[free[asking[order]]] = taker
            room[taker] -= len(order)
    return owner

# SPDX-License-Identifier: Apache-2.0
"""How the neurons of one FFN divide into a shared expert and routed experts of equal width.

`ExpertLayout` says how wide experts are; the partitions say which neuron goes where: by rank
(the official snake), by chance, or those that fire together, by balanced k-means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_unified._common import context, naming
from sparse_unified.experts.keep import (
    block_scores,
    check_scores,
    highest,
    layer_generator,
    units_of,
)

MIN_TOKENS = 8
# Times 0, 1/7, ..., 1 at which experts that are chosen by time have a bias. With 8, the inputs of
# such a router stay a multiple of the 16 bytes that kernels load at a time.
TIME_POINTS = 8
_ITERATIONS = 16
_RESTARTS = 3


def _routed_width(width: int, num_experts: int, num_shared_experts: int) -> int:
    """Returns the neurons of all routed experts; 0 where they do not divide, or none is shared."""
    shared = num_shared_experts * (width // (num_experts + num_shared_experts))
    is_whole = (width - shared) % num_experts == 0 and bool(shared) == bool(num_shared_experts)
    return width - shared if is_whole else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """Neuron ranges of an FFN in expert order: the shared expert first, then expert 0, 1, ...

    The shared expert takes `S * (I // (E + S))` neurons, the E routed experts divide the rest.

    Args:
        intermediate_size: width I of the dense FFN, in neurons.
        num_experts: E, number of routed experts.
        num_shared_experts: S, how many expert widths the shared expert is made of.
        shared_intermediate_size: width of the shared expert in neurons, for files that give it
            directly; by default it follows from the formula above.
        time_router: routed experts are chosen by the time of denoising too, see `SparseMoE`.

    Attributes:
        shared_width: neurons of the shared expert; 0 without one.
        expert_width: neurons of each routed expert.

    Raises:
        ValueError: a count is out of range, or E does not divide the routed neurons.
    """

    intermediate_size: int
    num_experts: int
    num_shared_experts: int = 0
    shared_intermediate_size: int | None = None
    time_router: bool = False
    # Kept, because every forward pass of every block asks for the two.
    shared_width: int = field(init=False, repr=False, compare=False)
    expert_width: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        width, shared = self.intermediate_size, self.shared_intermediate_size
        with naming("ExpertLayout"):
            least_of = {"intermediate_size": 1, "num_experts": 1, "num_shared_experts": 0}
            for name, least in least_of.items():
                value = getattr(self, name)
                if type(value) is not int or value < least:
                    raise ValueError(
                        f"{name} must be an integer of at least {least}, got {value!r}"
                    )
            if shared is None:
                routed = _routed_width(width, self.num_experts, self.num_shared_experts)
            elif type(shared) is not int or not 0 <= shared < width:
                raise ValueError(
                    f"shared_intermediate_size must be from 0 to {width - 1}, got {shared!r}"
                )
            else:
                routed = 0 if (width - shared) % self.num_experts else width - shared
            if not routed:
                legal = [
                    e for e in range(2, 65) if _routed_width(width, e, self.num_shared_experts)
                ]
                raise ValueError(
                    f"num_experts must divide the {width} neurons but for those that are shared, "
                    f"got {self.num_experts}; with num_shared_experts={self.num_shared_experts} "
                    f"these counts do: {', '.join(map(str, legal)) or 'none'}"
                )
        object.__setattr__(self, "shared_width", width - routed)
        object.__setattr__(self, "expert_width", routed // self.num_experts)

    def expert_range(self, expert: int) -> tuple[int, int]:
        """Returns the half-open neuron range of routed expert `expert`."""
        start = self.shared_width + expert * self.expert_width
        return start, start + self.expert_width

    def idle_neurons(self, top_k: int) -> int:
        """Returns how many neurons are of experts that a token does not use."""
        return self.expert_width * (self.num_experts - top_k)

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Returns the neuron range of each expert by its official name, in expert order."""
        shared = {"shared_expert": (0, self.shared_width)} if self.shared_width else {}
        return shared | {f"experts.{e}": self.expert_range(e) for e in range(self.num_experts)}


def keep_in_experts(
    scores: Tensor, layout: ExpertLayout, *, keep_ratio: float, block_size: int = 1
) -> Tensor:
    """Chooses the neurons of each expert with the highest scores, whole blocks of them.

    Routed experts of w neurons keep max(1, round(keep_ratio * w / block_size)) blocks each. A
    shared expert that is S expert widths wide, as `ExpertLayout` makes it, stays so, as checkpoints
    tell its width by S; one of another width keeps the ratio of its own.

    Finite scores [I] in expert order, keep_ratio in (0, 1], block_size that divides the width of
    every expert -> positions in expert order that stay, [kept] int64, ascending, on the CPU.
    """
    blocks = block_scores(scores, block_size)
    routed = max(1, round(keep_ratio * layout.expert_width / block_size))
    width, count = layout.shared_width, layout.num_shared_experts
    shared = max(1, round(keep_ratio * width / block_size))
    if routed * block_size == layout.expert_width:
        shared = width // block_size
    elif count and count * (layout.intermediate_size // (layout.num_experts + count)) == width:
        shared = min(count * routed, width // block_size)
    kept = []
    for name, (start, stop) in layout.ranges().items():
        own = blocks[start // block_size : stop // block_size]
        best = highest(own, shared if name == "shared_expert" else routed)
        kept.append(start + units_of(best, block_size))
    return torch.cat(kept)


class Partition(str, Enum):
    """How the neurons that the shared expert leaves are dealt to the routed experts."""

    SNAKE = "snake"  # by rank, in turn: every expert gets neurons of every rank; the official way
    RANDOM = "random"  # drawn by seed
    COACTIVATION = "coactivation"  # neurons that fire together go together


@context("order_neurons")
def order_neurons(
    partition: Partition,
    scores: Tensor,
    layout: ExpertLayout,
    *,
    seed: int = 0,
    layer: int = 0,
    hidden: Tensor | None = None,
) -> Tensor:
    """Orders the neurons of a dense FFN by expert, the shared expert first.

    Neurons are sorted by score, in its own precision, highest first and stable; the first
    `layout.shared_width` form the shared expert. The rest go to the routed experts:

        snake           read as rows of E with every second row reversed; expert e takes column e,
                        so that every expert gets neurons of every rank
        random          shuffled, in a way that depends on the scores by the shared expert alone
        coactivation    |h| over the tokens, minus its mean and divided by its norm, is the profile
                        p of a neuron. Spherical k-means with clusters of exactly I_routed / E
                        neurons maximises sum_i p_i . c_{a(i)}, where c_e is the normalised sum of
                        the profiles of expert e: the correlation of neurons with their expert. Of
                        three starts (k-means++) and all their iterations the best is taken. Within
                        an expert the neurons ascend.

    Args:
        scores: importance of each neuron, [I], any float dtype, finite.
        seed, layer: what "random" and the starts of "coactivation" are drawn from; the same on
            every machine.
        hidden: what the neurons gave on N >= 8 tokens, [N, I], any float dtype, finite, of
            "coactivation" alone; see `hidden_activations`.

    Returns:
        neuron_index [I] int64 on the CPU, position in expert order -> dense neuron; a permutation.

    Raises:
        ValueError: scores or hidden do not fit, or hidden is not given where it is needed.

    Source: `dense_to_moe_with_explicit_shared` of the official SparseUnifiedModel code (snake).
    """
    check_scores(scores, layout.intermediate_size)
    scores = scores.cpu()
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()  # exact; the narrow dtypes do not all sort
    ranked = torch.argsort(scores, descending=True, stable=True)
    shared, routed = ranked[: layout.shared_width], ranked[layout.shared_width :]
    if partition is Partition.SNAKE:
        rows = routed.view(-1, layout.num_experts).clone()  # [h, E]
        rows[1::2] = rows[1::2].flip(1)
        return torch.cat([shared, rows.t().reshape(-1)])
    routed = routed.sort().values
    generator = layer_generator(seed, layer)
    if partition is Partition.RANDOM:
        return torch.cat([shared, routed[torch.randperm(len(routed), generator=generator)]])
    if hidden is None or hidden.ndim != 2 or hidden.shape[1] != len(scores):
        got = None if hidden is None else list(hidden.shape)
        raise ValueError(f"hidden must have shape [N, {len(scores)}], got {got}")
    if len(hidden) < MIN_TOKENS or not bool(torch.isfinite(hidden).all()):
        raise ValueError(
            f"hidden must be finite, of at least {MIN_TOKENS} tokens, got {len(hidden)} tokens"
        )
    size = hidden[:, routed.to(hidden.device)].abs().float()  # [N, n]
    profiles = F.normalize((size - size.mean(0)).t(), dim=1)  # [n, N]
    owner = _balanced_kmeans(profiles, layout.num_experts, generator)
    return torch.cat([shared, routed[owner.sort(stable=True).indices]])


def snake_partition(scores: Tensor, layout: ExpertLayout) -> Tensor:
    """Orders the neurons of a dense FFN by expert the official way, see `order_neurons`."""
    return order_neurons(Partition.SNAKE, scores, layout)


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

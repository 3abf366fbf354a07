# SPDX-License-Identifier: Apache-2.0
"""How the neurons of one FFN divide into a shared expert and routed experts of equal width."""

from __future__ import annotations

from dataclasses import dataclass, field


def _shared_width(intermediate_size: int, num_experts: int, num_shared_experts: int) -> int:
    return num_shared_experts * (intermediate_size // (num_experts + num_shared_experts))


def dividing_expert_counts(intermediate_size: int, num_shared_experts: int = 0) -> list[int]:
    """Returns every expert count from 2 to 64 that divides what the shared expert leaves."""
    counts = []
    for num_experts in range(2, 65):
        shared = _shared_width(intermediate_size, num_experts, num_shared_experts)
        routed = intermediate_size - shared
        is_empty = num_shared_experts > 0 and shared == 0
        if not is_empty and routed >= num_experts and routed % num_experts == 0:
            counts.append(num_experts)
    return counts


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
    # Kept, because every forward pass of every block asks for the two.
    shared_width: int = field(init=False, repr=False, compare=False)
    expert_width: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (
            ("intermediate_size", 1),
            ("num_experts", 1),
            ("num_shared_experts", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"ExpertLayout: {name} must be an integer of at least {least}, got {value!r}"
                )
        shared = self.shared_intermediate_size
        if shared is not None and (
            type(shared) is not int or not 0 <= shared < self.intermediate_size
        ):
            raise ValueError(
                "ExpertLayout: shared_intermediate_size must be from 0 to "
                f"intermediate_size - 1 = {self.intermediate_size - 1}, got {shared!r}"
            )
        counts = self.num_experts, self.num_shared_experts
        width = _shared_width(self.intermediate_size, *counts) if shared is None else shared
        object.__setattr__(self, "shared_width", width)
        legal = dividing_expert_counts(self.intermediate_size, self.num_shared_experts)
        if shared is None and self.num_shared_experts and not width:
            raise ValueError(
                "ExpertLayout: num_shared_experts must leave every expert one of the "
                f"{self.intermediate_size} neurons of intermediate_size, got "
                f"{self.num_shared_experts} beside {self.num_experts} experts; with these counts "
                f"of experts it does: {', '.join(map(str, legal)) or 'none'}"
            )
        routed = self.intermediate_size - width
        if routed < self.num_experts or routed % self.num_experts != 0:
            raise ValueError(
                f"ExpertLayout: num_experts must divide the {routed} neurons that remain of "
                f"intermediate_size {self.intermediate_size} after {width} shared, got "
                f"{self.num_experts}; with num_shared_experts={self.num_shared_experts} these "
                f"counts do: {', '.join(map(str, legal)) or 'none'}"
            )
        object.__setattr__(self, "expert_width", routed // self.num_experts)

    def shared_range(self) -> tuple[int, int]:
        """Returns the half-open neuron range of the shared expert."""
        return 0, self.shared_width

    def expert_range(self, expert: int) -> tuple[int, int]:
        """Returns the half-open neuron range of routed expert `expert`."""
        start = self.shared_width + expert * self.expert_width
        return start, start + self.expert_width

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Returns the neuron range of each expert by its official name, in expert order."""
        shared = {"shared_expert": self.shared_range()} if self.shared_width else {}
        return shared | {f"experts.{e}": self.expert_range(e) for e in range(self.num_experts)}

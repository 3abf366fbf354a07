# SPDX-License-Identifier: Apache-2.0
"""Steps that are extrapolated instead of computed, from the velocities of those that were.

The velocities of the last K + 1 computed steps, at times t_0 (the newest) to t_K, determine a
polynomial of degree K in the time, in Newton's form

    v(t) = c_0 + c_1 (t - t_0) + c_2 (t - t_0) (t - t_1) + ...

where c_k is their k-th divided difference, an approximation of the k-th derivative over k!. Only
what leaves the model is expanded, nothing of a layer: the last projection is linear, so this is the
expansion of the last hidden states, at p * p * C numbers a token instead of D.

Source: TaylorSeer (arXiv 2503.06923), which divides all differences by the distance of the last two
computed steps; divided by the distance of their own steps they are exact for polynomials of degree
K, on any grid of times.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MAX_ORDER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCache:
    """Which steps are computed, and how the others are extrapolated from them.

    Between images nothing is kept. During one, every branch of guidance holds
    (order + 1) * N * p * p * C numbers in fp32, 3 MiB for 1024 x 1024 pixels and order 2.

    Args:
        interval: after the first steps, every interval-th is computed; 1 computes all.
        order: degree of the extrapolation, 0 to 3, as far as steps were computed; 0 repeats the
            last velocity.
        first, last: steps at the beginning and at the end that are computed in any case.

    Raises:
        TypeError, ValueError: a value is no integer, or out of range.
    """

    interval: int = 3
    order: int = 2
    first: int = 3
    last: int = 1

    def __post_init__(self) -> None:
        for name, least, most in (
            ("interval", 1, None),
            ("order", 0, MAX_ORDER),
            ("first", 1, None),
            ("last", 0, None),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"StepCache: {name} must be an integer, got {value!r}")
            if value < least or (most is not None and value > most):
                rule = f"be at least {least}" if most is None else f"be from {least} to {most}"
                raise ValueError(f"StepCache: {name} must {rule}, got {value}")

    def computes(self, step: int, num_steps: int) -> bool:
        """Tells whether a step, counted from 0, is computed on its own account."""
        if step < self.first or step >= num_steps - self.last:
            return True
        return (step - self.first + 1) % self.interval == 0


class Expansion:
    """Velocities of one branch of guidance of one image as a polynomial in the time.

    Args:
        order: degree, as far as there are velocities.
    """

    __slots__ = ("differences", "order", "times")

    def __init__(self, order: int) -> None:
        self.order = order
        self.times: list[float] = []  # of the last computed steps, the newest first
        self.differences: list[Tensor] = []  # c_0 to c_K

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(tensor.nbytes for tensor in self.differences)

    def add(self, time: float, velocity: Tensor) -> None:
        """Takes up a computed velocity at a new time."""
        differences = [velocity]
        for then, older in zip(self.times[: self.order], self.differences, strict=False):
            differences.append((differences[-1] - older) / (time - then))
        self.times = [time, *self.times[: self.order]]
        self.differences = differences

    def at(self, time: float) -> Tensor:
        """Returns the velocity at another time."""
        *rest, value = self.differences
        for then, difference in reversed(list(zip(self.times, rest, strict=False))):
            value = difference + (time - then) * value
        return value

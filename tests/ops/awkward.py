# SPDX-License-Identifier: Apache-2.0
"""What tests of the ops try beyond what users' devices are asked: layouts, threads, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_unified.checks.problems import Problem, grouped_problem, pruned_problem

_ALL = slice(None)
# Shape of the memory of a matrix [rows, columns], and where its elements lie.
_PLACES: dict[str, Callable[[int, int], tuple[Any, Any]]] = {
    "padded rows": lambda r, c: ((r, c + 5), (_ALL, slice(c))),
    "misaligned columns": lambda r, c: ((r, c + 5), (_ALL, slice(1, c + 1))),
    "misaligned start": lambda r, c: ((1, r * c + 1), (0, slice(1, None))),
    "strided columns": lambda r, c: ((r, 2 * c), (_ALL, slice(None, None, 2))),
    "strided rows": lambda r, c: ((3 * r, c), (slice(None, None, 3), _ALL)),
}
LAYOUTS = (*_PLACES, "transposed")


def both_problems(
    device: torch.device, dtype: torch.dtype, num_tokens: int, hidden_size: int = 72
) -> list[Problem]:
    """Both with several tiles of rows, experts without rows, lost blocks."""
    kept = (11, 1, 2, 3, 8, 0)
    return [
        grouped_problem(num_tokens, hidden_size, 5, 56, 2, dtype, "gaps", device),
        pruned_problem(num_tokens, hidden_size, 12, 64, kept, dtype, device),
    ]


def refusal(run: Callable[[], object]) -> str:
    """The text of the error that a call must end with."""
    try:
        run()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("a call was taken that must be refused")


def each_thread_count() -> Iterator[int]:
    """Sets 1, 2 and 3 threads in turn."""
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """A vector or matrix of equal value in another layout, with NaN or 77 around its elements."""
    if tensor.dim() == 1:
        return lay_out(tensor[:, None], layout)[:, 0]
    if layout == "transposed":
        return tensor.t().contiguous().t()
    shape, index = _PLACES[layout](*tensor.shape)
    around = torch.nan if tensor.is_floating_point() else 77
    view = tensor.new_full(shape, around)[index].view(tensor.shape)
    return view.copy_(tensor)


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same matrix in each layout."""
    for layout in LAYOUTS:
        yield layout, lay_out(tensor, layout)

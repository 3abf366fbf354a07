# SPDX-License-Identifier: Apache-2.0
"""A bar that counts denoising steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sparse_unified.bagel.optional import optional


@contextmanager
def progress_bar(total: int, *, show: bool) -> Iterator[Callable[[], Any]]:
    """Yields a function that counts one step; without `show` it does nothing."""
    if not show:
        yield lambda: None
        return
    with optional("tqdm.auto").tqdm(total=total, desc="denoising", unit="step") as bar:
        yield bar.update

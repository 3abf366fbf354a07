# SPDX-License-Identifier: Apache-2.0
"""What cannot be done is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refused(
    match: str, call: Callable[..., object], *given: Any, error: Any = ValueError, **options: Any
) -> None:
    """Calls with what is given, which must raise an error of one line that matches."""
    with pytest.raises(error, match=match) as caught:
        call(*given, **options)
    assert "\n" not in str(caught.value)

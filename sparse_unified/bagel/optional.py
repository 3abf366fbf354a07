# SPDX-License-Identifier: Apache-2.0
"""Packages that only some functions need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str) -> Any:
    """Imports a package of the `bagel` extra.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"sparse_unified.bagel: {module.partition('.')[0]} must be installed "
            f"(pip install 'sparse_unified[bagel]'), got {error}"
        ) from error

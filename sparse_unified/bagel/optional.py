# SPDX-License-Identifier: Apache-2.0
"""Packages that only some functions need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

_USERS = {
    "bagel": "bagel",
    "plot": "analysis",
    "train": "adapt",
    "mini": "mini",
    "engines": "engines",
}


def optional(module: str, *, extra: str = "bagel") -> Any:
    """Imports a package of an extra.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"sparse_unified.{_USERS[extra]}: {module.partition('.')[0]} must be installed "
            f"(pip install 'sparse_unified[{extra}]'), got {error}"
        ) from error

# SPDX-License-Identifier: Apache-2.0
"""bench: the speed of the sparse FFN beside its baselines, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def add_commands(commands: Any) -> None:
    """Lists the command; its arguments are parsed by the benchmark itself."""
    commands.add_parser(
        "bench",
        help="measure the sparse FFN beside its baselines",
        description="Measures on this machine; see sparse-unified bench --help.",
        add_help=False,
    )


def run(arguments: Sequence[str]) -> int:
    """Runs the benchmark with its own arguments and returns its exit status."""
    from sparse_unified.bench import main

    return int(main(list(arguments)) or 0)

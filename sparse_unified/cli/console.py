# SPDX-License-Identifier: Apache-2.0
"""What all commands share: one-line errors, progress on stderr, results as text or JSON."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

from sparse_unified._common import Advance, progress_bar

PROG = "sparse-unified"


class Usage(Exception):
    """The command line is wrong; ends with exit status 2."""


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are exceptions, and which takes no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        raise Usage(f"{message} (see {self.prog} --help)")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every command has."""
    parser.add_argument(
        "--json",
        metavar="PATH.json",
        help="write the result as JSON to this file; without a file (or with -), print it instead "
        "of text",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress on stderr")
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the code an error came from"
    )


def split_json_flag(arguments: Sequence[str]) -> list[str]:
    """Gives `--json` the value "-" where what follows is not a JSON file, so it works as a flag."""
    result: list[str] = []
    for position, argument in enumerate(arguments):
        result.append(argument)
        if argument == "--json":
            following = arguments[position + 1 : position + 2]
            if not following or not (following[0] == "-" or following[0].endswith(".json")):
                result[-1] = "--json=-"
    return result


def check_output(path: str | None, option: str) -> None:
    """Refuses an output file that could not be written, before anything is computed."""
    if path is None or path == "-":
        return
    parent = Path(path).absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: directory must be there and writable, got {parent}")
    if Path(path).is_dir():
        raise ValueError(f"{option}: path must be a file, got the directory {path}")


def write_result(json_path: str | None, text: str, json_text: str) -> None:
    """Prints the text, or the JSON when `json_path` is "-"; writes the JSON to any other path."""
    sys.stdout.write((json_text if json_path == "-" else text) + "\n")
    sys.stdout.flush()
    if json_path is not None and json_path != "-":
        from sparse_unified.checkpoint.atomic import replace_file

        replace_file(Path(json_path), (json_text + "\n").encode())


def show_progress(name: str, unit: str, *, quiet: bool) -> AbstractContextManager[Advance]:
    """Returns what moves a bar on a terminal's stderr."""
    return progress_bar(name, unit, show=False if quiet else None)


def one_line(message: str) -> str:
    """Folds a message into one line."""
    return " ".join(message.split())

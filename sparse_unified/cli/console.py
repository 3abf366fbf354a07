# SPDX-License-Identifier: Apache-2.0
"""What all commands share: the parser, one-line errors, progress on stderr, text or JSON out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from sparse_unified._common import Advance, Report, progress_bar

PROG = "sparse-unified"


class Usage(Exception):
    """The command line is wrong; ends with exit status 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output(Report):
    """What a command found out that no report of the package holds."""

    text: str
    document: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.document)

    def to_text(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a command does.

    Attributes:
        description: as `--help` shows it.
        add: adds its options.
        run: returns what to print, or None in a process that prints nothing.
        outputs: options that name files to write, which must be writable before it starts.
    """

    description: str
    add: Callable[[CommandParser], None]
    run: Callable[[argparse.Namespace], Report | None]
    outputs: tuple[str, ...] = ()

    def __call__(self, options: argparse.Namespace) -> int:
        """Runs the command and returns its exit status: 1 if what it checked does not hold."""
        for name in (*self.outputs, "json"):
            _check_output(getattr(options, name), f"--{name}")
        report = self.run(options)
        if report is None:
            return 0
        text, document = report.to_text(), report.to_json()
        sys.stdout.write((document if options.json == "-" else text) + "\n")
        sys.stdout.flush()
        if options.json not in (None, "-"):
            from sparse_unified.checkpoint.files import replace_file

            replace_file(Path(options.json), (document + "\n").encode())
        holds = getattr(report, "ok", True) and not getattr(report, "problems", ())
        return 0 if holds else 1


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are exceptions, and which takes no abbreviated options.

    The module of a command, which imports what it runs, is imported when the command is parsed.

    Args:
        command: `module.NAME` of a `Command` in this package.
    """

    def __init__(self, *, command: str = "", **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        self._command = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.fill()
        return super().parse_known_args(args, namespace)

    def fill(self) -> None:
        """Adds description and options of the command, once."""
        if not self._command:
            return
        (module, name), self._command = self._command.split("."), ""
        command: Command = getattr(import_module(f"{__package__}.{module}"), name)
        self.description = command.description
        command.add(self)
        self.add_argument(
            "--json",
            metavar="PATH.json",
            help="write the result as JSON to this file; without a file (or with -), print it "
            "instead of text",
        )
        self.add_argument("--quiet", action="store_true", help="show no progress on stderr")
        self.add_argument(
            "--traceback", action="store_true", help="show where in the code an error came from"
        )
        self.set_defaults(run=command)

    def error(self, message: str) -> NoReturn:
        raise Usage(f"{message} (see {self.prog} --help)")


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


def show_progress(
    options: argparse.Namespace, name: str, unit: str = "B"
) -> AbstractContextManager[Advance]:
    """Returns what moves a bar on a terminal's stderr, unless the command is to be quiet."""
    return progress_bar(name, unit, show=False if options.quiet else None)


def one_line(message: str) -> str:
    """Folds a message into one line."""
    return " ".join(message.split())


def _check_output(path: object, option: str) -> None:
    """Refuses an output file that could not be written, before anything is computed."""
    if path is None or path == "-":
        return
    parent = Path(str(path)).absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: directory must be there and writable, got {parent}")
    if Path(str(path)).is_dir():
        raise ValueError(f"{option}: path must be a file, got the directory {path}")

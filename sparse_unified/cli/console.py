# SPDX-License-Identifier: Apache-2.0
"""What all commands share: the parser, how they run, progress on stderr, text or JSON out."""

from __future__ import annotations

import argparse
import codecs
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from sparse_unified._common import Report, progress_bar

PROG = "sparse-unified"


class Usage(Exception):
    """The command line is wrong; ends with exit status 2."""


class Unshown(Exception):
    """The command is done, and its result cannot be shown; ends with exit status 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output(Report):
    """What a command found out that no report of the package holds."""

    text: str
    document: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.document)

    def to_text(self) -> str:
        return self.text


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are exceptions, and which takes no abbreviated options.

    A command NAME is two functions of a module of this package: `add_NAME(flags)` adds its
    options, `run_NAME(options)` returns the report to print (None prints nothing), and its
    docstring is the description. The module is imported when the command is parsed.

    Args:
        command: `module.NAME`.
    """

    def __init__(self, *, command: str = "", **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        self._command = command
        # What an `add_NAME` may set: makes other arguments of those that were given.
        self.expand: Callable[[Sequence[str]], Sequence[str]] = lambda args: args

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.fill()
        return super().parse_known_args(self.expand(args), namespace)

    def fill(self) -> None:
        """Adds description and options of the command, once."""
        if not self._command:
            return
        (module_name, name), self._command = self._command.split("."), ""
        module = import_module(f"{__package__}.{module_name}")
        run = getattr(module, f"run_{name}")
        self.description = inspect.getdoc(run)
        self.set_defaults(run=run, outputs=())
        flags = import_module(f"{__package__}.options").Flags(self)
        getattr(module, f"add_{name}")(flags)
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

    def error(self, message: str) -> NoReturn:
        raise Usage(f"{message} (see {self.prog} --help)")


def execute(options: argparse.Namespace) -> int:
    """Runs a command and returns its exit status: 1 if what it checked does not hold.

    Raises:
        Unshown: all is done but to show the result.
    """
    for name in (*options.outputs, "json"):
        _check_output(getattr(options, name), f"--{name}")
    report: Report | None = options.run(options)
    if report is None:
        return 0
    try:
        document = report.to_json() + "\n"
        if options.json not in (None, "-"):
            from sparse_unified.checkpoint.files import replace_file

            replace_file(Path(options.json), document.encode("utf-8", _ESCAPE))
        show(document if options.json == "-" else report.to_text() + "\n")
    except BrokenPipeError:
        raise Unshown from None
    except Exception as error:
        raise Unshown(f"the command is done, but its result could not be shown: {error}") from error
    holds = getattr(report, "ok", True) and not getattr(report, "problems", ())
    return 0 if holds else 1


def show(text: str) -> None:
    """Prints text to stdout; what its encoding lacks is written as JSON escapes."""
    if sys.stdout is None:
        raise OSError("stdout is closed")
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, _ESCAPE).decode(encoding))
    sys.stdout.flush()


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Writes what an encoding lacks, and bytes of paths that are no text, as JSON escapes."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end


_ESCAPE = "sparse_unified.escape"
codecs.register_error(_ESCAPE, _escape)


def split_json_flag(arguments: Sequence[str]) -> list[str]:
    """Gives `--json` the value "-" where what follows is not a JSON file, so it works as a flag."""
    result: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        is_flag = argument == "--json" and following != "-" and not following.endswith(".json")
        result.append("--json=-" if is_flag else argument)
    return result


def show_progress(
    options: argparse.Namespace, name: str, unit: str = "B"
) -> AbstractContextManager[Callable[..., object]]:
    """Returns what moves a bar on a terminal's stderr, unless the command is to be quiet."""
    return progress_bar(name, unit, show=False if options.quiet else None)


def _check_output(path: object, option: str) -> None:
    """Refuses an output file that could not be written, before anything is computed."""
    if path is None or path == "-":
        return
    parent = Path(str(path)).absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: directory must be there and writable, got {parent}")
    if Path(str(path)).is_dir():
        raise ValueError(f"{option}: path must be a file, got the directory {path}")

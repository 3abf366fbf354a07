# SPDX-License-Identifier: Apache-2.0
"""The `sparse-unified` command. Modules that are slow to import are imported by the command run."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from sparse_unified.cli.console import (
    PROG,
    CommandParser,
    Unshown,
    Usage,
    execute,
    show,
    split_json_flag,
)

_DESCRIPTION = """\
Sparse mixture-of-experts versions of unified multimodal models: make them from dense
checkpoints, check them, run them, measure them. Results go to stdout, progress to stderr.
Exit status: 0 success, 1 bad data, a failed check or a result that cannot be printed,
2 wrong usage, 130 interrupted."""
# {name: (module, help)}
_COMMANDS = {
    "convert": ("checkpoint", "make a sparse checkpoint from a dense one"),
    "verify": ("checkpoint", "prove that a checkpoint is a dense one, reordered or pruned"),
    "invert": ("checkpoint", "give the dense checkpoint back, bit for bit"),
    "info": ("checkpoint", "show what a model directory or this build is, and what disagrees"),
    "prune": ("checkpoint", "make a smaller one: narrower FFNs, fewer heads, skipped layers"),
    "card": ("checkpoint", "write the model card, README.md"),
    "push": ("checkpoint", "upload a model with its card to the hub"),
    "generate": ("generate", "generate or edit images"),
    "chat": ("generate", "answer a prompt, with or without images, in text"),
    "app": ("app", "serve a page to draw, edit and ask, with several models side by side"),
    "calibrate": ("analysis", "gather statistics of the neurons on a task"),
    "analyze": ("analysis", "measure what a model can do without"),
    "evaluate": ("analysis", "put dense, pruned, sparse and tuned models side by side"),
    "expert-usage": ("analysis", "count which experts a task uses"),
    "decoder": ("decoder", "measure what a decoder of transformers can do without"),
    "adapt": ("adapt", "tune a model"),
    "merge": ("adapt", "merge LoRA adapters into a checkpoint"),
    "doctor": ("doctor", "show which kernels are right on this machine, and leave out the others"),
    "tune": ("doctor", "find and keep the fastest kernels for the sizes of a model"),
}


def build_parser() -> CommandParser:
    """Returns the parser of all commands."""
    parser = CommandParser(prog=PROG, description=_DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="print version and build, and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (module, text) in _COMMANDS.items():
        commands.add_parser(name, help=text, command=f"{module}.{name.replace('-', '_')}")
    mini = commands.add_parser(
        "mini",
        help="write a BAGEL in miniature",
        description="A small BAGEL that is trained to draw scenes of coloured shapes and to answer "
        "questions about them. See docs/miniature.md.",
    )
    actions = mini.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "write the trained model as a model directory"
    actions.add_parser("write", help=text, command="checkpoint.mini_write")
    commands.add_parser(
        "bench",
        help="measure the sparse FFN beside its baselines",
        description="Measures on this machine; see sparse-unified bench --help.",
        add_help=False,
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; errors become one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format=f"{PROG}: %(message)s", level=logging.WARNING)
    # SIGTERM ends as an error does, so that partial output is cleaned up.
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if in_main else None
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, kind="")
    except Usage as error:
        return _fail(str(error), 2)
    except (Unshown, BrokenPipeError) as error:
        # What stdout still buffers cannot be written either; Python would complain at exit.
        with suppress(AttributeError, OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        is_told = isinstance(error, Unshown) and error.args
        return _fail(str(error), 1) if is_told else 1
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        return _fail(_describe(error), 1)
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, previous)


def _run(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["bench"]:  # its arguments belong to it, whatever they look like
        from sparse_unified.bench import main as bench

        return int(bench(list(arguments[1:])) or 0)
    options = build_parser().parse_args(split_json_flag(arguments))
    if options.version:
        from sparse_unified.build import build_info

        found = build_info()
        show(f"{PROG} {found.version}\n{found.to_line()}\n")
        return 0
    if "run" not in options:
        raise Usage(f"a command must be given, got none (see {PROG} --help)")
    return execute(options)


def _describe(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "memory must suffice, got MemoryError"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: must be accessible, got {error.strerror}"
    if isinstance(error, (ValueError, TypeError, RuntimeError, ImportError, OSError)):
        return str(error) or type(error).__name__
    return f"internal error {type(error).__name__}: {error} (--traceback shows where)"


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(message: str, status: int, kind: str = "error: ") -> int:
    with suppress(AttributeError, OSError):  # stderr may be closed
        sys.stderr.write(f"{PROG}: {kind}{' '.join(message.split())}\n")
    return status

# SPDX-License-Identifier: Apache-2.0
"""The files of a model directory that are carried over as they are."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from sparse_unified.checkpoint.writer import copy_file


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainFile:
    """One file to carry over: its path inside the directory, where it lies, its size."""

    name: Path
    source: Path
    nbytes: int


def list_files(directory: Path, *, skip: Collection[str], what: str) -> list[PlainFile]:
    """Lists all files below a directory, links followed as hub caches need it.

    Args:
        directory: the model directory.
        skip: names directly inside it that are left out.
        what: the operation, for messages.

    Raises:
        ValueError: something is neither a file nor a directory, a link leads nowhere, or links
            run in a circle.
    """
    found: list[PlainFile] = []

    def visit(folder: Path, parents: tuple[Path, ...]) -> None:
        real = folder.resolve()
        if real in parents:
            raise ValueError(f"{what}: links must not run in a circle, got {folder}")
        for path in sorted(folder.iterdir()):
            if folder == directory and path.name in skip:
                continue
            try:
                status = path.stat()
            except OSError as error:
                raise ValueError(
                    f"{what}: {path} must be readable, got {error.strerror}"
                ) from error
            if stat.S_ISDIR(status.st_mode):
                visit(path, (*parents, real))
            elif stat.S_ISREG(status.st_mode):
                name = path.relative_to(directory)
                found.append(PlainFile(name=name, source=path, nbytes=status.st_size))
            else:
                raise ValueError(f"{what}: {path} must be a file or a directory, got neither")

    visit(directory, ())
    return found


def copy_files(
    files: Collection[PlainFile],
    target: Path,
    *,
    rename: dict[str, str],
    advance: Callable[[int], None],
) -> None:
    """Copies files into `target`; `rename` maps names directly inside it to other names."""
    for file in files:
        path = target / rename.get(str(file.name), str(file.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        copy_file(file.source, path, advance)


def require_room(directory: Path, nbytes: int, *, what: str) -> None:
    """Raises RuntimeError when the file system has fewer than `nbytes` free.

    Args:
        directory: as `atomic_directory` yields it.
    """
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise RuntimeError(
            f"{what}: {directory.parents[1]} must have {nbytes:,} bytes free, got {free:,}"
        )

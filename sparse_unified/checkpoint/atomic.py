# SPDX-License-Identifier: Apache-2.0
"""Directories and files that appear complete or not at all, whenever their writer dies."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)


def partial_path(out: Path) -> Path:
    """Returns the sibling directory in which `out` is written before it gets its name."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def atomic_directory(out: str | os.PathLike[str], *, what: str) -> Iterator[Path]:
    """Yields an empty sibling directory that becomes `out` when the block ends well.

    The sibling is locked while it is written, so two runs never mix; what a killed run left in it
    is removed. Everything is synced to disk before the one rename that makes `out` appear. When
    the block fails, the sibling is removed.

    Args:
        out: the target, which must not exist; its parent must.
        what: the operation, for messages.

    Raises:
        ValueError: the target exists, or its parent does not.
        RuntimeError: another run is writing the same target, or the file system refuses to.
    """
    target = Path(os.path.abspath(out))  # noqa: PTH100  (resolve() would follow the last link)
    _refuse_existing(target, what)
    if not target.parent.is_dir():
        raise ValueError(f"{what}: parent of {out} must be a directory, got {target.parent}")
    partial = partial_path(target)
    lock = -1
    try:
        lock = _lock(partial, what)
        _clear(partial)
        yield partial
        _sync_tree(partial)
        _refuse_existing(target, what)
        partial.rename(target)
        _sync(target.parent)
    except OSError as error:
        if lock >= 0:
            shutil.rmtree(partial, ignore_errors=True)
        culprit = error.filename or target
        raise RuntimeError(
            f"{what}: {culprit} must be accessible with room to spare, "
            f"got {error.strerror or error}"
        ) from error
    except BaseException:
        if lock >= 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, syncs it, and moves it into place.

    Raises:
        RuntimeError: the file system refuses; what was there before stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RuntimeError(
            f"{path}: file must be writable with room to spare, got {error.strerror or error}"
        ) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _refuse_existing(target: Path, what: str) -> None:
    if os.path.lexists(target):
        raise ValueError(f"{what}: target must not exist, got {target}")


def _lock(partial: Path, what: str) -> int:
    while True:
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise RuntimeError(
                f"{what}: target must be written by one run at a time, got another at {partial}"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                os.close(lock)
                raise
            logger.warning("%s: this file system has no locks; run one conversion at a time", what)
        # The run that held the lock may have renamed or removed the directory meanwhile.
        try:
            if os.path.samestat(os.fstat(lock), partial.lstat()):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)


def _clear(partial: Path) -> None:
    leftover = list(partial.iterdir())
    if leftover:
        logger.warning("removing what an interrupted run left in %s", partial)
    for path in leftover:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync_tree(directory: Path) -> None:
    # Files are synced by whoever writes them; here it is the names.
    for path in directory.iterdir():
        if path.is_dir():
            _sync_tree(path)
    _sync(directory)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

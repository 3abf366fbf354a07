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


# The file that says that a partial directory is ours to remove.
MARKER = "sparse_unified.partial"


def partial_path(out: str | os.PathLike[str]) -> Path:
    """Returns the sibling directory in which `out` is written before it gets its name.

    It holds `MARKER` and one directory, named as `out`, that is renamed to `out` when it is whole.
    """
    target = _absolute(out)
    return target.with_name(f".{target.name}.partial")


@contextmanager
def atomic_directory(out: str | os.PathLike[str], *, what: str) -> Iterator[Path]:
    """Yields an empty directory beside `out` that becomes `out` when the block ends well.

    The sibling `partial_path(out)` that holds it is locked while it is written, so two runs never
    mix; what a killed run left in it is removed, if it carries the marker of such a run.
    Everything is synced to disk before the one rename that makes `out` appear. When the block
    fails, the sibling is removed.

    Args:
        out: the target, which must not exist; its parent must.
        what: the operation, for messages.

    Raises:
        ValueError: the target exists, its parent does not, or something that no run of ours left
            stands where it would be written.
        RuntimeError: another run is writing the same target, or the file system refuses to.
    """
    target = _absolute(out)
    _refuse_existing(target, what)
    if not target.parent.is_dir():
        raise ValueError(f"{what}: parent of {out} must be a directory, got {target.parent}")
    partial = partial_path(target)
    content = partial / target.name
    lock = -1
    is_ours = False
    try:
        refuse_foreign_partial(target, what=what)
        lock = _lock(partial, what)
        refuse_foreign_partial(target, what=what)
        is_ours = True
        if content.exists():
            logger.warning("removing what an interrupted run left in %s", partial)
            shutil.rmtree(content)
        with (partial / MARKER).open("wb") as stream:
            os.fsync(stream.fileno())
        content.mkdir()
        yield content
        _sync_tree(content)
        _refuse_existing(target, what)
        content.rename(target)
        _sync(target.parent)
    except OSError as error:
        culprit = error.filename or target
        raise RuntimeError(
            f"{what}: {culprit} must be accessible with room to spare, "
            f"got {error.strerror or error}"
        ) from error
    finally:
        if is_ours:
            # The marker goes last, so that what a run killed here leaves is known as ours.
            with suppress(OSError):
                shutil.rmtree(content, ignore_errors=True)
                (partial / MARKER).unlink(missing_ok=True)
                partial.rmdir()
        if lock >= 0:
            os.close(lock)


def refuse_foreign_partial(out: str | os.PathLike[str], *, what: str) -> None:
    """Raises ValueError when what stands at `partial_path(out)` was not left by a run of ours."""
    partial = partial_path(out)
    try:
        found = None if partial.is_symlink() else list(partial.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        found = None
    names = {path.name for path in found or []}
    own = {MARKER, _absolute(out).name}
    if found is None or any(path.is_symlink() for path in found):
        state = "a link or a file"
    elif names and not (MARKER in names and names <= own):
        state = f"a directory with {min(names - {MARKER})}"
    else:
        return
    raise ValueError(
        f"{what}: {partial} must be absent or left by an interrupted run, which may be removed, "
        f"got {state}; move it elsewhere"
    )


def refuse_overlap(
    out: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *files: object,
    what: str,
) -> None:
    """Raises ValueError when writing `out` would touch what it is made from; links are followed.

    Args:
        out: the directory to make.
        source: the directory that it is made from; `out` must not lie in it.
        files: further inputs; what is no path is passed over.
    """
    target = _absolute(out)
    resolved = target.parent.resolve() / target.name
    inside = Path(source).resolve()
    if inside in (resolved, *resolved.parents):
        raise ValueError(f"{what}: target must lie outside {source}, got {out}")
    # Where the target is written before it has its name; a run removes what lies there.
    partial = partial_path(target)
    places = {resolved.with_name(partial.name), partial.resolve()}
    for path in (source, *files):
        if not isinstance(path, str | os.PathLike):
            continue
        for own in {Path(path).resolve(), _absolute(path)}:
            if places & {own, *own.parents}:
                raise ValueError(
                    f"{what}: {path} must lie outside {partial}, where {out} is written until it "
                    "is whole"
                )


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


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would follow the last link)


def _refuse_existing(target: Path, what: str) -> None:
    if os.path.lexists(target):
        raise ValueError(f"{what}: target must not exist, got {target}")


def _lock(partial: Path, what: str) -> int:
    while True:
        partial.mkdir(exist_ok=True)
        try:
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # the run that held it has just removed it
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
        # The run that held the lock may have removed the directory meanwhile.
        try:
            if os.path.samestat(os.fstat(lock), partial.lstat()):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)


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

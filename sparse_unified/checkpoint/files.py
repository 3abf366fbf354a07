# SPDX-License-Identifier: Apache-2.0
"""Files and directories of models: read strictly, listed, and written complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

# The file that says that a partial directory is ours to remove.
MARKER = "sparse_unified.partial"
_LONGEST_NAME = 200  # bytes; file systems take 255, and a temporary name is a little longer


# Reading


def require_regular(path: Path) -> None:
    """Raises ValueError for what never ends or waits for a writer: devices, pipes and sockets.

    Links are followed, as those of a hub's cache are; OSError where there is nothing to follow.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: file must be a regular file, got {stat.filemode(mode)}")


def read_text(path: Path) -> str:
    """Reads a UTF-8 file without touching its line ends; raises ValueError when it is none."""
    try:
        require_regular(path)
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path}: file must be readable, got {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: file must be UTF-8, got {error.reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; raises ValueError when it is none."""
    return parse_json(path, read_text(path))


def parse_json(path: Path, text: str) -> dict[str, Any]:
    """Parses a JSON object; raises ValueError with the path when it is none."""
    try:
        value = loads_strict(text)
    except ValueError as error:
        raise ValueError(f"{path}: file must be JSON, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: file must hold a JSON object, got {type(value).__name__}")
    return value


def loads_strict(text: str, *, finite: bool = False) -> Any:
    """Parses JSON text with distinct keys, moderate nesting, and strings that can be encoded.

    Args:
        finite: refuse NaN and infinities, which Python's json writes and no standard knows.

    Raises:
        ValueError: the text is something else; the message is the reason alone.
    """
    refuse = _refuse_constant if finite else None
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=refuse)
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"half of a surrogate pair, {error.object[error.start]!r:.120}"
            ) from None
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r:.80} twice")
            seen.add(key)
    return result


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"the number {constant}")


def is_plain_name(name: object) -> bool:
    """Tells whether `name` is a file name that stays in its directory."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(c in name for c in "/\\\0")
        and len(name.encode()) <= _LONGEST_NAME
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainFile:
    """One file of a directory: its path inside the directory, where it lies, its size."""

    name: Path
    source: Path
    nbytes: int


def list_files(directory: Path, *, skip: Collection[str] = (), what: str) -> list[PlainFile]:
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


# Writing


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name of its own, syncs it, and moves it into place.

    The mode of a file that was there stays.

    Raises:
        RuntimeError: the file system refuses; what was there before stays.
    """
    partial: str | None = None
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
            os.fchmod(handle, _mode(path))
            os.fsync(handle)
        finally:
            os.close(handle)
        Path(partial).replace(path)
        partial = None
    except OSError as error:
        raise RuntimeError(
            f"{path}: file must be writable with room to spare, got {error.strerror or error}"
        ) from error
    finally:
        if partial is not None:
            with suppress(OSError):
                Path(partial).unlink(missing_ok=True)


def _mode(path: Path) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def write_text(path: Path, text: str) -> None:
    """Writes a small UTF-8 file, byte for byte as given, and syncs it."""
    with path.open("xb") as stream:
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())


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

# SPDX-License-Identifier: Apache-2.0
"""Files and directories of models: read strictly, listed, and written complete or not at all."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import secrets
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from sparse_unified._common import StrPath, list_some

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# The file that says that a partial directory is ours to remove.
MARKER = "sparse_unified.partial"
# One call of the kernel moves at most this much, so that progress and Ctrl-C get their turn.
_RANGE_BYTES = 64 << 20

# Other systems send to sockets alone, or have none; Windows opens no directories.
_SENDS_FILES = sys.platform == "linux" and hasattr(os, "sendfile")
_DIRECTORY = getattr(os, "O_DIRECTORY", None)
_BINARY, _NONBLOCK = getattr(os, "O_BINARY", 0), getattr(os, "O_NONBLOCK", 0)

NUMBER = (int, float)  # a form of `has_form`
# What tells a file from another one under its name: device, inode, bytes, ns of the last change.
Stamp = tuple[int, int, int, int]


# Reading


def stamp_of(status: os.stat_result) -> Stamp:
    """Returns what changes when a file is replaced or rewritten."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def open_source(path: Path, stamp: Stamp | None = None) -> Iterator[io.FileIO]:
    """Opens a regular file to be read, unbuffered, and holds that it stays the same.

    Links are followed, as those of a hub's cache are. `stamp` is of the file when reading began, by
    default here.

    Raises:
        ValueError: there is nothing to read, or a device, pipe or socket, which may never end.
        RuntimeError: the file is gone, or another one than `stamp` tells, now or in the end.
    """
    try:
        # Not to wait for the writer of a pipe.
        stream = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | _NONBLOCK))
    except OSError as error:
        raise (ValueError if stamp is None else RuntimeError)(
            f"{path}: file must be readable, got {error.strerror}"
        ) from error
    with stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            kind = stat.filemode(status.st_mode)
            raise ValueError(f"{path}: file must be a regular file, got {kind}")
        yield stream
        refuse_change(path, stamp or stamp_of(status), os.fstat(stream.fileno()))


def refuse_change(path: Path, stamp: Stamp, status: os.stat_result) -> None:
    """Raises RuntimeError when a file is no longer the one that a stamp was taken of."""
    if stamp != stamp_of(status):
        raise RuntimeError(f"{path}: file must not change while it is read, got another one")


def cut_short(stream: io.FileIO, position: int) -> RuntimeError:
    """The error of a file that ends early, as it does when another process cuts it short."""
    return RuntimeError(
        f"{stream.name}: file must not change while it is read, got its end at byte {position}"
    )


def read_text(path: Path) -> str:
    """Reads a UTF-8 file without touching its line ends; raises ValueError when it is none."""
    try:
        with open_source(path) as stream:
            return stream.readall().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path}: file must be readable, got {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: file must be UTF-8, got {error.reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; raises ValueError when it is none."""
    return read_object(read_text(path), f"{path}: file")


def read_object(text: str | bytes, where: str, *, finite: bool = False) -> dict[str, Any]:
    """Reads text that must be a JSON object, as `loads_strict` does; `where` names it."""
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = loads_strict(decoded, finite=finite)
    except ValueError as error:
        raise ValueError(f"{where} must be a JSON object, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(value).__name__}")
    return value


def loads_strict(text: str, *, finite: bool = False) -> Any:
    """Parses JSON text with distinct keys, moderate nesting, and strings that can be encoded.

    `finite` refuses NaN and infinities, which Python's json writes and no standard knows. A
    ValueError gives the reason alone.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"key {twice!r:.80} twice")
        return result

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"the number {constant}")

    try:
        value = json.loads(
            text, object_pairs_hook=distinct, parse_constant=refuse if finite else None
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"half of a surrogate pair, {half!r:.120}") from None
    return value


def json_text(value: object) -> str:
    """Returns a JSON value as it is written for people: indented, and with a line end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def has_form(value: object, form: Any) -> bool:
    """Tells whether a JSON value has a form.

    That is a tuple of types; `[form]`, a list of such; `{str: form}`, an object of such; or `{key:
    form, ...}`, an object with these keys.
    """
    if isinstance(form, list):
        return isinstance(value, list) and all(has_form(item, form[0]) for item in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        form = dict.fromkeys(value, form[str]) if str in form else form
        return value.keys() == form.keys() and all(has_form(value[k], f) for k, f in form.items())
    return type(value) in form


def is_plain_name(name: object) -> bool:
    """Tells whether `name` is a file name that stays in its directory."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(c in name for c in "/\\\0")
        and len(name.encode()) <= 200  # file systems take 255, a temporary name is a bit longer
    )


def list_files(directory: Path) -> dict[str, os.stat_result]:
    """Lists all files below a directory, `{path in it: status}`, links to files among them.

    What is taken from elsewhere is logged, unless it is the hub's cache.

    Raises:
        ValueError: something can not be read, is neither a file nor a directory, or is a link to
            a directory or to nothing.
    """
    root = directory.resolve()
    own = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    found: dict[str, os.stat_result] = {}
    foreign, pending = [], [directory]
    try:
        for folder in pending:  # which grows
            for path in folder.iterdir():
                status, is_link = path.stat(), path.is_symlink()
                if stat.S_ISDIR(status.st_mode) and not is_link:
                    pending.append(path)
                    continue
                if not stat.S_ISREG(status.st_mode):
                    kind = "a link to a directory" if stat.S_ISDIR(status.st_mode) else "neither"
                    raise ValueError(f"{path} must be a file or a directory, got {kind}")
                found[str(path.relative_to(directory))] = status
                if is_link and not any(map(path.resolve().is_relative_to, own)):
                    foreign.append(f"{path.relative_to(directory)} -> {path.resolve()}")
    except OSError as error:
        raise ValueError(f"{error.filename} must be readable, got {error.strerror}") from error
    if foreign:
        logger.warning("links lead out of the directory: %s", list_some(foreign))
    return dict(sorted(found.items()))


# Writing


@contextmanager
def create_file(path: Path, *, mode: int = 0o666) -> Iterator[int]:
    """Creates a file where nothing is, yields its descriptor, and syncs it when all went well."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, mode)
    try:
        yield handle
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(
    handle: int, data: bytes | np.ndarray, advance: Callable[[int], object] = lambda nbytes: None
) -> None:
    """Writes all of some bytes, or of an array; `advance` gets the bytes of each piece."""
    view = memoryview(data) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data
    while view:
        count = os.write(handle, view[:_RANGE_BYTES])
        advance(count)
        view = view[count:]


def copy_range(
    source: io.FileIO, start: int, nbytes: int, target: int, advance: Callable[[int], object]
) -> None:
    """Appends bytes of an open file to another, in the kernel; RuntimeError where it ends early."""
    position, end = start, start + nbytes
    while position < end:
        limit = min(end - position, _RANGE_BYTES)
        if _SENDS_FILES:
            count = os.sendfile(target, source.fileno(), position, limit)
        else:
            source.seek(position)
            block = source.read(limit)
            write_all(target, block)
            count = len(block)
        if count == 0:
            raise cut_short(source, position)
        advance(count)
        position += count


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name of its own, syncs it, and moves it into place.

    The mode of a file that was there stays; a link is replaced, never written through.

    Raises:
        RuntimeError: the file system refuses; what was there before stays.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with create_file(partial) as handle:
            with suppress(FileNotFoundError):
                partial.chmod(stat.S_IMODE(path.stat().st_mode))
            write_all(handle, data)
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if not isinstance(error, OSError):
            raise
        raise RuntimeError(
            f"{path}: file must be writable with room to spare, got {error.strerror or error}"
        ) from error


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Creates a small UTF-8 file, byte for byte as given."""
    with create_file(path, mode=mode) as handle:
        write_all(handle, text.encode())


def partial_path(out: StrPath) -> Path:
    """Returns the sibling directory in which `out` is written before it gets its name.

    It holds `MARKER` and one directory, named as `out`, that is renamed to `out` when it is whole.
    """
    target = _absolute(out)
    return target.with_name(f".{target.name}.partial")


@contextmanager
def atomic_directory(out: StrPath, *, mode: int = 0o777) -> Iterator[Path]:
    """Yields an empty directory beside `out` that becomes `out` when the block ends well.

    The sibling `partial_path(out)` that holds it is locked while it is written, so two runs never
    mix; what a killed run left in it is removed, if it carries the marker of such a run. Names are
    synced to disk before the one rename that makes `out` appear. When the block fails, the sibling
    is removed.

    Raises:
        ValueError: as of `check_target`.
        RuntimeError: another run is writing the same target, or the file system refuses to.
    """
    target, partial = _absolute(out), partial_path(out)
    content = partial / target.name

    def remove() -> None:
        # The marker goes last, so that what a run killed here leaves is known as ours.
        with suppress(OSError):
            if (partial / MARKER).exists():
                shutil.rmtree(content, ignore_errors=True)
            (partial / MARKER).unlink(missing_ok=True)
            partial.rmdir()

    with ExitStack() as stack:
        try:
            check_target(out)
            stack.callback(os.close, _make_locked(partial))
            stack.callback(remove)
            check_target(out)
            if content.exists():
                logger.warning("removing what an interrupted run left in %s", partial)
                shutil.rmtree(content)
            with (partial / MARKER).open("wb") as stream:
                os.fsync(stream.fileno())
            content.mkdir(mode=mode | stat.S_IRWXU)
            yield content
            # Files are synced by whoever writes them; here it is the names.
            for folder, _, _ in os.walk(content):
                _sync(folder)
            check_target(out)
            content.rename(target)
            with suppress(PermissionError):  # a parent may be written and not read
                _sync(target.parent)
        except OSError as error:
            raise RuntimeError(
                f"{error.filename or target} must be accessible with room to spare, "
                f"got {error.strerror or error}"
            ) from error


def _lock(handle: int, refusal: Exception) -> None:
    """Locks what is open; raises `refusal` where another process has. Windows locks nothing."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise refusal from None
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
            raise
        logger.warning("this file system has no locks; run one process at a time")


@contextmanager
def locked(folder: Path, refusal: Exception) -> Iterator[None]:
    """Keeps other processes out of a folder, by its file `.lock`; raises `refusal` if one is in."""
    with (folder / ".lock").open("a") as lock:
        _lock(lock.fileno(), refusal)
        yield


def _make_locked(partial: Path) -> int:
    """Makes a directory if there is none, and returns a descriptor that locks it."""
    refusal = RuntimeError(f"target must be written by one run at a time, got another at {partial}")
    while True:
        partial.mkdir(exist_ok=True)
        if _DIRECTORY is None:
            return os.open(os.devnull, os.O_RDONLY)
        # The run that held the lock may have removed the directory meanwhile.
        with suppress(FileNotFoundError), ExitStack() as stack:
            lock = os.open(partial, os.O_RDONLY | _DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, lock)
            _lock(lock, refusal)
            if os.path.samestat(os.fstat(lock), partial.lstat()):
                stack.pop_all()
                return lock


def _sync(directory: str | Path) -> None:
    if _DIRECTORY is None:
        return
    handle = os.open(directory, os.O_RDONLY | _DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_target(out: StrPath, source: StrPath | None = None, *others: object) -> Path:
    """Returns the absolute path of a directory to make; ValueError where it cannot be made.

    It must not exist, its parent must, what stands at `partial_path(out)` must have been left by a
    run of ours, and writing must not touch what it is made from; links are followed.

    Args:
        out: the directory to make.
        source: the directory that it is made from; `out` must not lie in it.
        others: further inputs; what is no path is passed over.
    """
    target, partial = _absolute(out), partial_path(out)
    resolved = target.parent.resolve() / target.name
    if source is not None and to_path(source, "source").resolve() in (resolved, *resolved.parents):
        raise ValueError(f"target must lie outside {source}, got {out}")
    # Where the target is written before it has its name; a run removes what lies there.
    places = {resolved.with_name(partial.name), partial.resolve()}
    for path in (source, *others):
        if isinstance(path, str | os.PathLike):
            for own in (_absolute(path, "input"), Path(path).resolve()):
                if places & {own, *own.parents}:
                    raise ValueError(
                        f"{path} must lie outside {partial}, where {out} is written until "
                        "it is whole"
                    )
    if os.path.lexists(target):
        raise ValueError(f"target must not exist, got {target}")
    if not target.parent.is_dir():
        raise ValueError(f"parent of {out} must be a directory, got {target.parent}")
    is_folder = partial.is_dir() and not partial.is_symlink()
    found = list(partial.iterdir()) if is_folder else [partial] * os.path.lexists(partial)
    names = {path.name for path in found}
    own_names = MARKER in names and names <= {MARKER, target.name}
    if (names and not own_names) or any(path.is_symlink() for path in found):
        raise ValueError(
            f"{partial} must be absent or left by an interrupted run, which may be "
            f"removed, got {list_some(sorted(names))}; move it elsewhere"
        )
    return target


def to_path(value: object, name: str) -> Path:
    """Returns a path that was given; TypeError or ValueError tell argument `name` if it is none."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise TypeError(f"{name} must be a path, got {value!r:.120}")
    if "\0" in os.fspath(value):
        raise ValueError(f"{name} must be a path, got a NUL character in {value!r:.120}")
    return Path(value)


def _absolute(path: object, name: str = "target") -> Path:
    return Path(os.path.abspath(to_path(path, name)))  # noqa: PTH100  (resolve follows links)

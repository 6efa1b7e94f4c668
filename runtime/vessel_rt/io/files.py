"""Regular files that a user names: opened without waiting, and read up to a given size.

A FIFO without a writer, a terminal or /dev/zero in place of a file would make a reader wait, or fill the memory. Does not know what is in
a file: every fault is an OSError whose `strerror` says what was found.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vessel_rt.errors import VesselError

__all__ = ["is_temporary", "missing_part", "open_regular", "read_regular", "replacing", "require_regular", "sync", "writing"]

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of some network file systems

_TEMPORARY = re.compile(r"\.\d+-\d+\.tmp")

_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "a folder, not a file"),
    (stat.S_ISFIFO, errno.EINVAL, "a FIFO, not a regular file"),
    (stat.S_ISSOCK, errno.EINVAL, "a socket, not a regular file"),
    (stat.S_ISCHR, errno.EINVAL, "a device, not a regular file"),
    (stat.S_ISBLK, errno.EINVAL, "a device, not a regular file"),
)


def require_regular(path: Path) -> os.stat_result:
    """The status of a regular file, without opening it; symbolic links are followed.

    Raises:
        OSError: it does not exist, its name is too long or invalid, access is denied, or it is not a regular file.
    """
    try:
        return _checked(os.stat(path), path)
    except ValueError as e:  # a zero byte, or a lone surrogate: no file can have that name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from e


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open for reading; never blocks. Raises OSError as `require_regular`, or if it may not be read."""
    require_regular(path)
    # Another file may have taken the name since: O_NONBLOCK opens even a FIFO at once, and the opened file is checked again.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        _checked(os.fstat(file.fileno()), path)
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError as `open_regular`, or if the file is larger."""
    with open_regular(path) as file:
        size = min(os.fstat(file.fileno()).st_size, limit)
        content = file.read(size + 1)
        if size < len(content) <= limit:  # it grows, or is in /proc, where files claim to be empty
            content += file.read(limit - len(content) + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {_size(limit)}", str(path))
    return content


def missing_part(path: Path) -> str:
    """Which component of a path does not exist, counted from the left, for messages that do not show the path."""
    steps = [step for step in (*reversed(path.parents), path) if step.name]
    for number, step in enumerate(steps, start=1):
        try:
            os.stat(step)
        except (OSError, ValueError) as e:
            which = f"part {number} of {len(steps)} of its path" if len(steps) > 1 else "it"
            if isinstance(e, PermissionError):
                return f"{which} may not be looked at ({e.strerror})"
            if os.path.islink(step):
                return f"{which} is a link to what is not there"
            return f"{which} does not exist" if len(steps) > 1 else "it is not in the current folder"
    return "it is there now"


def _checked(found: os.stat_result, path: Path) -> os.stat_result:
    for is_kind, number, kind in _KINDS:
        if is_kind(found.st_mode):
            raise OSError(number, kind, str(path))
    return found


def _size(limit: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if limit >= unit:
            return f"{limit / unit:g} {name}"
    return f"{limit} bytes"


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary path next to `path` to write to. It is renamed to `path` if the block succeeds, and removed if not.

    With `sync` the content is on the disk before the rename, and the rename before the block ends: after a power failure `path` is the old
    file or the new one, and it is the new one if the block had ended.

    Raises OSError if the file cannot be written; see `writing`.
    """
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")  # short: the name itself may be as long as names can be
    try:
        yield temporary
        if sync:
            _sync_path(temporary, os.O_RDWR)  # Windows refuses a descriptor that is only for reading
        os.replace(temporary, path)
        if sync and os.name == "posix":
            _sync_path(path.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def sync(descriptor: int) -> None:
    """Wait until the content of an open file is on the disk, where the file system offers that. Raises OSError."""
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in _CANNOT_SYNC:
            raise


def _sync_path(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether a file has the name of a temporary file of `replacing`."""
    return _TEMPORARY.fullmatch(path.name) is not None


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Turn an OSError in the block (no space, no permission, name too long) into the VesselError that `what` cannot be written."""
    try:
        yield
    except OSError as e:
        raise VesselError(f"{what}: cannot be written ({e.strerror or type(e).__name__})") from e

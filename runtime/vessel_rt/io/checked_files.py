"""Files whose content matches a record, and whether it still does. Does not know about bundles.

A file is hashed once. After that its identity shows that it was not touched: device, inode, size, and the times of the last change of
content and of status, which every write moves. Where the system has file leases (Linux, on local file systems), writes even wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, TypeAlias

from vessel_rt.io.files import open_regular

__all__ = ["CheckedFiles", "Record", "changes", "check_files", "leases", "sha256_of"]

_CHUNK = 1 << 20  # bytes hashed between two calls of `progress`
_LARGE, _LARGE_CHUNK = 1 << 28, 1 << 23  # bytes of a file that two threads read and hash, and of its pieces
_READERS = 4  # files hashed at once: a disk is faster than one core


class Record(Protocol):
    """What a file has to be: its size in bytes and its SHA-256, in hexadecimal."""

    @property
    def bytes(self) -> int: ...

    @property
    def sha256(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class _Identity:
    """How the file system identifies a file. `status_changed` also moves without a change of content, for example with a new hard link."""

    device: int
    inode: int
    size: int
    changed: int
    status_changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclasses.dataclass(frozen=True)
class _CheckedFile:
    record: Record
    identity: _Identity


CheckedFiles: TypeAlias = "dict[Path, _CheckedFile]"


def check_files(
    folder: Path, records: Mapping[str, Record | None], progress: Callable[[int], object] | None = None
) -> tuple[CheckedFiles, tuple[str, ...]]:
    """Compare files of `folder` with their records.

    A name is a relative path; no part of it may be a symbolic link, so that the file lies in the folder. Several files are read at
    once; `progress` gets the number of bytes read each time, from one thread at a time.

    Returns:
        The files that match, and what is wrong with the others, in words.
    """
    lock, stopped = threading.Lock(), threading.Event()

    def advance(read: int) -> None:
        with lock:
            if stopped.is_set():
                raise InterruptedError
            if progress:
                progress(read)

    with ThreadPoolExecutor(_READERS) as pool:
        try:
            found = dict(zip(records, pool.map(lambda name: _check(folder, name, records[name], advance), records), strict=True))
        except BaseException:  # an interrupt must not wait until gigabytes are read
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    good = {folder / name: file for name, file in found.items() if isinstance(file, _CheckedFile)}
    return good, tuple(f"{name} {fault}" for name, fault in found.items() if isinstance(fault, str))


def _check(folder: Path, name: str, record: Record | None, progress: Callable[[int], object]) -> _CheckedFile | str:
    """The file, or what is wrong with it."""
    if record is None:
        return "has no recorded SHA-256"
    if any((folder / part).is_symlink() for part in [PurePosixPath(name), *PurePosixPath(name).parents[:-1]]):
        return "is or lies behind a symbolic link"
    try:
        with open_regular(folder / name) as file:
            before = _Identity.of(os.fstat(file.fileno()))
            if before.size != record.bytes:
                return f"has {before.size} bytes, not {record.bytes}"
            if _sha256(file, progress) != record.sha256:
                return "was changed (its SHA-256 differs)"
            return _CheckedFile(record, before) if _Identity.of(os.fstat(file.fileno())) == before else "was changed while it was read"
    except InterruptedError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as e:
        return f"cannot be read ({e.strerror})"


def changes(files: CheckedFiles) -> Iterator[tuple[Path, str]]:
    """The files that changed, or may have changed, since they were hashed, and what happened to them.

    If only the status has changed, the file is hashed again, and its identity is updated.
    """
    for path, file in list(files.items()):
        try:
            now = _Identity.of(path.stat(follow_symlinks=False))
            if now == file.identity:
                continue
            if dataclasses.replace(now, status_changed=file.identity.status_changed) != file.identity:
                yield path, "was changed or replaced"
                continue
        except OSError as e:
            yield path, f"is gone ({e.strerror})"
            continue
        checked = _check(path.parent, path.name, file.record, lambda read: None)
        if isinstance(checked, str):
            yield path, checked
        else:
            files[path] = checked


@contextlib.contextmanager
def leases(paths: Iterable[Path]) -> Iterator[Callable[[], list[Path]]]:
    """Hold read leases in the block: a process that opens one of the files for writing waits until the block ends, 45 s by default.

    There are no leases on files of another user, on files that are open for writing, on most network file systems, or outside Linux.

    Returns:
        A function that returns the files that a process waits for now, or has waited for too long.
    """
    held: dict[Path, int] = {}
    with contextlib.ExitStack() as stack:
        for path in paths if sys.platform == "linux" else ():
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                _take_lease(descriptor)
                held[path] = descriptor
        yield lambda: [path for path, descriptor in held.items() if not _has_lease(descriptor)]


def _take_lease(descriptor: int) -> None:
    import fcntl

    # The kernel announces a writer by a signal. This one is ignored by default; the default one would end the process.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)


def _has_lease(descriptor: int) -> bool:
    """Whether the lease is held and no process waits for its end."""
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK


def sha256_of(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; `progress` gets the number of bytes read, piece by piece."""
    with path.open("rb", buffering=0) as file:
        return _sha256(file, progress)


def _sha256(file: IO[Any], progress: Callable[[int], object] | None) -> str:
    """The next piece is read while one is hashed: of a large file in memory, reading takes half as long as hashing."""
    digest, size = hashlib.sha256(), os.fstat(file.fileno()).st_size
    with ThreadPoolExecutor(1) if size > _LARGE else contextlib.nullcontext() as reader:
        chunk = _LARGE_CHUNK if reader else _CHUNK
        piece = file.read(chunk)
        while piece:
            following = reader.submit(file.read, chunk) if reader else None
            digest.update(piece)
            if progress:
                progress(len(piece))
            piece = following.result() if following else file.read(chunk)
    return digest.hexdigest()

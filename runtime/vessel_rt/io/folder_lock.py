"""A lock on a folder, so that one command works in it at a time. Does not know which command, nor what is in the folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vessel_rt.errors import VesselError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderLock", "locked"]


@dataclasses.dataclass(frozen=True)
class FolderLock:
    """A folder that this process has locked. `descriptor` is None if folders cannot be locked (Windows), or it does not exist."""

    folder: Path
    descriptor: int | None

    def check(self) -> None:
        """Raise VesselError if the folder was moved or replaced since it was locked."""
        if self.descriptor is None:
            return
        if not _is_open_as(self.descriptor, self.folder):
            raise VesselError(
                f"{self.folder}: was moved or replaced while a command wrote there; the finished results are in the folder that was moved"
            )


@contextmanager
def locked(folder: Path, *, make: bool = False, shared: bool = False) -> Iterator[FolderLock]:
    """Lock a folder until the block ends. On a file system without locks this does nothing.

    The system releases the lock when the process ends, however it ends. The lock leaves no file.

    Args:
        folder: if it does not exist, it is not locked unless `make` is set.
        make: create the folder and its parents; those that are still empty at the end of the block are removed again.
        shared: other processes may also lock it, if they share it.

    Raises:
        VesselError: another process has locked it, or it cannot be created or opened.
    """
    if fcntl is None or not (make or folder.is_dir()):
        if make:
            _made(folder)
        yield FolderLock(folder, None)
        return
    made, descriptor = _opened(folder, make, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        yield FolderLock(folder, descriptor)
    finally:
        with contextlib.suppress(OSError):  # stops at the first that is not empty
            for path in made if _is_open_as(descriptor, folder) else ():
                path.rmdir()
        os.close(descriptor)


def _opened(folder: Path, make: bool, kind: int) -> tuple[list[Path], int]:
    """The folders that were created, the innermost first, and the descriptor that holds the lock."""
    made: list[Path] = []
    while True:
        made = (_made(folder) if make else []) or made
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # just removed by the process that created it
            if make:
                continue
            raise
        except OSError as e:
            raise VesselError(f"{folder}: cannot be read ({e.strerror})") from e
        try:
            _lock(folder, descriptor, kind)
            if _is_open_as(descriptor, folder):
                return made, descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the folder was removed before it was locked


def _lock(folder: Path, descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise VesselError(f"{folder}: another command is at work in this folder; wait until it ends, or choose another folder") from None
    except OSError:  # no locks on this file system
        pass


def _made(folder: Path) -> list[Path]:
    """Create a folder and its parents; returns those that did not exist, the innermost first. Raises VesselError."""
    try:
        if folder.exists() and not folder.is_dir():
            raise VesselError(f"{folder}: is a file; choose another output folder with -o")
        absent = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise VesselError(f"{folder}: cannot be written ({e.strerror})") from e
    return absent


def _is_open_as(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False

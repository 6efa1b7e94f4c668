"""Folders where space ends soon.

A limit on the size of files needs no rights and no file system of its own. A full file system also refuses new files, folders and names,
which the limit does not; it needs the right to mount one.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest


@dataclasses.dataclass(frozen=True)
class SmallDisk:
    """A folder in which writing fails, sooner or later, within `full(limit)`, and what the system says then.

    `limit` is in bytes of a file; a file system that is small by itself does not look at it.
    """

    folder: Path
    message: str
    full: Callable[[int], AbstractContextManager[None]]


@contextmanager
def limited_files(folder: Path) -> Iterator[SmallDisk]:
    """A folder for files of limited size."""
    pytest.importorskip("resource", reason="limits of POSIX")
    folder.mkdir()
    yield SmallDisk(folder, "File too large", _limit)


@contextmanager
def _limit(size: int) -> Iterator[None]:
    """No file may become larger than `size` bytes, in this process and in those it starts: Python ignores the signal, and a write fails."""
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def mounted(folder: Path) -> Iterator[SmallDisk]:
    """A file system of 1 MiB."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if os.name != "posix" or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own may not be mounted here")
    try:
        yield SmallDisk(folder, "No space left on device", lambda _: nullcontext())
    finally:
        subprocess.run(["umount", folder], check=True)

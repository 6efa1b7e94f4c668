"""Files and folders of an export: staging, hard links, and the system's page cache. Does not know what the files hold."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["drop_from_cache", "link_or_copy", "scratch_folder", "staging"]


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """An empty folder next to `target` for unfinished files. It is removed when the block ends; so is, first, what a killed run left."""
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A scratch folder that is renamed to `out` if the block succeeds: `out` is complete or missing, and an older `out` is replaced."""
    out.parent.mkdir(parents=True, exist_ok=True)
    old = out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():  # an earlier run was killed between its two renames
        os.replace(old, out)
    shutil.rmtree(old, ignore_errors=True)
    with scratch_folder(out) as folder:
        try:
            yield folder
            if out.exists():
                os.replace(out, old)
            os.replace(folder, out)
        except BaseException:
            if old.exists() and not out.exists():  # interrupted between the two renames
                os.replace(old, out)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> bool:
    """Hard-link `target` to `source`, or copy it if the disk has no hard links; returns whether it is a link."""
    try:
        os.link(source, target)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)
        return False
    return True


def drop_from_cache(file: BinaryIO) -> None:
    """Have the system write out `file`'s bytes now, and drop those that are on the disk and not mapped from its page cache.

    An export uses each byte once, and reused memory is faster than fresh memory. Does nothing on systems without such a call.
    """
    if sys.platform == "linux":
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

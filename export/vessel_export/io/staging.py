"""A folder that is complete or not there: made beside its place, and renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["staging"]


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block succeeds, and vanishes when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():  # a run was killed between its two renames
        os.replace(old, out)
    for leftover in (folder, old):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        try:
            if out.exists():
                os.replace(out, old)
            os.replace(folder, out)
        except BaseException:  # an interrupt between the two, too
            if old.exists() and not out.exists():
                os.replace(old, out)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

"""Checks files of Hugging Face's cache, whose names are their SHA-256, in a thread while others read them. Does not know models."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vessel_export.errors import BaseModelError
from vessel_export.io.files import drop_from_cache

__all__ = ["hashing", "recorded_sha256"]

_PIECE = 1 << 22  # bytes hashed between two checks of whether to stop
_FLUSH = 1 << 26  # bytes after which what was read is dropped from the page cache


def recorded_sha256(path: Path) -> str | None:
    """The SHA-256 that the cache records for `path`: `snapshots/<revision>/<name>` links to `blobs/<sha256>`. None for other files."""
    real = path.resolve()
    return real.name if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name) else None


@contextlib.contextmanager
def hashing(files: Sequence[Path]) -> Iterator[Callable[[], None]]:
    """Hash those of `files` that are in the cache while the block runs. Call the value of the block once to wait for the result.

    Raises:
        BaseModelError: (by that call) a file is not the one that was downloaded.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        checks = [thread.submit(_check, path, sha256, stop) for path in files if (sha256 := recorded_sha256(path))]

        def wait() -> None:
            for check in checks:
                check.result()

        try:
            yield wait
        finally:
            stop.set()


def _check(path: Path, sha256: str, stop: threading.Event) -> None:
    digest, unflushed = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while not stop.is_set() and (piece := file.read(_PIECE)):
            digest.update(piece)
            unflushed += len(piece)
            if unflushed >= _FLUSH:
                drop_from_cache(file)
                unflushed = 0
    if not stop.is_set() and digest.hexdigest() != sha256:
        raise BaseModelError(f"{path}: damaged, its SHA-256 is not {sha256[:12]}... as when it was downloaded; download it again")

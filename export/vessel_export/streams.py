"""Standard output and error of a command whose work counts, not what it says: closed, full or unread, they end nothing."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

__all__ = ["forgiving_streams"]


class _Forgiving(io.FileIO):
    """A file descriptor to write to, as long as that works; `failure` is the error that ended it."""

    failure: OSError | None = None

    def write(self, data: object, /) -> int:
        if self.failure is None:
            try:
                return super().write(data)  # type: ignore[arg-type]
            except OSError as e:
                self.failure = e
        return len(memoryview(data))  # type: ignore[arg-type]


class _Output:
    """What became of standard output within `forgiving_streams`."""

    def __init__(self, raw: _Forgiving | None) -> None:
        self._raw = raw

    @property
    def failure(self) -> OSError | None:
        """Why not all of it was written; None if it was, or if there was no standard output from the start."""
        sys.stdout.flush()
        return self._raw.failure if self._raw else None


@contextlib.contextmanager
def forgiving_streams() -> Iterator[_Output]:
    """Within the block, nothing that is printed raises an OSError, and characters that the terminal's encoding lacks are escaped."""
    for descriptor in range(3):  # a closed one would become the next file that is opened, and take what libraries print
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, raw = _forgiving(sys.stdout, sys.__stdout__)
    error, _ = _forgiving(sys.stderr, sys.__stderr__)
    sys.stdout, sys.stderr = out, error
    try:
        yield _Output(raw)
    finally:
        out.flush()
        error.flush()
        if None not in before:
            sys.stdout, sys.stderr = before


def _forgiving(stream: TextIO | None, original: TextIO | None) -> tuple[TextIO, _Forgiving | None]:
    if stream is None:  # closed
        return open(os.devnull, "w", encoding="utf-8"), None
    if stream is not original:  # somebody's own
        return stream, None
    stream.flush()
    raw = _Forgiving(stream.fileno(), "wb", closefd=False)
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, stream.encoding, "backslashreplace", line_buffering=stream.isatty() or stream is sys.stderr), raw

"""Standard output and error that may be closed or full, or that nobody reads. Does not know what is printed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

__all__ = ["standard_streams"]


class _Tolerant:
    """A text stream that stores its first error of writing in `fault` instead of raising it; otherwise like the stream itself.

    After an error everything goes to the null device, so that buffered text does not fail again when the process ends.
    """

    def __init__(self, stream: TextIO | None) -> None:
        closed = OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.fault: OSError | None = closed if stream is None else None
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as e:
            self._give_up(e)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as e:
            self._give_up(e)

    def _give_up(self, error: OSError) -> None:
        self.fault = self.fault or error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def standard_streams() -> Iterator[_Tolerant]:
    """In the block, `sys.stdout` and `sys.stderr` raise nothing. Yields the first, whose `fault` is set if not everything was printed.

    Closed descriptors among 0 to 2 are opened on the null device first: otherwise a file of the run could get such a number, and prints
    would go into it. Child processes inherit them.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
    before = sys.stdout, sys.stderr
    out, err = _Tolerant(sys.stdout), _Tolerant(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before

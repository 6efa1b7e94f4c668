"""The child's side of a process that its parent talks to through standard input and output. Does not know what they say."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import BinaryIO

__all__ = ["die_with_parent", "parent_pipes"]

_PR_SET_PDEATHSIG = 1


def parent_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes from and to the parent, for a process that ends with it and leaves Ctrl-C to it.

    From now on libraries print to standard error instead of the pipe.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(2, sys.stdout.fileno())
    return sys.stdin.buffer, replies


def die_with_parent() -> None:
    """Let the system kill this process when its parent ends, even if it hangs or is stopped (Linux; elsewhere its input ends)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

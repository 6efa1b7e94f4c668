"""Reading and writing files larger than memory without filling it: each byte of an export's files is used once."""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

__all__ = ["let_go"]


def let_go(file: BinaryIO) -> None:
    """Have the system write `file`'s bytes out now, and keep no copy of those that are on the disk and not mapped.

    Memory used again is faster than memory taken anew, and what else runs keeps its own. Does nothing where the system knows no such call.
    """
    if sys.platform == "linux":
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

"""What bundle.json and an engine's sidecar say of a file. Does not know how it is checked (io/checked_files.py)."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from vessel_rt.formats.schema import Within

__all__ = ["FileRecord"]


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    bytes: Annotated[int, Within(0, 2**50)]
    sha256: str

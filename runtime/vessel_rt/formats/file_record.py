"""What bundle.json and an engine's sidecar say of a file. Does not know how it is checked (io/checked_files.py)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from vessel_rt.formats.schema import Sha256

__all__ = ["FileRecord"]


class FileRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """One file.

    Attributes:
        bytes: its size.
        sha256: the SHA-256 of its content, in hexadecimal.
    """

    bytes: Annotated[int, Meta(ge=0, le=2**50)]
    sha256: Sha256

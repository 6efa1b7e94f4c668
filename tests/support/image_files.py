"""Small image files that Pillow does not write, byte by byte: PNG of every depth, and TIFF with tags of one's own."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of PNG, by channels: gray, gray and alpha, RGB, RGBA


def png(values: npt.NDArray[Any], bits: int | None = None) -> bytes:
    """A PNG of `values` [height, width] or [height, width, channels], of 8 or 16 bits as their type has; or of fewer `bits`, for gray."""
    values = values if values.ndim == 3 else values[..., None]
    height, width, channels = values.shape
    if bits:
        packed = np.unpackbits(values.astype(np.uint8), axis=2)[..., -bits:].reshape(height, -1)
        lines = [row.tobytes() for row in np.packbits(packed, axis=1)]
    else:
        lines = [row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values]
    header = struct.pack(">IIBBBBB", width, height, bits or 8 * values.itemsize, _COLOUR_TYPES[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, data) for name, data in chunks)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(values: npt.NDArray[Any], tags: dict[int, tuple[int, int]] | None = None) -> bytes:
    """An uncompressed little-endian TIFF of one strip; `tags`, by type (3: 16 bits, 4: 32) and value, go before what `values` say."""
    height, width = values.shape[:2]
    of_all = {256: (4, width), 257: (4, height), 258: (3, 8 * values.itemsize), 259: (3, 1), 262: (3, 1), 273: (4, 0), 277: (3, 1)}
    of_all |= {278: (4, height), 279: (4, values.nbytes)} | (tags or {})
    of_all[273] = (4, 8 + 2 + 12 * len(of_all) + 4)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(of_all.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(of_all)) + entries + bytes(4) + values.tobytes()

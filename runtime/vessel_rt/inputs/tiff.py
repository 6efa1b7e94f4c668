"""What Pillow does not report about a TIFF file: its pages, missing pixels, and libtiff's errors. Does not decode anything."""

from __future__ import annotations

import ctypes
import functools
import io
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import _imaging
from PIL.TiffImagePlugin import PREFIXES, TiffImageFile

from vessel_rt.errors import ImageError

__all__ = ["PageFile", "check_data", "page_offsets", "raising_libtiff_errors"]

_STRIPS, _TILES = (273, 279), (324, 325)  # StripOffsets and StripByteCounts, TileOffsets and TileByteCounts
_OLD_JPEG = 6  # a compression whose strips may be described in another way
_DAMAGED = "damaged: the list of its pages is broken, or cut short"


def page_offsets(path: Path) -> tuple[int, ...]:
    """The byte at which the directory of each page begins; empty for a file that is not a TIFF.

    Raises:
        ImageError: the list of pages leads out of the file, or is circular.
        OSError: the file cannot be read.
    """
    status = path.stat()
    return _page_offsets(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)
def _page_offsets(path: Path, changed: int, size: int) -> tuple[int, ...]:
    """Not with Pillow: its list of pages takes quadratic time."""
    offsets: list[int] = []
    taken = 0
    with path.open("rb") as file:
        layout = _Layout.of(file.read(16))
        if layout is None:
            return ()
        at = layout.first
        while at:
            if at + layout.count_size > size:
                raise ImageError(_DAMAGED)
            file.seek(at)
            count = layout.number(file.read(layout.count_size))
            length = layout.count_size + layout.entry_size * count + layout.pointer_size
            taken += length  # directories do not overlap, so their number is bounded
            if count == 0 or at + length > size or taken > size:
                raise ImageError(_DAMAGED)
            offsets.append(at)
            file.seek(at + length - layout.pointer_size)
            at = layout.number(file.read(layout.pointer_size))
    return tuple(offsets)


class _Layout:
    """The layout of numbers in a TIFF or BigTIFF file; sizes in bytes."""

    def __init__(self, head: bytes) -> None:
        self._order = "<" if head.startswith(b"II") else ">"
        big = b"\x2b" in head[2:4]
        self.count_size, self.entry_size, self.pointer_size, self.pointer_at = (8, 20, 8, 8) if big else (2, 12, 4, 4)
        self.first = self.number(head[self.pointer_at : self.pointer_at + self.pointer_size])

    @classmethod
    def of(cls, head: bytes) -> _Layout | None:
        """None if the first 16 bytes are not those of a TIFF file."""
        return cls(head) if head.startswith(tuple(PREFIXES)) else None

    def number(self, data: bytes) -> int:
        """Raise ImageError if the data are cut short."""
        try:
            (number,) = struct.unpack(self._order + {2: "H", 4: "I", 8: "Q"}[len(data)], data)
        except KeyError:
            raise ImageError(_DAMAGED) from None
        return int(number)

    def pointer(self, offset: int) -> bytes:
        return struct.pack(self._order + {4: "I", 8: "Q"}[self.pointer_size], offset)


class PageFile(io.BufferedReader):
    """A TIFF file whose header names the page at `offset` as the first, so that Pillow need not read the pages before it."""

    def __init__(self, path: Path, offset: int) -> None:
        super().__init__(io.FileIO(path))
        layout = _Layout.of(super().read(16))
        self.seek(0)
        self._pointer = layout.pointer(offset) if layout else b""
        self._at = layout.pointer_at if layout else 0

    def read(self, size: int | None = -1, /) -> bytes:
        start = self.tell()
        data = super().read(size)
        place = self._at - start
        if 0 <= place <= len(data) - len(self._pointer):
            data = data[:place] + self._pointer + data[place + len(self._pointer) :]
        return data


def check_data(image: TiffImageFile, size: int) -> None:
    """Make sure that all strips or tiles of a page are in a file of `size` bytes.

    Raises:
        ImageError: some are missing, or lie beyond the end of the file.
    """
    tags = image.tag_v2
    offsets, counts = (tags.get(tag) for tag in (_TILES if _TILES[0] in tags else _STRIPS))
    if not offsets or tags.get(259) == _OLD_JPEG:
        return
    if len(offsets) < _expected(tags) or (counts and len(counts) < len(offsets)):
        raise ImageError("damaged: some of its strips or tiles are missing")
    if any(offset + count > size for offset, count in zip(offsets, counts or [1] * len(offsets), strict=False)):
        raise ImageError("cut short: its pixels end before they should")


def _expected(tags: Any) -> int:
    """The number of strips or tiles of a page."""
    width, height = tags[256], tags[257]
    across, down = (tags.get(322, width), tags.get(323, height)) if _TILES[0] in tags else (width, tags.get(278, height))
    if across < 1 or down < 1:
        raise ImageError("damaged: its strips or tiles have no size")
    planes = tags.get(277, 1) if tags.get(284, 1) == 2 else 1
    return int(-(-width // across) * -(-height // down) * planes)


@contextmanager
def raising_libtiff_errors() -> Iterator[None]:
    """In the block, errors of libtiff are raised; it prints nothing, neither here nor later.

    After most of them Pillow continues with what was decoded so far. If Pillow's libtiff cannot be reached (it may be linked into Pillow
    itself, as on Windows), such a file is still accepted.

    Raises:
        ImageError: libtiff could not decode all of the file.
    """
    _listen()
    before, _heard.error = _heard.error, False
    try:
        yield
        if _heard.error:
            raise ImageError("cannot be decoded completely: its compressed pixels are damaged")
    finally:
        _heard.error = before


class _Heard(threading.local):
    """Whether libtiff has reported an error, in the thread that decodes."""

    error = False


_heard = _Heard()
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)  # module, format, va_list


@functools.cache
def _listen() -> tuple[Any, ...]:
    """Replace the handlers with which libtiff prints to standard error; the new ones live as long as the returned value.

    Once per process: only Pillow uses its libtiff.
    """

    def heed(module: bytes | None, text: bytes | None, arguments: int | None) -> None:
        _heard.error = True

    error, warning = _HANDLER(heed), _HANDLER(lambda module, text, arguments: None)
    try:
        library = ctypes.CDLL(_imaging.__file__)  # a symbol is also found in the libraries that it is linked with
        library.TIFFSetErrorHandler(error)
        library.TIFFSetWarningHandler(warning)
    except (AttributeError, OSError):
        return ()
    return error, warning

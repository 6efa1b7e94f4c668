"""A DICOM file read within bounds: its data set, its header, and how many frames there is room for. Does not know about gray levels.

The file may be damaged or hostile, and it identifies a patient: what is wrong with it is an ImageError that quotes nothing from it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.inputs.images import MAX_SIDE, require_regular

__all__ = ["declared_frames", "error_kind", "load_pydicom", "open_dataset", "read_header"]

_SIZES = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PhotometricInterpretation")
_SEQUENCES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ModalityLUTSequence", "VOILUTSequence")
_TIMES = ("FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate")
_ITEM, _ITEM_OF_BIG_ENDIAN = b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00"  # the tag that begins an item of a sequence, or a fragment
_MAX_ELEMENTS = 150_000  # elements of a header: each takes microseconds and a kilobyte; an enhanced file of 1,000 frames has about 60,000
_MAX_INFLATED = 30  # times the size of a deflated file; 64 MiB are always allowed
_MIN_CODESTREAM = 2 + 13 + 10 + 2  # bytes of JPEG: SOI, SOF and SOS of one component, EOI; JPEG 2000 and RLE need more
_TOO_MANY_ELEMENTS = f"its header has more than {_MAX_ELEMENTS} elements"
_TOO_MANY_FRAMES = "its header claims more frames than the file can hold: cut short, or damaged"
_LIBRARIES = ("pydicom", "pylibjpeg", "libjpeg", "openjpeg")


def open_dataset(path: Path) -> Any:
    """The whole data set of a file, checked before anything is decoded. The last one is kept. Raises ImageError and FileNotFoundError."""
    status = path.stat()
    return _opened(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)
def _opened(path: Path, changed: int, size: int) -> Any:
    with _source(path) as source:
        dataset = _parsed(source)
    if "PixelData" not in dataset:
        if "EncryptedAttributesSequence" in dataset:
            raise ImageError("its attributes are encrypted, including its pixels")
        if _header_ends(path) < size - 16:  # pydicom drops an element that it cannot finish
            raise ImageError("cut short: its pixel data end before they should")
        raise ImageError("a DICOM file without pixel data (a report, a file of another kind, or one cut short)")
    for name in (*_SIZES, "BitsStored"):
        if not dataset.get(name):
            raise ImageError(f"its header has no {name}")
    if max(dataset.Rows, dataset.Columns) > MAX_SIDE:
        raise ImageError(f"{dataset.Columns}x{dataset.Rows} pixels are too many; sides up to {MAX_SIDE} are read")
    if not 0 < declared_frames(dataset) <= max(1, _room(dataset, io.BytesIO(dataset.PixelData), 0)):
        raise ImageError(_TOO_MANY_FRAMES)
    raw = [dataset.get_item(name).value for name in _SEQUENCES if name in dataset]  # bytes: pydicom parses them only when they are used
    if sum(value.count(tag) for value in raw if isinstance(value, bytes) for tag in (_ITEM, _ITEM_OF_BIG_ENDIAN)) > _MAX_ELEMENTS:
        raise ImageError(_TOO_MANY_ELEMENTS)
    return dataset


def declared_frames(dataset: Any) -> int:
    """How many frames the header says there are; one if it does not say. Raises ImageError."""
    try:
        return int(dataset.get("NumberOfFrames") or 1)
    except Exception:
        raise ImageError("its number of frames is not a number") from None


class _Source:
    """A file that allows a limited number of reads: a header may have millions of empty elements."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.tell, self.seek = file, file.tell, file.seek
        self._left = _MAX_ELEMENTS

    @property
    def is_spent(self) -> bool:
        return self._left < 0

    def read(self, size: int = -1) -> bytes:
        self._left -= 1
        if self.is_spent:
            raise ImageError(_TOO_MANY_ELEMENTS)
        return self.file.read(size)


@contextlib.contextmanager
def _source(path: Path) -> Iterator[_Source]:
    """The file, inflated if it is deflated. Whatever is wrong with it in the block becomes an ImageError that quotes nothing."""
    pydicom, source = load_pydicom(), None
    try:
        require_regular(path)
        with path.open("rb") as file:
            source = _Source(_inflated(path, file))
            yield source
    except ImageError:
        raise
    except pydicom.errors.InvalidDicomError:
        raise ImageError("an empty file" if path.stat().st_size == 0 else "not a DICOM file, or an encrypted one") from None
    except Exception as e:
        if source and source.is_spent:  # pydicom has turned it into another error
            raise ImageError(_TOO_MANY_ELEMENTS) from None
        if isinstance(e, OSError) and e.strerror:
            raise ImageError(f"cannot be read ({e.strerror})") from None
        raise ImageError(f"its header cannot be read ({error_kind(e)}): cut short, or damaged") from None


def _inflated(path: Path, file: IO[bytes]) -> IO[bytes]:
    """`file`, or its content without compression if it is deflated."""
    pydicom = load_pydicom()
    meta = pydicom.filereader.read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != pydicom.uid.DeflatedExplicitVRLittleEndian:
        return file
    content, begins = file.read(), 132 + 12 + meta.FileMetaInformationGroupLength
    most = max(_MAX_INFLATED * len(content), 1 << 26)
    data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content[begins:], most)
    if len(data) == most:
        raise ImageError("its content is out of proportion to its size")
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    plain = pydicom.filebase.DicomBytesIO()
    plain.write(content[:132])
    pydicom.filewriter.write_file_meta_info(plain, meta, enforce_standard=False)
    plain.write(data)
    plain.seek(0)
    return io.BytesIO(plain.getvalue())


def _parsed(source: _Source, **how: Any) -> Any:
    dataset = load_pydicom().dcmread(source, **how)
    if source.is_spent:
        raise ImageError(_TOO_MANY_ELEMENTS)
    return dataset


def read_header(path: Path) -> tuple[Any, int]:
    """What a header says of pixels and the times of frames, and for how many frames there is room after it. Raises ImageError."""
    with _source(path) as source:
        header = _parsed(source, stop_before_pixels=True, specific_tags=["NumberOfFrames", *_SIZES, *_TIMES])
        is_implicit, _ = header.original_encoding
        return header, _room(header, source.file, source.tell() + (8 if is_implicit else 12))  # tag, type and length come before the pixels


def _room(header: Any, file: IO[bytes], begins: int) -> int:
    """For how many frames there is room in a file, from the byte where its pixels begin."""
    frames, bytes_left = declared_frames(header), file.seek(0, io.SEEK_END) - begins
    try:
        if header.file_meta.TransferSyntaxUID.is_encapsulated:
            return _fragments(file, begins, begins + bytes_left, frames)
        bits = int(header.Rows) * int(header.Columns) * int(header.SamplesPerPixel) * int(header.BitsAllocated)
        return 8 * bytes_left * (3 if header.get("PhotometricInterpretation") == "YBR_FULL_422" else 2) // (2 * bits)
    except Exception:  # missing, zero, or not numbers: reported when the file is read
        return 0


def _fragments(file: IO[bytes], at: int, ends: int, claimed: int) -> int:
    """How many fragments the compressed pixels have, without the table before them; counts up to `claimed`. Each frame has at least one."""
    if claimed * (8 + _MIN_CODESTREAM) > ends - at:
        return 0
    count = -1
    while at + 8 <= ends and count < claimed:
        file.seek(at)
        tag, length = struct.unpack("<4sI", file.read(8))
        if tag != _ITEM:
            break
        count += 1
        at += 8 + length
    return count


def error_kind(error: Exception) -> str:
    """What may be said about a library's error: not its text, which may quote the file."""
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _header_ends(path: Path) -> int:
    """The byte where the attributes before the pixel data end."""
    with _source(path) as source:
        _parsed(source, stop_before_pixels=True)
        return source.tell()


@functools.cache
def load_pydicom() -> Any:
    """pydicom, silenced: its warnings quote the file. Raises VesselError if it is not installed."""
    try:
        import pydicom
        import pydicom.config
        import pydicom.encaps
        import pydicom.errors
        import pydicom.filereader
        import pydicom.filewriter
        import pydicom.pixels
        import pydicom.uid
    except ModuleNotFoundError as e:
        raise VesselError("DICOM files need pydicom: pip install 'vessel-rt[dicom]'") from e
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    for library in _LIBRARIES:  # once per process: warnings.catch_warnings is not thread-safe
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)
        warnings.filterwarnings("ignore", module=rf"{library}\b")
    return pydicom

"""One frame of a DICOM file as the pipeline takes it: RGB, 8 bits, windowed as the file asks.

What else the file holds identifies a patient: nothing of it leaves this module, not even in an error's text.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.inputs.images import MAX_SIDE, require_regular

__all__ = ["DICOM_SUFFIXES", "frame_count", "is_dicom", "parse_frames", "read_dicom"]

DICOM_SUFFIXES = (".dcm", ".dicom")

_GRAY = ("MONOCHROME1", "MONOCHROME2")
_WINDOW = ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence")
_RESCALE = ("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence")
_XRAY = (  # whose modality LUT leads back to the beam's intensity, and is not for display: David Clunie, comp.protocols.dicom, 2000-12-13
    "1.2.840.10008.5.1.4.1.1.12.1",
    "1.2.840.10008.5.1.4.1.1.12.2",
    "1.2.840.10008.5.1.4.1.1.12.3",
)
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # of JPEG and JPEG-LS: 0xFF comes before
_SIZES = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PhotometricInterpretation")
_SEQUENCES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ModalityLUTSequence", "VOILUTSequence")
_ITEM, _ITEM_OF_BIG_ENDIAN = b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00"  # the tag at which an item of a sequence, or a fragment, begins
_MOST_PARTS = 150_000  # of a header: each takes microseconds and a kilobyte; an enhanced file of 1,000 frames has some 60,000
_MOST_INFLATED = 30  # times the size of a deflated file; 64 MiB are always let pass
_LEAST_CODESTREAM = 2 + 13 + 10 + 2  # bytes of JPEG: SOI, SOF and SOS of one component, EOI; JPEG 2000 and RLE need more
_TOO_MANY_PARTS = f"its header has more than {_MOST_PARTS} parts"
_TOO_MANY_FRAMES = "its header claims more frames than it can hold: cut short, or damaged"
_LIBRARIES = ("pydicom", "pylibjpeg", "libjpeg", "openjpeg")

_reading = threading.Lock()  # held while a file is read: pydicom parses what is looked at into the data set


def is_dicom(path: Path) -> bool:
    """By its suffix; a file without one, as archives name them, by its magic: `I0000012`, or `XA.1.2.840.5`, of which the last number is
    no suffix. A DICOMDIR is a table of contents, not an image.
    """
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    if (path.suffix and not path.suffix[1:].isdecimal()) or path.name.upper() == "DICOMDIR":
        return False
    try:
        require_regular(path)
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ImageError):
        return False


def frame_count(path: Path) -> int | None:
    """How many frames a multi-frame file has; None for a single picture, and for a file that claims more than it can hold, which
    `read_dicom` tells of. Reads the header only, and where the fragments of compressed pixels begin.

    Raises:
        ImageError: not a DICOM file.
        VesselError: pydicom is not installed.
    """
    header, room = _header(path)
    return count if 1 < (count := _frames(header)) <= room else None


def read_dicom(path: Path, number: int | None) -> Image.Image:
    """Frame `number` (from 0; None: the only one) in RGB, 8 bits; no other is decoded. docs/dicom.md has the rules.

    The last file stays open for the next frame of it, so that one thread of a process reads at a time; others wait.

    Raises:
        ImageError: not DICOM, encrypted, cut short, without pixels or not decodable. The text has nothing from the file but its kind of
            compression and its size.
        VesselError: pydicom is not installed.
    """
    try:
        with _reading:
            status = path.stat()
            dataset = _opened(path, status.st_mtime_ns, status.st_size)
            return Image.fromarray(_as_bytes(_decoded(dataset, number or 0), dataset, number or 0)).convert("RGB")
    except VesselError:
        raise
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except Exception as e:  # a file's attributes may be anything, and libraries quote them in their errors
        raise ImageError(f"its pixels cannot be read ({_kind(e)}): cut short, damaged, or described as nothing here understands") from None


def parse_frames(text: str) -> slice:
    """`10:60:5`, `10`, `::2`, `-20:` as Python's slices; ValueError says what would do."""
    match = re.fullmatch(r"(-?\d+)?(?:(:)(-?\d+)?(?::(-?\d+)?)?)?", text)
    if not match or not text or (match[4] and int(match[4]) == 0):
        raise ValueError(f"{text!r} does not choose frames: take START:END:STEP as in Python, such as 10:60:5, 10, or ::2")
    start, stop, step = (None if part is None else int(part) for part in match.group(1, 3, 4))
    if match[2]:
        return slice(start, stop, step)
    return slice(start, None if start == -1 else (start or 0) + 1)


@functools.lru_cache(maxsize=1)
def _opened(path: Path, changed: int, size: int) -> Any:
    """The whole data set of a file, found fit to be decoded."""
    with _source(path) as source:
        dataset = _parsed(source)
    if "PixelData" not in dataset:
        if "EncryptedAttributesSequence" in dataset:
            raise ImageError("its attributes are encrypted, and its pixels with them")
        if _header_ends(path) < size - 16:  # the reader drops an element that it cannot finish
            raise ImageError("cut short: its pixel data end before they should")
        raise ImageError("a DICOM file without pixel data (a report, a file of another kind, or one cut short)")
    for name in (*_SIZES, "BitsStored"):
        if not dataset.get(name):
            raise ImageError(f"its header says nothing of {name}")
    if max(dataset.Rows, dataset.Columns) > MAX_SIDE:
        raise ImageError(f"{dataset.Columns}x{dataset.Rows} pixels are too many; sides up to {MAX_SIDE} are read")
    if not 0 < _frames(dataset) <= max(1, _room(dataset, io.BytesIO(dataset.PixelData), 0)):
        raise ImageError(_TOO_MANY_FRAMES)
    raw = [dataset.get_item(name).value for name in _SEQUENCES if name in dataset]  # bytes, where they are parsed only when looked at
    if sum(value.count(tag) for value in raw if isinstance(value, bytes) for tag in (_ITEM, _ITEM_OF_BIG_ENDIAN)) > _MOST_PARTS:
        raise ImageError(_TOO_MANY_PARTS)
    return dataset


def _frames(dataset: Any) -> int:
    """How many frames the file says it has; one, where it does not say."""
    try:
        return int(dataset.get("NumberOfFrames") or 1)
    except Exception:
        raise ImageError("its number of frames is not a number") from None


class _Source:
    """A file as pydicom reads it: only so often, since a header may have millions of empty parts."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.tell, self.seek = file, file.tell, file.seek
        self._left = _MOST_PARTS

    @property
    def is_spent(self) -> bool:
        return self._left < 0

    def read(self, size: int = -1) -> bytes:
        self._left -= 1
        if self.is_spent:
            raise ImageError(_TOO_MANY_PARTS)
        return self.file.read(size)


@contextlib.contextmanager
def _source(path: Path) -> Iterator[_Source]:
    """The file, its deflated part inflated. Whatever is wrong with it in the block is an ImageError that quotes nothing."""
    pydicom, source = _pydicom(), None
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
        if source and source.is_spent:  # the library made another error of it
            raise ImageError(_TOO_MANY_PARTS) from None
        if isinstance(e, OSError) and e.strerror:
            raise ImageError(f"cannot be read ({e.strerror})") from None
        raise ImageError(f"its header cannot be read ({_kind(e)}): cut short, or damaged") from None


def _inflated(path: Path, file: IO[bytes]) -> IO[bytes]:
    """`file`, or, if it is deflated, what it holds without compression."""
    pydicom = _pydicom()
    meta = pydicom.filereader.read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != pydicom.uid.DeflatedExplicitVRLittleEndian:
        return file
    content, begins = file.read(), 132 + 12 + meta.FileMetaInformationGroupLength
    most = max(_MOST_INFLATED * len(content), 1 << 26)
    data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content[begins:], most)
    if len(data) == most:
        raise ImageError("what it holds is out of proportion to its size")
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    plain = pydicom.filebase.DicomBytesIO()
    plain.write(content[:132])
    pydicom.filewriter.write_file_meta_info(plain, meta, enforce_standard=False)
    plain.write(data)
    plain.seek(0)
    return io.BytesIO(plain.getvalue())


def _parsed(source: _Source, **how: Any) -> Any:
    dataset = _pydicom().dcmread(source, **how)
    if source.is_spent:
        raise ImageError(_TOO_MANY_PARTS)
    return dataset


def _header(path: Path) -> tuple[Any, int]:
    """What a file's header says of its pixels, and for how many frames there is room in what follows it. Raises ImageError."""
    with _source(path) as source:
        header = _parsed(source, stop_before_pixels=True, specific_tags=["NumberOfFrames", *_SIZES])
        is_implicit, _ = header.original_encoding
        return header, _room(header, source.file, source.tell() + (8 if is_implicit else 12))  # tag, type and length come before pixels


def _room(header: Any, file: IO[bytes], begins: int) -> int:
    """How many frames there may be in a file from the byte at which its pixels begin."""
    frames, bytes_left = _frames(header), file.seek(0, io.SEEK_END) - begins
    try:
        if header.file_meta.TransferSyntaxUID.is_encapsulated:
            return _fragments(file, begins, begins + bytes_left, frames)
        bits = int(header.Rows) * int(header.Columns) * int(header.SamplesPerPixel) * int(header.BitsAllocated)
        return 8 * bytes_left * (3 if header.get("PhotometricInterpretation") == "YBR_FULL_422" else 2) // (2 * bits)
    except Exception:  # not there, zero, or no numbers: told of when the file is read
        return 0


def _fragments(file: IO[bytes], at: int, ends: int, claimed: int) -> int:
    """How many fragments the compressed pixels have, without the table before them: each frame has one at least. At most `claimed`."""
    if claimed * (8 + _LEAST_CODESTREAM) > ends - at:
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


def _kind(error: Exception) -> str:
    """What may be told of a library's error: not its text, which may quote the file."""
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _header_ends(path: Path) -> int:
    """Where the attributes before the pixel data end, in bytes."""
    with _source(path) as source:
        _parsed(source, stop_before_pixels=True)
        return source.tell()


@functools.cache
def _pydicom() -> Any:
    """pydicom, made to keep quiet: its warnings quote what is in a file."""
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
    for library in _LIBRARIES:  # once for the process: warnings.catch_warnings is not for programs with threads
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)
        warnings.filterwarnings("ignore", module=rf"{library}\b")
    return pydicom


def _decoded(dataset: Any, number: int) -> npt.NDArray[Any]:
    """A frame's stored values, [rows, columns] or [rows, columns, 3]; YBR as RGB."""
    pydicom, pixels, frames = _pydicom(), _pydicom().pixels, _frames(dataset)
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise ImageError("its header does not say how its pixels are encoded")
    try:
        available = pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        name = "something unknown" if syntax.name == syntax else syntax.name  # a UID without a name is whatever the file has there
        raise ImageError(f"compressed as {name}, which no installed decoder reads; pip install 'vessel-rt[dicom]'")
    if number >= frames:
        raise ImageError(f"it has {frames} frames, and no frame {number}")
    if not syntax.is_encapsulated and dataset.get("HighBit", dataset.BitsStored - 1) != dataset.BitsStored - 1:
        raise ImageError("its values are not in the lowest bits of its words (HighBit), which is not read")
    rle = syntax == pydicom.uid.RLELossless
    if syntax.is_encapsulated and not rle:
        _check_codestream(dataset, number, frames)
    # pylibjpeg's own decoder of RLE panics at damaged data, with what is no Exception
    decoded: npt.NDArray[Any] = pixels.pixel_array(dataset, index=number, decoding_plugin="pydicom" if rle else "")
    return decoded


def _check_codestream(dataset: Any, number: int, frames: int) -> None:
    """Refuse a damaged frame of the JPEG family that libjpeg would make up, without a word, or take all memory for."""
    offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths) if "ExtendedOffsetTable" in dataset else None
    code: bytes = _pydicom().encaps.get_frame(dataset.PixelData, number, number_of_frames=frames, extended_offsets=offsets)
    if b"\xff\xd9" not in code:  # compressed data cannot have it but at their end; what some devices pad that with may be anything
        raise ImageError("cut short: the compressed data of this frame have no end")
    if _coded_size(code) != (dataset.Rows, dataset.Columns):
        raise ImageError("damaged: the compressed data of this frame are of another size than the header says")


def _coded_size(code: bytes) -> tuple[int, int]:
    """Rows and columns as a codestream has them: JPEG and JPEG-LS (ISO/IEC 10918-1, B.2.2) or JPEG 2000 (ISO/IEC 15444-1, A.5.1)."""
    if not code.startswith(b"\xff\xd8"):
        right, lower, left, upper = struct.unpack_from(">4I", code, code.index(b"\xff\x4f\xff\x51") + 8)
        return lower - upper, right - left
    at = 2
    while code[at + 1] not in _FRAME_HEADERS:
        at += 1 if code[at + 1] == 0xFF else 2 + int.from_bytes(code[at + 2 : at + 4])  # a fill byte, or a segment
    rows, columns = struct.unpack_from(">2H", code, at + 5)
    return rows, columns


def _as_bytes(pixels: npt.NDArray[Any], dataset: Any, number: int) -> npt.NDArray[np.uint8]:
    """Stored values as 8 bits; [rows, columns] or [rows, columns, 3 or 4]."""
    kind, little_endian = dataset.PhotometricInterpretation, dataset.file_meta.TransferSyntaxUID.is_little_endian
    if kind == "PALETTE COLOR":
        return _coloured(pixels, dataset, little_endian)
    if kind not in _GRAY:
        return _scaled(pixels, 0, 2**dataset.BitsStored - 1)
    gray = _gray(pixels, _rules(dataset, number), little_endian)
    return np.uint8(255) - gray if kind == "MONOCHROME1" else gray


def _coloured(values: npt.NDArray[Any], dataset: Any, little_endian: bool) -> npt.NDArray[np.uint8]:
    """Through a palette; one in segments by pydicom."""
    if "RedPaletteColorLookupTableData" not in dataset:
        coloured = _pydicom().pixels.apply_color_lut(values, dataset)
        return _scaled(coloured, 0, 2 ** (8 * coloured.itemsize) - 1)
    planes = [_looked_up(values, dataset, little_endian, f"{colour}PaletteColorLookupTable") for colour in ("Red", "Green", "Blue")]
    return np.stack([_scaled(plane, *ends.tolist()) for plane, ends in planes], axis=-1)


def _gray(values: npt.NDArray[Any], rules: Any, little_endian: bool) -> npt.NDArray[np.uint8]:
    """Through modality and VOI transform; 0 and 255 are the ends of what these can give, not of what a frame holds: no cine flickers."""
    library, signed, bits = _pydicom().pixels, rules.PixelRepresentation, rules.BitsStored
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])
    if "ModalityLUTSequence" in rules:
        values, ends = _looked_up(values, rules.ModalityLUTSequence[0], little_endian)
    else:
        values, ends = (library.apply_modality_lut(of, rules) for of in (values, ends))
        ends.sort()
    if "VOILUTSequence" in rules:
        values, ends = _looked_up(values, rules.VOILUTSequence[0], little_endian)
    elif "WindowCenter" in rules and "WindowWidth" in rules:
        values, ends = (library.apply_windowing(of, rules) for of in (values, np.array([-np.inf, np.inf])))
    return _scaled(values, *ends.tolist())


def _looked_up(values: npt.NDArray[Any], lut: Any, little_endian: bool, name: str = "LUT") -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Values through a modality or VOI LUT (PS3.3 C.11.1.1, C.11.2.1.1) or a colour of a palette (C.7.6.3.1.5), and the ends of what
    it can give.

    Not by pydicom 3.0: it fails at a modality LUT of 12 bits, and takes the index into a VOI LUT or palette of 8 bits modulo 256.
    """
    (count, first, bits), data = lut[f"{name}Descriptor"].value, lut[f"{name}Data"].value
    table = (np.frombuffer(data, "<u2" if little_endian else ">u2") if isinstance(data, bytes) else np.asarray(data)).astype("<u2")
    count = count or 2**16
    if bits == 8 and len(table) < count:  # two entries a word
        table = table.view(np.uint8)
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, count - 1)
    return table[index], np.array([0, 2**bits - 1])


def _rules(dataset: Any, number: int) -> Any:
    """What decides on the frame's grays, where the file has it: for this frame, for all frames, or for a file of one."""
    rules = _pydicom().Dataset()
    for name in ("BitsStored", "PixelRepresentation", "PhotometricInterpretation"):
        setattr(rules, name, dataset.get(name, 0))
    shared, per_frame = (dataset.get(f"{kind}FunctionalGroupsSequence") or [] for kind in ("Shared", "PerFrame"))
    groups = [group[0] for group in (shared, per_frame[number : number + 1]) if group]
    for source in (dataset, *(g[s][0] for g in groups for s in ("PixelValueTransformationSequence", "FrameVOILUTSequence") if g.get(s))):
        for name in (*_WINDOW, *_RESCALE):
            if source.get(name) not in (None, "", []):
                setattr(rules, name, source.get(name))
    if dataset.get("SOPClassUID") in _XRAY and "ModalityLUTSequence" in rules:
        del rules.ModalityLUTSequence
    return rules


def _scaled(values: npt.NDArray[Any], lowest: float, highest: float) -> npt.NDArray[np.uint8]:
    """`lowest` to 0, `highest` to 255, rounded."""
    if (lowest, highest) == (0, 255) and values.dtype == np.uint8:
        return values
    scaled = (values.astype(np.float64) - lowest) * (255 / (highest - lowest))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)

"""One frame of a DICOM file as the pipeline takes it: RGB, 8 bits, windowed as the file asks.

Does not know how the file is read (dicom_file.py). Nothing but pixels leaves this module: the rest identifies a patient.
"""

from __future__ import annotations

import itertools
import re
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.inputs.dicom_file import declared_frames, error_kind, load_pydicom, open_dataset, read_header
from vessel_rt.inputs.images import require_regular

__all__ = ["DICOM_SUFFIXES", "frame_count", "frame_size", "frame_times", "is_dicom", "parse_frames", "read_dicom"]

DICOM_SUFFIXES = (".dcm", ".dicom")

_GRAY = ("MONOCHROME1", "MONOCHROME2")
_WINDOW = ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence")
_RESCALE = ("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence")
_XRAY = (  # their modality LUT leads back to the beam's intensity and is not for display: David Clunie, comp.protocols.dicom, 2000-12-13
    "1.2.840.10008.5.1.4.1.1.12.1",
    "1.2.840.10008.5.1.4.1.1.12.2",
    "1.2.840.10008.5.1.4.1.1.12.3",
)
_MOST_MS = 3.6e6  # between two frames
_MOST_NUMBER = 17  # bytes of a number in text, and of what separates it from the next
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # of JPEG and JPEG-LS, after 0xFF

_reading = threading.Lock()  # held while a file is read: pydicom parses what is looked at into the data set


def is_dicom(path: Path) -> bool:
    """Whether a file is taken as DICOM: by its suffix, or, without one, by its magic bytes.

    Archives name files without a suffix: `I0000012`, or `XA.1.2.840.5`, where the last number is not a suffix. A DICOMDIR is a table of
    contents, not an image.
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
    """How many frames a multi-frame file has; None for a single picture.

    Also None for a file that claims more frames than it can hold: `read_dicom` reports that. Reads only the header and where the fragments
    of compressed pixels begin.

    Raises:
        ImageError: not a DICOM file.
        VesselError: pydicom is not installed.
    """
    header, room = read_header(path)
    return count if 1 < (count := declared_frames(header)) <= room else None


def frame_size(path: Path) -> tuple[int, int]:
    """The width and height of a file's frames in pixels, as its header says.

    Raises:
        ImageError: not a DICOM file, or its header does not say.
        VesselError: pydicom is not installed.
    """
    header, _ = read_header(path)
    try:
        return int(header.Columns), int(header.Rows)
    except Exception:
        raise ImageError("its header has no size") from None


def frame_times(path: Path) -> list[float] | None:
    """The time of each frame from the first one, in ms: by FrameTimeVector, else FrameTime, else CineRate, else
    RecommendedDisplayFrameRate (PS3.3 C.7.6.5). None for a single picture, and where none of them makes sense.

    Raises:
        ImageError: not a DICOM file.
        VesselError: pydicom is not installed.
    """
    header, room = read_header(path)
    if not 1 < (count := declared_frames(header)) <= room:
        return None
    for name in ("FrameTimeVector", "FrameTime", "CineRate", "RecommendedDisplayFrameRate"):
        try:
            increments = _increments(header, name, count)
        except Exception:  # absent, zero, or no numbers
            continue
        if len(increments) == count - 1 and all(0 < each < _MOST_MS for each in increments):
            return [0.0, *(round(time, 3) for time in itertools.accumulate(increments))]
    return None


def _increments(header: Any, name: str, count: int) -> list[float]:
    """The times from each of `count` frames to the next, in ms, by one attribute."""
    if len(header.get_item(name).value) > _MOST_NUMBER * count:  # not parsed yet
        return []
    value = header[name].value
    if name == "FrameTimeVector":
        return [float(each) for each in value[1:]]
    return [1000 / float(value) if name.endswith("Rate") else float(value)] * (count - 1)


def read_dicom(path: Path, number: int | None) -> Image.Image:
    """Frame `number` (from 0; None: the only one) in RGB, 8 bits; no other is decoded. docs/dicom.md has the rules.

    The last file is kept in memory for its next frame: one thread of a process reads at a time, the others wait.

    Raises:
        ImageError: not DICOM, encrypted, cut short, without pixels or not decodable. The text quotes nothing from the file but its
            compression and its size.
        VesselError: pydicom is not installed.
    """
    try:
        with _reading:
            dataset = open_dataset(path)
            return Image.fromarray(_as_bytes(_decoded(dataset, number or 0), dataset, number or 0)).convert("RGB")
    except VesselError:
        raise
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except Exception as e:  # a file's attributes may be anything, and libraries quote them in their errors
        raise ImageError(
            f"its pixels cannot be read ({error_kind(e)}): cut short, damaged, or described in a way that is not supported"
        ) from None


def parse_frames(text: str) -> slice:
    """`10:60:5`, `10`, `::2`, `-20:` as Python's slices; ValueError says which forms are valid."""
    match = re.fullmatch(r"(-?\d+)?(?:(:)(-?\d+)?(?::(-?\d+)?)?)?", text)
    if not match or not text or (match[4] and int(match[4]) == 0):
        raise ValueError(f"{text!r} does not choose frames: take START:END:STEP as in Python, such as 10:60:5, 10, or ::2")
    start, stop, step = (None if part is None else int(part) for part in match.group(1, 3, 4))
    if match[2]:
        return slice(start, stop, step)
    return slice(start, None if start == -1 else (start or 0) + 1)


def _decoded(dataset: Any, number: int) -> npt.NDArray[Any]:
    """A frame's stored values, [rows, columns] or [rows, columns, 3]; YBR as RGB."""
    pydicom, pixels, frames = load_pydicom(), load_pydicom().pixels, declared_frames(dataset)
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise ImageError("its header does not say how its pixels are encoded")
    try:
        available = pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        name = "something unknown" if syntax.name == syntax else syntax.name  # a UID without a name is any text that the file has there
        raise ImageError(f"compressed as {name}, which no installed decoder reads; pip install 'vessel-rt[dicom]'")
    if number >= frames:
        raise ImageError(f"it has {frames} frames and no frame {number}")
    if not syntax.is_encapsulated and dataset.get("HighBit", dataset.BitsStored - 1) != dataset.BitsStored - 1:
        raise ImageError("its values are not in the lowest bits of its words (HighBit), which is not read")
    rle = syntax == pydicom.uid.RLELossless
    if syntax.is_encapsulated and not rle:
        _check_codestream(dataset, number, frames)
    # pylibjpeg's own RLE decoder panics on damaged data, and its panic is not an Exception
    decoded: npt.NDArray[Any] = pixels.pixel_array(dataset, index=number, decoding_plugin="pydicom" if rle else "")
    return decoded


def _check_codestream(dataset: Any, number: int, frames: int) -> None:
    """Refuse a damaged frame of the JPEG family: libjpeg would invent pixels without an error, or take all memory."""
    offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths) if "ExtendedOffsetTable" in dataset else None
    code: bytes = load_pydicom().encaps.get_frame(dataset.PixelData, number, number_of_frames=frames, extended_offsets=offsets)
    if b"\xff\xd9" not in code:  # compressed data have it only at their end, which some devices pad with arbitrary bytes
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
    """Through a palette; pydicom looks up a segmented one."""
    if "RedPaletteColorLookupTableData" not in dataset:
        coloured = load_pydicom().pixels.apply_color_lut(values, dataset)
        return _scaled(coloured, 0, 2 ** (8 * coloured.itemsize) - 1)
    planes = [_looked_up(values, dataset, little_endian, f"{colour}PaletteColorLookupTable") for colour in ("Red", "Green", "Blue")]
    return np.stack([_scaled(plane, *ends.tolist()) for plane, ends in planes], axis=-1)


def _gray(values: npt.NDArray[Any], rules: Any, little_endian: bool) -> npt.NDArray[np.uint8]:
    """Through modality and VOI transform. 0 and 255 are the ends of what these can give, not of one frame, so a cine does not flicker."""
    library, signed, bits = load_pydicom().pixels, rules.PixelRepresentation, rules.BitsStored
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

    Not by pydicom 3.0: it fails on a modality LUT of 12 bits, and takes the index into a VOI LUT or palette of 8 bits modulo 256.
    """
    (count, first, bits), data = lut[f"{name}Descriptor"].value, lut[f"{name}Data"].value
    table = (np.frombuffer(data, "<u2" if little_endian else ">u2") if isinstance(data, bytes) else np.asarray(data)).astype("<u2")
    count = count or 2**16
    if bits == 8 and len(table) < count:  # two entries per word
        table = table.view(np.uint8)
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, count - 1)
    return table[index], np.array([0, 2**bits - 1])


def _rules(dataset: Any, number: int) -> Any:
    """The attributes that decide the frame's gray levels, wherever the file has them: for this frame, for all, or at the top level."""
    rules = load_pydicom().Dataset()
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

"""Small DICOM files, good ones and bad ones. Each is of one made-up person, who stands in its attributes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom", reason="extra dicom is not installed")

NAME, ID = "Study-Quokka", "4711008150"

XA, ENHANCED_XA = pydicom.uid.XRayAngiographicImageStorage, pydicom.uid.EnhancedXAImageStorage
SECONDARY_CAPTURE, REPORT = pydicom.uid.SecondaryCaptureImageStorage, pydicom.uid.BasicTextSRStorage
EXPLICIT, BIG_ENDIAN = pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ExplicitVRBigEndian
JPEG, JPEG_2000, RLE = pydicom.uid.JPEGBaseline8Bit, pydicom.uid.JPEG2000Lossless, pydicom.uid.RLELossless


def make_dicom(path: Path, pixels: npt.NDArray[Any] | None, syntax: str = EXPLICIT, **attributes: Any) -> Path:
    """A file of one picture [rows, columns] or [rows, columns, 3], or of several; RLE and JPEG 2000 are compressed here.

    `attributes` go before what `pixels` say of themselves. `PixelData` are taken as they are: bytes, or the codestreams of frames.
    """
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = EXPLICIT if syntax in (RLE, JPEG_2000) else syntax
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = attributes.pop("SOPClassUID", XA)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    dataset.PatientName, dataset.PatientID, dataset.InstitutionName = f"{NAME}^A", ID, f"Ward of {NAME}"
    data = attributes.pop("PixelData", None)
    if pixels is not None:
        coloured = pixels.ndim > 2 and pixels.shape[-1] == 3
        rows, columns = pixels.shape[-3:-1] if coloured else pixels.shape[-2:]
        bits = 8 * pixels.itemsize
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = rows, columns, 3 if coloured else 1
        dataset.BitsAllocated, dataset.BitsStored = bits, attributes.pop("BitsStored", bits)
        dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(pixels.dtype.kind == "i")
        dataset.PhotometricInterpretation = "RGB" if coloured else "MONOCHROME2"
        if coloured:
            dataset.PlanarConfiguration = 0
        if pixels.ndim > (3 if coloured else 2):
            dataset.NumberOfFrames = len(pixels)
        data = data or pixels.astype(pixels.dtype.newbyteorder(">" if syntax == BIG_ENDIAN else "<")).tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    if data is not None:
        dataset.PixelData = data if isinstance(data, bytes) else pydicom.encaps.encapsulate(data)
        dataset["PixelData"].VR = "OW" if dataset.get("BitsAllocated", 8) > 8 else "OB"
    if dataset.file_meta.TransferSyntaxUID != syntax:
        dataset.compress(syntax, encoding_plugin="pydicom" if syntax == RLE else "pylibjpeg", generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)
    return path


def item(**attributes: Any) -> Any:
    """A sequence of one item."""
    dataset = pydicom.Dataset()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return pydicom.Sequence([dataset])


def lookup_table(table: Sequence[int] | bytes, first: int, bits: int, count: int | None = None) -> Any:
    """A modality or VOI LUT whose first entry is of the value `first`: numbers as US, bytes as OW."""
    entries = item()
    entries[0].add_new("LUTDescriptor", "SS" if first < 0 else "US", [count or len(table), first, bits])
    entries[0].add_new("LUTData", "OW" if isinstance(table, bytes) else "US", table if isinstance(table, bytes) else list(table))
    return entries


def jpeg(image: Image.Image) -> bytes:
    """A JPEG codestream of it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def patched(path: Path, old: bytes, new: bytes) -> Path:
    """The file with a value that no library would write; its length stays."""
    content = path.read_bytes()
    assert content.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    return path


def cut(path: Path, size: int) -> Path:
    """The first bytes of the file; of a negative size, all but the last."""
    path.write_bytes(path.read_bytes()[:size])
    return path


def ramp(rows: int = 16, columns: int = 16, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
    """Every value once, or as many of them as there are pixels, evenly spread."""
    limits = np.iinfo(dtype)
    return np.linspace(limits.min, limits.max, rows * columns).astype(dtype).reshape(rows, columns)

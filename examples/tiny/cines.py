"""Cines as files: a multi-frame DICOM XA file and, for each concept, a TIFF with the mask of each frame."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from data import rasterize
from generator import CONCEPTS, FRAME_RATE, Frame, generate_cine
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000, XRayAngiographicImageStorage, generate_uid

__all__ = ["cine_masks", "clear_cine", "read_cine", "write_cines"]

_FRAMES, _SIDE, _RATIO = 27, 384, 60
_MOST_ERROR = 3.2  # gray levels (root mean square) that compression may cost: little noise compresses well
_CODES = ("S0101", "S0102")


def cine_masks(frames: list[Frame], concept: str) -> NDArray[np.bool_]:
    """The masks [frames, height, width] of a concept."""
    return np.stack([rasterize(frame.polygons[concept], *frame.image.shape) > 0 for frame in frames])


def clear_cine(rng: np.random.Generator, frames: int, height: int, width: int, code: str) -> list[Frame]:
    """The first cine that `rng` draws whose full tree is large and contrasts with the background, with the catheter in view."""
    while True:
        cine = generate_cine(rng, frames, height, width, code)
        masks = cine_masks(cine, "vessel")
        best = int(masks.sum(axis=(1, 2)).argmax())
        gray, mask = cine[best].image.astype(np.float32), masks[best]
        catheter = cine_masks(cine, "catheter").mean(axis=(1, 2)).min()
        if mask.mean() > 0.03 and catheter > 0.004 and gray[~mask].std() > 8 and np.median(gray) - gray[mask].mean() > 20:
            return cine


def write_cines(folder: Path, seed: int) -> None:
    """cines/CODE.dcm and cines/CONCEPT/CODE.tif of cines that no training sees (their seeds are their own)."""
    for concept in CONCEPTS:
        (folder / "cines" / concept).mkdir(parents=True)
    for index, code in enumerate(_CODES):
        rng = np.random.default_rng([seed, 2, index])
        while True:
            cine = clear_cine(rng, _FRAMES, _SIDE, _SIDE, code)
            codestreams = [_codestream(frame.image) for frame in cine]
            if np.mean([_error(*pair) for pair in zip(cine, codestreams, strict=True)]) < _MOST_ERROR:
                break
        _write_dicom(folder / "cines" / f"{code}.dcm", codestreams, cine[0].image.shape, code)
        for concept in CONCEPTS:
            first, *rest = [Image.fromarray(mask) for mask in cine_masks(cine, concept)]
            path = folder / "cines" / concept / f"{code}.tif"
            first.save(path, save_all=True, append_images=rest, compression="group4")


def read_cine(path: Path) -> tuple[list[Image.Image], dict[str, NDArray[np.bool_]]]:
    """The frames of a file that `write_cines` wrote, in RGB, and the masks [frames, height, width] of each concept."""
    frames = [Image.fromarray(gray).convert("RGB") for gray in pydicom.dcmread(path).pixel_array]
    masks = {}
    for concept in CONCEPTS:
        with Image.open(path.parent / concept / f"{path.stem}.tif") as tiff:
            pages: Any = tiff
            masks[concept] = np.stack([np.asarray(pages) for page in range(pages.n_frames) if pages.seek(page) is None])
    return frames, masks


def _codestream(gray: NDArray[np.uint8]) -> bytes:
    """The frame in JPEG 2000, with a loss: a 60th of its bytes. At this size JPEG would cost much more of what is in it."""
    stream = io.BytesIO()
    Image.fromarray(gray).save(stream, "JPEG2000", irreversible=True, quality_mode="rates", quality_layers=[_RATIO], no_jp2=True)
    return stream.getvalue()


def _error(frame: Frame, codestream: bytes) -> float:
    """What compression costs, in gray levels (root mean square)."""
    with Image.open(io.BytesIO(codestream)) as image:
        return float(np.sqrt(np.mean((np.asarray(image, dtype=np.float32) - frame.image) ** 2)))


def _write_dicom(path: Path, codestreams: list[bytes], shape: tuple[int, ...], code: str) -> None:
    """One series of one study of `code`, which is all that it says about whom it shows."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEG2000
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = XRayAngiographicImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[code, "instance"])
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = (generate_uid(entropy_srcs=[code, part]) for part in ("study", "series"))
    dataset.PatientID = dataset.StudyID = code
    for empty in ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"):
        setattr(dataset, empty, "")
    dataset.Modality, dataset.ImageType, dataset.SeriesNumber, dataset.InstanceNumber = "XA", ["DERIVED", "PRIMARY", "SINGLE PLANE"], 1, 1
    dataset.BurnedInAnnotation, dataset.LossyImageCompression, dataset.PixelIntensityRelationship = "YES", "01", "LOG"
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = *shape, len(codestreams)
    dataset.FrameTime, dataset.CineRate, dataset.RecommendedDisplayFrameRate = round(1000 / FRAME_RATE, 3), FRAME_RATE, FRAME_RATE
    dataset.FrameIncrementPointer = pydicom.tag.Tag("FrameTime")
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = encapsulate(codestreams)
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path, enforce_file_format=True)

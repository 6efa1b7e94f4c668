"""The outputs of each frame: masks, an overlay, a preview, and its lines of results.jsonl and timings.jsonl.

A file is written under a temporary name and renamed, so after a crash it is complete or absent. Does not know which frames a run has left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import itertools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.errors import ImageError
from vessel_rt.inputs.frames import Frame
from vessel_rt.io.files import is_temporary, replacing, writing
from vessel_rt.model.postprocess import eroded
from vessel_rt.model.result import Mask, Result
from vessel_rt.results.rle import encode_rle
from vessel_rt.results.schema import (
    CINES,
    MASKS,
    OVERLAYS,
    PREVIEWS,
    SCHEMA,
    JournalEntry,
    MaskRecord,
    ResultLine,
    SeriesRecord,
    TimingLine,
)

__all__ = [
    "Entry",
    "FrameWriter",
    "Made",
    "draw_overlay",
    "failure",
    "is_blank",
    "mask_record",
    "numbered",
    "preview_file",
    "result_line",
    "series_record",
    "unknown_timing",
]

_PREVIEW_SIDE = 512  # pixels of the longer side, at most
# Distinct from each other and from gray, also for most colour-blind people.
_COLOURS = ((255, 82, 82), (64, 196, 255), (255, 214, 64), (105, 240, 174), (224, 130, 255), (255, 158, 64))
_IOU_DIGITS, _SCORE_DIGITS = 3, 2  # after the point: further ones depend on the batch (docs/numerics.md)
_TINT = 0.45  # opacity of a mask's colour inside it; the outline is opaque


@dataclasses.dataclass(frozen=True)
class Entry:
    """The result of one frame: its lines of results.jsonl (the same in every run) and of timings.jsonl, one per question each."""

    name: str
    lines: list[ResultLine]
    timings: list[TimingLine]

    @classmethod
    def of(cls, line: JournalEntry) -> Entry:
        """The entry in a line of the journal, which may have further fields."""
        return cls(line["name"], line["lines"], line["timings"])

    @property
    def error(self) -> str | None:
        return self.lines[0]["error"]


class Made(TypedDict):
    """What a result was made from: the SHA-256 of the input, and the hash of the settings."""

    input: str | None
    settings: str


class FrameWriter:
    """Writes the results of frames to a run's folder, from any thread or process.

    Masks are `masks/<name>.png`, then `<name>_1.png`, `<name>_2.png`; a number that would give the name of another frame is skipped.

    Args:
        folder: with masks/, overlays/ and previews/ in it.
        names: of all frames of the run, including other shards.
        settings: the hash of the settings, for every line.
        cines: whether objects are tracked, so that lines have `series`, `propagated_from` and `time_ms`.
    """

    def __init__(self, folder: Path, names: Collection[str], settings: str, *, cines: bool = False) -> None:
        self._folder, self._names, self._settings = folder, frozenset(name.casefold() for name in names), settings
        self._cines = cines

    def absolute(self) -> FrameWriter:
        """A copy for a process with another current folder."""
        return FrameWriter(self._folder.absolute(), self._names, self._settings, cines=self._cines)

    def write(self, frame: Frame, sha256: str, image: Image.Image, results: Sequence[Result], time_ms: float | None = None) -> Entry:
        """Write the files of a frame whose input has the hash `sha256`. After an error none of them is left. `time_ms` is its time in its
        cine, if it is known.

        Raises:
            ImageError: the frame's name is too long for its output files.
            VesselError: a file cannot be written.
        """
        names = (f"{MASKS}/{name}.png" for name in numbered(frame.name, self._names))
        masks = [mask.pixels for result in results for mask in result.masks]
        written: dict[str, str] = {}
        try:
            with writing(f"{self._folder}: the results of {frame.shown}"):
                records = [[self._write_mask(next(names), mask, written) for mask in result.masks] for result in results]
                pictures = {
                    name: self._save(name, picture, written, format="JPEG", quality=quality, subsampling=0)
                    for name, picture, quality in (
                        (f"{OVERLAYS}/{frame.name}.jpg", draw_overlay(image, masks), 92),
                        (preview_file(frame.code), _preview(image), 80),
                    )
                }
        except BaseException:
            for name in written:
                with contextlib.suppress(OSError):
                    (self._folder / name).unlink(missing_ok=True)
            raise
        made: Made = {"input": sha256, "settings": self._settings}
        lines = [
            result_line(frame, result.question, image.size, result.answer, of_result, _files(of_result, written) | pictures, made)
            for result, of_result in zip(results, records, strict=True)
        ]
        if self._cines:
            for line, result in zip(lines, results, strict=True):
                line["series"] = series_record(frame)
                line["propagated_from"] = None if result.propagated_from is None else list(result.propagated_from)
                line["time_ms"] = time_ms
        return Entry(frame.name, lines, [_timing(line, result) for line, result in zip(lines, results, strict=True)])

    def failure(self, frame: Frame, questions: Sequence[str], error: str) -> Entry:
        """The entry of a frame that could not be segmented; no file is written."""
        entry = failure(frame, questions, error, self._settings)
        if self._cines:
            for line in entry.lines:
                line["series"] = series_record(frame)
                line["propagated_from"] = line["time_ms"] = None
        return entry

    def _write_mask(self, name: str, mask: Mask, written: dict[str, str]) -> MaskRecord:
        self._save(name, _stencil(mask.pixels), written, format="PNG")
        return mask_record(mask, name)

    def _save(self, name: str, image: Image.Image, written: dict[str, str], **how: Any) -> str:
        """Write an image file, add its SHA-256 to `written`, and return it."""
        buffer = io.BytesIO()
        image.save(buffer, **how)
        try:
            with replacing(self._folder / name) as temporary:
                temporary.write_bytes(buffer.getbuffer())
        except OSError as e:
            if e.errno == errno.ENAMETOOLONG:
                raise ImageError("its name is too long for the names of its results; shorten it, or use --pseudonymize") from e
            raise
        written[name] = hashlib.sha256(buffer.getbuffer()).hexdigest()
        return written[name]


def failure(frame: Frame, questions: Sequence[str], error: str, settings: str) -> Entry:
    """The entry of a frame that could not be segmented."""
    made: Made = {"input": None, "settings": settings}
    lines = [result_line(frame, question, (None, None), None, [], {}, made, error) for question in questions]
    return Entry(frame.name, lines, [unknown_timing(line) for line in lines])


def preview_file(code: str) -> str:
    """The name of a frame's preview, by its study code: report.html links it, and shows no other name."""
    return f"{PREVIEWS}/{code}.jpg"


def numbered(name: str, taken: Collection[str]) -> Iterator[str]:
    """`name`, `name_1`, `name_2` ...; after the first, names in `taken` (in lower case) are skipped."""
    yield name
    yield from (other for number in itertools.count(1) if (other := f"{name}_{number}").casefold() not in taken)


def mask_record(mask: Mask, file: str) -> MaskRecord:
    """A mask in a line of results.jsonl."""
    return {
        "file": file,
        "iou": round(mask.iou, _IOU_DIGITS),
        "object_score": round(mask.object_score, _SCORE_DIGITS),
        "area": mask.area,
        "box": mask.box,
        "rle": encode_rle(mask.pixels),
    }


def _files(masks: Sequence[MaskRecord], written: dict[str, str]) -> dict[str, str]:
    return {mask["file"]: written[mask["file"]] for mask in masks}


def result_line(
    frame: Frame,
    question: str,
    size: tuple[int | None, int | None],
    answer: str | None,
    masks: list[MaskRecord],
    files: dict[str, str],
    made: Made,
    error: str | None = None,
) -> ResultLine:
    """A line of results.jsonl. Its keys are the same for every frame, failed or not."""
    return {
        "schema": SCHEMA,
        "index": frame.index,
        "image": frame.image,
        "frame": frame.number,
        "name": frame.name,
        "code": frame.code,
        "question": question,
        "status": "ok" if error is None else "error",
        "error": error,
        "width": size[0],
        "height": size[1],
        "answer": answer,
        "masks": masks,
        "files": files,
        "input": made["input"],
        "settings": made["settings"],
    }


def series_record(frame: Frame) -> SeriesRecord | None:
    """The place of a frame in its series, if it is of one."""
    return None if frame.series is None else {"name": frame.series.name, "code": frame.series.code, "number": frame.series.number}


def unknown_timing(line: ResultLine) -> TimingLine:
    """The line of timings.jsonl for a line of results.jsonl whose times are not known."""
    return {
        "schema": SCHEMA,
        "index": line["index"],
        "code": line["code"],
        "question": line["question"],
        "drafted": None,
        "accepted": None,
        "decode_steps": None,
        "batch": None,
        "ms": {},
    }


def _timing(line: ResultLine, result: Result) -> TimingLine:
    """A line of timings.jsonl."""
    return {
        **unknown_timing(line),
        "drafted": result.drafted,
        "accepted": result.accepted,
        "decode_steps": result.decode_steps,
        "batch": result.images,
        "ms": {step: round(value, 3) for step, value in result.ms.items()},
    }


def draw_overlay(image: Image.Image, masks: Sequence[npt.NDArray[np.bool_]]) -> Image.Image:
    """The image, with each mask [height, width] tinted and outlined in its own colour."""
    overlay = image.convert("RGB")
    for mask, colour in zip(masks, itertools.cycle(_COLOURS), strict=False):
        tinted = Image.blend(overlay, Image.new("RGB", overlay.size, colour), _TINT)
        overlay.paste(tinted, mask=_stencil(mask))
        overlay.paste(colour, mask=_stencil(mask & ~eroded(mask)))
    return overlay


def _preview(image: Image.Image) -> Image.Image:
    """The image at the size of the report's pictures, or smaller."""
    preview = image.copy()
    preview.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE), Image.Resampling.BILINEAR)
    return preview


def _stencil(mask: npt.NDArray[np.bool_]) -> Image.Image:
    """`mask` as a Pillow image of 255 and 0."""
    return Image.fromarray(mask.view(np.uint8) * np.uint8(255))


def is_blank(folder: Path) -> bool:
    """Whether a folder is empty, except for what a command leaves if it is killed before its first file."""
    return all(
        is_temporary(path) or (path.name in (MASKS, OVERLAYS, PREVIEWS, CINES) and path.is_dir() and not any(path.iterdir()))
        for path in folder.iterdir()
    )

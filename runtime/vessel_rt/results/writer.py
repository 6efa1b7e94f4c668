"""What a run leaves of each frame: its masks, an overlay, a preview, and its lines of results.jsonl and timings.jsonl.

Each file is whole or absent: it is written under a temporary name beside it and renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.errors import ImageError
from vessel_rt.inputs.frames import Frame
from vessel_rt.io.files import is_temporary, replacing, writing
from vessel_rt.model.postprocess import eroded
from vessel_rt.model.segmenter import Mask, Result
from vessel_rt.results.rle import encode_rle
from vessel_rt.results.schema import CINES, MASKS, OVERLAYS, PREVIEWS

__all__ = [
    "Entry",
    "FrameWriter",
    "draw_overlay",
    "failure",
    "is_blank",
    "mask_record",
    "numbered",
    "preview_file",
    "result_line",
    "unknown_timing",
]

_PREVIEW_SIDE = 512  # pixels: of the longer side, at most
# Distinct from each other and from gray, for the eyes of most colour-blind people too.
_COLOURS = ((255, 82, 82), (64, 196, 255), (255, 214, 64), (105, 240, 174), (224, 130, 255), (255, 158, 64))
_IOU_DIGITS, _SCORE_DIGITS = 3, 2  # after the point: further ones depend on the batch (docs/numerics.md)
_TINT = 0.45  # the share of the mask's colour inside it; its outline is all colour


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of one frame: a line for each question, in results.jsonl (alike in every run) and in timings.jsonl (not so)."""

    name: str
    lines: list[dict[str, Any]]
    timings: list[dict[str, Any]]

    @property
    def error(self) -> str | None:
        error: str | None = self.lines[0]["error"]
        return error


class FrameWriter:
    """Writes what comes of frames into a run's folder, from any thread or process.

    Masks are `masks/<name>.png`, then `<name>_1.png`, `<name>_2.png`; a number that would be another frame's name is passed over.

    Args:
        folder: with masks/, overlays/ and previews/ in it.
        names: of all frames of the run, those of other shards, too.
        settings: what a line says of the settings that it was made with.
    """

    def __init__(self, folder: Path, names: Collection[str], settings: str) -> None:
        self._folder, self._names, self._settings = folder, frozenset(name.casefold() for name in names), settings

    def absolute(self) -> FrameWriter:
        """The same, for a process with another current folder."""
        return FrameWriter(self._folder.absolute(), self._names, self._settings)

    def write(self, frame: Frame, sha256: str, image: Image.Image, results: Sequence[Result]) -> Entry:
        """Write one frame's files, whose input has this hash; if that is cut short, none of them stays.

        Raises:
            ImageError: the frame's name is too long for the names of its results.
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
        made = {"input": sha256, "settings": self._settings}
        lines = [
            result_line(frame, result.question, image.size, result.answer, of_result, _files(of_result, written) | pictures, made)
            for result, of_result in zip(results, records, strict=True)
        ]
        return Entry(frame.name, lines, [_timing(line, result) for line, result in zip(lines, results, strict=True)])

    def failure(self, frame: Frame, questions: Sequence[str], error: str) -> Entry:
        """The entry of a frame that could not be segmented; no file is written."""
        return failure(frame, questions, error, self._settings)

    def _write_mask(self, name: str, mask: Mask, written: dict[str, str]) -> dict[str, Any]:
        self._save(name, _stencil(mask.pixels), written, format="PNG")
        return mask_record(mask, name)

    def _save(self, name: str, image: Image.Image, written: dict[str, str], **how: Any) -> str:
        """Write an image file, put its SHA-256 into `written`, and return it."""
        buffer = io.BytesIO()
        image.save(buffer, **how)
        try:
            with replacing(self._folder / name) as temporary:
                temporary.write_bytes(buffer.getbuffer())
        except OSError as e:
            if e.errno == errno.ENAMETOOLONG:
                raise ImageError("its name is too long for the names of its results; shorten it, or take --pseudonymize") from e
            raise
        written[name] = hashlib.sha256(buffer.getbuffer()).hexdigest()
        return written[name]


def failure(frame: Frame, questions: Sequence[str], error: str, settings: str) -> Entry:
    """The entry of a frame that could not be segmented."""
    made = {"input": None, "settings": settings}
    lines = [result_line(frame, question, (None, None), None, [], {}, made, error) for question in questions]
    return Entry(frame.name, lines, [unknown_timing(line) for line in lines])


def preview_file(code: str) -> str:
    """The name of a frame's preview, by its study code: report.html links it, and shows no other name."""
    return f"{PREVIEWS}/{code}.jpg"


def numbered(name: str, taken: Collection[str]) -> Iterator[str]:
    """`name`, `name_1`, `name_2` ... without those, but for the first, that are among `taken`, which are caseless."""
    yield name
    yield from (other for number in itertools.count(1) if (other := f"{name}_{number}").casefold() not in taken)


def mask_record(mask: Mask, file: str | None) -> dict[str, Any]:
    """A mask in a line of results.jsonl."""
    return {
        "file": file,
        "iou": round(mask.iou, _IOU_DIGITS),
        "object_score": round(mask.object_score, _SCORE_DIGITS),
        "area": mask.area,
        "box": mask.box,
        "rle": encode_rle(mask.pixels),
    }


def _files(masks: Sequence[dict[str, Any]], written: dict[str, str]) -> dict[str, str]:
    return {mask["file"]: written[mask["file"]] for mask in masks}


def result_line(
    frame: Frame,
    question: str,
    size: tuple[int | None, int | None],
    answer: str | None,
    masks: list[dict[str, Any]],
    files: dict[str, str],
    made: Mapping[str, str | None],
    error: str | None = None,
) -> dict[str, Any]:
    """A line of results.jsonl, which has the same keys whatever came of the frame."""
    return {
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
        **made,
    }


def unknown_timing(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line of timings.jsonl for a line of results.jsonl of which no times are known."""
    unknown = dict.fromkeys(("drafted", "accepted", "decode_steps", "batch"))
    return {"index": line["index"], "code": line["code"], "question": line["question"], **unknown, "ms": {}}


def _timing(line: Mapping[str, Any], result: Result) -> dict[str, Any]:
    """A line of timings.jsonl."""
    return unknown_timing(line) | {
        "drafted": result.drafted,
        "accepted": result.accepted,
        "decode_steps": result.decode_steps,
        "batch": result.images,
        "ms": {step: round(value, 3) for step, value in result.ms.items()},
    }


def draw_overlay(image: Image.Image, masks: Sequence[npt.NDArray[np.bool_]]) -> Image.Image:
    """The image with each mask [height, width] tinted and outlined in a colour of its own."""
    overlay = image.convert("RGB")
    for mask, colour in zip(masks, itertools.cycle(_COLOURS), strict=False):
        tinted = Image.blend(overlay, Image.new("RGB", overlay.size, colour), _TINT)
        overlay.paste(tinted, mask=_stencil(mask))
        overlay.paste(colour, mask=_stencil(mask & ~eroded(mask)))
    return overlay


def _preview(image: Image.Image) -> Image.Image:
    """The image, not larger than the report shows it."""
    preview = image.copy()
    preview.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE), Image.Resampling.BILINEAR)
    return preview


def _stencil(mask: npt.NDArray[np.bool_]) -> Image.Image:
    """`mask` as Pillow takes it: 255 and 0."""
    return Image.fromarray(mask.view(np.uint8) * np.uint8(255))


def is_blank(folder: Path) -> bool:
    """Whether a folder has nothing in it but what a command leaves that is killed before it writes its first file."""
    return all(
        is_temporary(path) or (path.name in (MASKS, OVERLAYS, PREVIEWS, CINES) and path.is_dir() and not any(path.iterdir()))
        for path in folder.iterdir()
    )

"""The result of the Python API. Does not know how it is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from PIL import Image

from vessel_rt.inputs.frames import Frame, frame_suffix
from vessel_rt.inputs.input_files import stem_of
from vessel_rt.inputs.pseudonyms import printable
from vessel_rt.model import result
from vessel_rt.results.writer import Made, draw_overlay, mask_record, result_line

__all__ = ["Result", "place_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class Result(result.Result):
    """The answer to one question about one image, and its masks.

    `image` is the image in RGB, as it was segmented, and `index` its place in `segment_many`, from 0. `path` and `sha256` are of its file,
    and None for an image in memory; `frame` is the one that was asked for.
    """

    image: Image.Image
    index: int
    path: Path | None
    frame: int | None
    sha256: str | None

    def overlay(self) -> Image.Image:
        """The image with its masks tinted and outlined, RGB: what `vessel-rt infer` writes to overlays/."""
        return draw_overlay(self.image, [mask.pixels for mask in self.masks])

    def to_dict(self) -> dict[str, Any]:
        """A line of results.jsonl, fit for JSON. What only a run's folder has is None (code, settings, a mask's file) or empty (files)."""
        masks, made = [mask_record(mask, "") for mask in self.masks], Made(input=self.sha256, settings="")
        place = place_of(self.path or Path(), self.frame, self.index)
        line = result_line(place, self.question, self.image.size, self.answer, masks, {}, made)
        unknown = {"code": None, "settings": None, "masks": [{**mask, "file": None} for mask in masks]}
        return {**line, **unknown, **({} if self.path else {"image": None, "name": None})}


def place_of(path: Path, number: int | None, index: int) -> Frame:
    """A file as a run would have it, without a study code."""
    shown = printable(str(path)) + ("" if number is None else f", frame {number}")
    return Frame(path, number, index, stem_of(path) + frame_suffix(number), "", path.name, shown)

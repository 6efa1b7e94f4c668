"""The values of the pipeline: an image's pixels, the graphs' answer, the result with its masks. Does not know how they are made."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from vessel_rt.model.decoding import Generation
from vessel_rt.model.postprocess import bounding_box

__all__ = ["Answer", "Mask", "Pixels", "Result"]


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
    """An image as the graphs take it: `tiles` [tiles, 3, size, size], `square` [1, 3, size, size]; `ms` is the time that it took."""

    width: int
    height: int
    tiles: npt.NDArray[Any]
    square: npt.NDArray[Any]
    ms: dict[str, float]

    def spent(self) -> Pixels:
        """The same without pixels, for `finish`."""
        return dataclasses.replace(self, tiles=self.tiles[:0].copy(), square=self.square[:0].copy())


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """The output of the graphs for one image and question; `low_res_logits` [masks, side, side], `iou` and `object_score` [masks]."""

    question: str
    generation: Generation
    low_res_logits: npt.NDArray[np.float32]
    iou: npt.NDArray[np.float32]
    object_score: npt.NDArray[np.float32]
    images: int
    ms: dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """One mask, [height, width] of the image, with SAM2's predicted IoU and its object score (a logit: above 0, something is there)."""

    pixels: npt.NDArray[np.bool_]
    iou: float
    object_score: float

    @property
    def area(self) -> int:
        """The number of pixels in the mask."""
        return int(self.pixels.sum())

    @property
    def box(self) -> list[int] | None:
        """`[x0, y0, x1, y1]` in pixels, the right and lower ends excluded, or None for an empty mask."""
        return bounding_box(self.pixels)


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The answer to one question about one image, and its masks, in the order of [SEG] in the answer; there may be none.

    `decode_steps` counts the runs of language_model after the first. `drafted` tokens ran with the prompt; the model would have generated
    the first `accepted` itself. `images` is the size of the batch. `ms` has the wall time of each step in milliseconds, for all
    questions about the image together; a batch's time is divided equally. `propagated_from` are the places in the cine of the frames from
    which the masks were tracked; None if a [SEG] state prompted them.
    """

    question: str
    answer: str
    token_ids: tuple[int, ...]
    drafted: int
    accepted: int
    decode_steps: int
    images: int
    ms: dict[str, float]
    masks: tuple[Mask, ...]
    propagated_from: tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)

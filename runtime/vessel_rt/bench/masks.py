"""Masks in little memory, and how well those of a frame agree with others. Does not know which bundle they are of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vessel_rt.evaluation.ground_truth import GroundTruth, matched
from vessel_rt.evaluation.metrics import dice, iou

__all__ = ["PackedMask", "dice_of", "least_iou"]

Masks = Mapping[int, "Sequence[PackedMask]"]  # by the position of the frame


@dataclasses.dataclass(frozen=True)
class PackedMask:
    """A mask [height, width], a bit for each pixel."""

    shape: tuple[int, int]
    bits: bytes

    @classmethod
    def of(cls, mask: npt.NDArray[np.bool_]) -> PackedMask:
        height, width = mask.shape
        return cls((height, width), np.packbits(mask).tobytes())

    @property
    def pixels(self) -> npt.NDArray[np.bool_]:
        height, width = self.shape
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=height * width).astype(np.bool_).reshape(self.shape)


def least_iou(masks: Masks, reference: Masks) -> float | None:
    """The least IoU of a mask with the reference's, over the frames that both have; 0 if their numbers differ, None without a mask."""
    found = []
    for position in masks.keys() & reference.keys():
        ours, theirs = masks[position], reference[position]
        if len(ours) != len(theirs):
            return 0.0
        found += [iou(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True)]
    return min(found, default=None)


def dice_of(masks: Masks, truth: GroundTruth, question: str, lines: Mapping[int, Mapping[str, Any]]) -> float | None:
    """The mean Dice over the frames and concepts that have ground truth, as `vessel-rt evaluate` pairs them; None if none has.

    `lines` are what the ground truth of each frame is looked up by. Raises VesselError.
    """
    found = list(_dices(masks, truth, question, lines))
    return sum(found) / len(found) if found else None


def _dices(masks: Masks, truth: GroundTruth, question: str, lines: Mapping[int, Mapping[str, Any]]) -> Iterator[float]:
    for position, of_frame in masks.items():
        for _, _, chosen, drawn in matched(truth, question, lines[position], of_frame):
            predicted = np.zeros_like(drawn)
            for mask in chosen:
                predicted |= mask.pixels
            yield dice(predicted, drawn)

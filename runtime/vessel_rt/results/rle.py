"""Masks as COCO's compressed run lengths: `{"size": [height, width], "counts": text}`, as pycocotools reads and writes them.

What is decoded may come from a file that was edited or damaged, and pycocotools reads and writes beyond its memory for counts that do not
fit the size. So they are decoded here, and anything that is not a mask is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vessel_rt.inputs.images import MAX_SIDE
from vessel_rt.results.schema import Rle

__all__ = ["decode_rle", "encode_rle"]

_MOST_PIXELS = MAX_SIDE**2
_MOST_DIGITS = 7  # of a count: 35 bits, more than any mask that is read can take


def encode_rle(mask: npt.NDArray[np.bool_]) -> Rle:
    """The run lengths of a mask [height, width]."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def decode_rle(rle: Any) -> npt.NDArray[np.bool_]:
    """The mask [height, width] of run lengths, whose counts may be bytes, too. Raises ValueError for whatever is not a mask."""
    try:
        (height, width), counts = rle["size"], rle["counts"]
        if not (type(height) is type(width) is int and min(height, width) > 0 and height * width <= _MOST_PIXELS):
            raise ValueError("a size that no mask has")
        if not isinstance(counts, str | bytes):
            raise ValueError("counts that are not text")
        runs = _runs(counts.encode("ascii") if isinstance(counts, str) else counts)
    except (KeyError, TypeError) as e:
        raise ValueError("not run lengths") from e
    if runs.min() < 0 or runs.max() > height * width or runs.sum() != height * width:  # each first: a sum of absurd ones may overflow
        raise ValueError("run lengths that do not fill their mask")
    inside = (np.arange(len(runs)) % 2).astype(np.bool_)
    return np.repeat(inside, runs).reshape((height, width), order="F")


def _runs(counts: bytes) -> npt.NDArray[np.int64]:
    """The lengths of the runs outside and inside the mask, in turn, column by column.

    A number is its digits in base 32, the least first, each a letter from `0` on; 32 more says that another follows, and the highest bit
    of the last is the sign. From the fourth on a number is the difference to the one before the last.
    """
    letters = np.frombuffer(counts, np.uint8).astype(np.int64) - ord("0")
    if not len(letters) or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        raise ValueError("counts that are not run lengths")
    last = np.flatnonzero(letters & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    digits = last - first + 1
    if digits.max() > _MOST_DIGITS:
        raise ValueError("run lengths beyond any mask")
    place = np.arange(len(letters)) - np.repeat(first, digits)
    numbers = np.add.reduceat((letters & 31) << (5 * place), first)
    numbers -= np.where(letters[last] & 16, np.int64(1) << (5 * digits), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers

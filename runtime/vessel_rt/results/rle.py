"""Masks as COCO's compressed run lengths: `{"size": [height, width], "counts": text}`, as pycocotools reads and writes them.

Decoding is done here because pycocotools accesses memory out of bounds if counts do not fit the size, as they may in a file that was
edited or damaged. Here anything that is not a mask is an error. Does not know which file a mask is from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vessel_rt.inputs.images import MAX_SIDE
from vessel_rt.results.schema import Rle

__all__ = ["decode_rle", "encode_rle"]

_MOST_PIXELS = MAX_SIDE**2
_MOST_DIGITS = 7  # of a count: 35 bits, enough for the largest mask


def encode_rle(mask: npt.NDArray[np.bool_]) -> Rle:
    """The run lengths of a mask [height, width]."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def decode_rle(rle: Any) -> npt.NDArray[np.bool_]:
    """The mask [height, width] of run lengths; counts may be text or bytes. Raises ValueError for anything that is not a mask."""
    try:
        (height, width), counts = rle["size"], rle["counts"]
        if not (type(height) is type(width) is int and min(height, width) > 0 and height * width <= _MOST_PIXELS):
            raise ValueError("its size is not that of a mask")
        if not isinstance(counts, str | bytes):
            raise ValueError("its counts are not text")
        runs = _runs(counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts)
    except (KeyError, TypeError) as e:
        raise ValueError("it has no size or no counts") from e
    if runs.min() < 0 or runs.max() > height * width or runs.sum() != height * width:  # checked first: a sum of huge values may overflow
        raise ValueError("its run lengths do not add up to its size")
    inside = (np.arange(len(runs)) % 2).astype(np.bool_)
    return np.repeat(inside, runs).reshape((height, width), order="F")


def _runs(counts: bytes) -> npt.NDArray[np.int64]:
    """The lengths of the runs outside and inside the mask, alternating, column by column.

    A number is written in base 32, least significant digit first. A digit is a character from `0` on; 32 is added if another digit follows,
    and the highest bit of the last digit is the sign. From the fourth number on, the difference to the second-last number is written.
    """
    letters = np.frombuffer(counts, np.uint8).astype(np.int64) - ord("0")
    if not len(letters) or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        raise ValueError("its counts are not run lengths")
    last = np.flatnonzero(letters & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    digits = last - first + 1
    if digits.max() > _MOST_DIGITS:
        raise ValueError("a run length is larger than any mask")
    place = np.arange(len(letters)) - np.repeat(first, digits)
    numbers = np.add.reduceat((letters & 31) << (5 * place), first)
    numbers -= np.where(letters[last] & 16, np.int64(1) << (5 * digits), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers

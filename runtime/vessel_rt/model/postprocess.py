"""From low-res logits to a mask at the image's size, and the box and outline of a mask. Does not know about graphs or files."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

__all__ = ["bounding_box", "eroded", "upsample"]


def upsample(logits: npt.NDArray[np.float32], middle: int, width: int, height: int) -> npt.NDArray[np.float32]:
    """Low-res logits [masks, side, side] at the image's size, [masks, height, width].

    Sa2VA resizes twice, bilinearly (torch's `interpolate`, align_corners=False, no antialiasing): to SAM2's square of `middle`
    pixels, then to the image. Both steps are linear and separable, so each axis is a product with one small matrix.
    """
    side = logits.shape[-1]
    rows, columns = _resize_twice(side, middle, height), _resize_twice(side, middle, width)
    return (rows @ logits @ columns.T).astype(np.float32, copy=False)


@functools.lru_cache(maxsize=64)
def _resize_twice(source: int, middle: int, target: int) -> npt.NDArray[np.float32]:
    """The matrix [target, source] of two bilinear resizes of one axis."""
    return (_resize(middle, target) @ _resize(source, middle)).astype(np.float32)


def _resize(source: int, target: int) -> npt.NDArray[np.float64]:
    """The matrix [target, source] of a bilinear resize of one axis.

    Positions are rounded as in torch: the scale to float32, then the fused multiply-add `(i + 0.5) * scale - 0.5`.
    """
    scale = np.float64(np.float32(source) / np.float32(target))
    index = np.arange(target)
    position = np.maximum(((index + 0.5) * scale - 0.5).astype(np.float32), 0)
    left = np.minimum(position.astype(np.int64), source - 1)
    right = np.minimum(left + 1, source - 1)
    weight = position - left
    matrix = np.zeros((target, source))
    np.add.at(matrix, (index, left), 1 - weight)
    np.add.at(matrix, (index, right), weight)
    return matrix


def bounding_box(mask: npt.NDArray[np.bool_]) -> list[int] | None:
    """`[x0, y0, x1, y1]` in pixels, the right and lower ends excluded, or None for an empty mask."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def eroded(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask without its outermost pixels: those with one of four neighbours outside, or beyond the image's border."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]

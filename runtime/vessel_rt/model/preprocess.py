"""From an RGB image to the `pixel_values` of the two encoders, exactly as in training.

The rules are Sa2VA's (projects/sa2va/hf/models/modeling_sa2va_chat.py: dynamic_preprocess, predict_forward), which follow InternVL's.
Does not know about files or models: sizes and constants come from the bundle.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.formats.bundle import MaskSpec, TileSpec

__all__ = ["mask_pixels", "tile_grid", "tile_pixels"]


def tile_grid(width: int, height: int, spec: TileSpec) -> tuple[int, int]:
    """Columns and rows of the tiles that an image of `width` x `height` pixels is resized to and cut into.

    The grid whose aspect ratio is closest to the image's. Among equally close ones, the largest that the image fills at least by half.
    """
    grids = [
        (columns, rows)
        for columns in range(1, spec.max_tiles + 1)
        for rows in range(1, spec.max_tiles + 1)
        if spec.min_tiles <= columns * rows <= spec.max_tiles
    ]
    best, best_distance = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        filled_by_half = width * height > 0.5 * spec.size**2 * columns * rows
        if distance < best_distance or (distance == best_distance and filled_by_half):
            best, best_distance = (columns, rows), distance
    return best


def tile_pixels(image: Image.Image, spec: TileSpec, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """The image's tiles, row by row, and, if there are several, a thumbnail of the whole image: [tiles, 3, size, size]."""
    columns, rows = tile_grid(image.width, image.height, spec)
    size = spec.size
    tiles = _resized(image, columns * size, rows * size)
    tiles = tiles.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    if spec.thumbnail and len(tiles) > 1:
        tiles = np.concatenate([tiles, _resized(image, size, size)[None]])
    return _normalized(tiles, spec.mean, spec.std, dtype)


def mask_pixels(image: Image.Image, spec: MaskSpec, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """The whole image, resized to a square, for SAM2's image encoder: [1, 3, size, size]."""
    return _normalized(_resized(image, spec.size, spec.size)[None], spec.mean, spec.std, dtype)


def _resized(image: Image.Image, width: int, height: int) -> npt.NDArray[np.uint8]:
    """RGB bytes [height, width, 3]. Sa2VA names no filter: bicubic is Pillow's default for RGB."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _normalized(pixels: npt.NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Bytes [n, height, width, 3] to `(byte / 255 - mean) / std`, [n, 3, height, width]: float32 arithmetic, rounded once to `dtype`.

    A channel has only 256 values, so they are computed once and looked up plane by plane: NumPy is fast when it writes contiguous memory.
    """
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    tables = [((levels - np.float32(m)) / np.float32(s)).astype(dtype) for m, s in zip(mean, std, strict=True)]
    result = np.empty((len(pixels), 3, *pixels.shape[1:3]), dtype)
    for tile, planes in zip(pixels, result, strict=True):
        for channel, table in enumerate(tables):
            np.take(table, tile[..., channel], out=planes[channel], mode="clip")
    return result

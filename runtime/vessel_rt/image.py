"""From an image file to the `pixel_values` of the two encoders, exactly as in training.

The rules are Sa2VA's (projects/sa2va/hf/models/modeling_sa2va_chat.py: dynamic_preprocess, predict_forward), which follow
InternVL's. Knows nothing of models: sizes and constants come from the bundle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from vessel_rt.bundle import MaskSpec, TileSpec
from vessel_rt.errors import ImageError

__all__ = ["MAX_SIDE", "SUFFIXES", "mask_pixels", "read_image", "tile_grid", "tile_pixels"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
MAX_SIDE = 8192  # pixels; a square of it stays under the size at which Pillow warns of a decompression bomb

_FORMATS = ("JPEG", "PNG", "TIFF", "BMP")


def read_image(path: Path) -> Image.Image:
    """The image in RGB, as Sa2VA's `Image.open(path).convert("RGB")` gives it.

    So EXIF rotation is ignored, alpha is dropped, palettes are looked up, and gray of 16 or 32 bits is not scaled but
    clipped at 255; 16-bit RGB keeps its high bytes; of several pages the first is taken. Nothing but pixels is taken from the file:
    Pillow would write a JPEG's comment into whatever is made of it.

    Raises:
        ImageError: not a readable JPG, PNG, TIFF or BMP file, cut short, or a side longer than MAX_SIDE. The text does not name the file.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if max(image.size) > MAX_SIDE:
                raise ImageError(f"{image.width}x{image.height} pixels are too many; sides up to {MAX_SIDE} are read")
            pixels = image.convert("RGB")
            pixels.info = {}
            return pixels
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except UnidentifiedImageError as e:
        kind = "an empty file" if path.stat().st_size == 0 else "not a JPG, PNG, TIFF or BMP image"
        raise ImageError(kind) from e
    except Exception as e:  # a decoder given a broken file may raise anything
        said = e.strerror if isinstance(e, OSError) and e.strerror else e  # its whole text would name the file
        raise ImageError(f"cannot be decoded ({said})") from e


def tile_grid(width: int, height: int, spec: TileSpec) -> tuple[int, int]:
    """Columns and rows of the tiles that an image of `width` x `height` pixels is resized to and cut into.

    The grid whose shape is nearest the image's; of equally near ones the largest that the image fills by half.
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
    """The image's tiles, row by row, then, if there are several, a thumbnail of the whole: [tiles, 3, size, size]."""
    columns, rows = tile_grid(image.width, image.height, spec)
    size = spec.size
    tiles = _resized(image, columns * size, rows * size)
    tiles = tiles.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    if spec.thumbnail and len(tiles) > 1:
        tiles = np.concatenate([tiles, _resized(image, size, size)[None]])
    return _normalized(tiles, spec.mean, spec.std, dtype)


def mask_pixels(image: Image.Image, spec: MaskSpec, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """The whole image, squeezed to a square, for SAM2's image encoder: [1, 3, size, size]."""
    return _normalized(_resized(image, spec.size, spec.size)[None], spec.mean, spec.std, dtype)


def _resized(image: Image.Image, width: int, height: int) -> npt.NDArray[np.uint8]:
    """RGB bytes [height, width, 3]. Sa2VA names no filter: bicubic is Pillow's default for RGB."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _normalized(pixels: npt.NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Bytes [n, height, width, 3] to `(byte / 255 - mean) / std`, [n, 3, height, width]: float32 arithmetic, rounded once to `dtype`.

    A channel has 256 values only, so they are computed once and looked up, a plane at a time: into memory in one piece, NumPy is fast.
    """
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    tables = [((levels - np.float32(m)) / np.float32(s)).astype(dtype) for m, s in zip(mean, std, strict=True)]
    result = np.empty((len(pixels), 3, *pixels.shape[1:3]), dtype)
    for tile, planes in zip(pixels, result, strict=True):
        for channel, table in enumerate(tables):
            np.take(table, tile[..., channel], out=planes[channel], mode="clip")
    return result

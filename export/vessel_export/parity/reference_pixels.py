"""The reference's preprocessing, with Pillow and torch. Does not know the runtime's, which it is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["tile_image", "to_pixel_values"]

# Constants of Sa2VA's inference (`preparing_for_generation`).
_MIN_TILES, _MAX_TILES = 1, 12
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tile_image(image: Image.Image, size: int) -> list[Image.Image]:
    """Cut an RGB image into 1 to 12 tiles of `size` pixels, row by row, and a thumbnail last if there is more than one.

    InternVL's dynamic tiling takes the grid whose aspect ratio is closest to the image's, and among equally close ones the largest that the
    image fills by more than half. Pillow's default filter (bicubic) resizes the image.
    """
    columns, rows = _choose_grid(image.width, image.height, size)
    resized = image.resize((columns * size, rows * size))
    boxes = [(x * size, y * size, (x + 1) * size, (y + 1) * size) for y in range(rows) for x in range(columns)]
    tiles = [resized.crop(box) for box in boxes]
    return tiles if len(tiles) == 1 else [*tiles, image.resize((size, size))]


def to_pixel_values(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size -> float32 [images, 3, height, width]: to 0..1, then ImageNet's mean and standard deviation."""
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (_IMAGENET_MEAN, _IMAGENET_STD))
    return ((pixels.float() / 255 - mean) / std).contiguous()


def _choose_grid(width: int, height: int, size: int) -> tuple[int, int]:
    """(columns, rows) of tiles for an image of width x height pixels."""
    numbers = range(1, _MAX_TILES + 1)
    grids = sorted(((c, r) for c in numbers for r in numbers if _MIN_TILES <= c * r <= _MAX_TILES), key=lambda grid: grid[0] * grid[1])
    best, smallest = (1, 1), math.inf
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        fills = width * height > 0.5 * size * size * columns * rows
        if distance < smallest or (distance == smallest and fills):
            best, smallest = (columns, rows), distance
    return best

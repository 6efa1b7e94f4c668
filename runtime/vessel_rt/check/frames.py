"""Frames that look like angiograms, for measurements: drawn here, of no patient. Does not know what is measured with them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vessel_rt.formats.bundle import TileSpec
from vessel_rt.model.preprocess import tile_grid

__all__ = ["frame_of", "tiles_of"]


def frame_of(tiles: int, spec: TileSpec, seed: int = 0) -> Image.Image:
    """A square RGB frame that is cut into about `tiles` tiles, the thumbnail included; see `tiles_of` for their number."""
    side = spec.size * max(1, round((tiles - (spec.thumbnail and tiles > 1)) ** 0.5))
    random = np.random.default_rng(seed)
    image = Image.new("L", (side, side), 150)
    draw = ImageDraw.Draw(image)
    for width in (16, 11, 7, 5, 4):
        steps = np.cumsum(random.normal((side / 40, side / 28), side / 50, (24, 2)), axis=0)
        draw.line([(float(x), float(y)) for x, y in steps + random.uniform(0, side / 3, 2)], fill=70, width=max(1, width * side // 512))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(side / 400)), np.float32)
    noisy = blurred + random.normal(0, 6, blurred.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert("RGB")


def tiles_of(image: Image.Image, spec: TileSpec) -> int:
    """The number of tiles of an image, the thumbnail included."""
    columns, rows = tile_grid(image.width, image.height, spec)
    return columns * rows + (spec.thumbnail and columns * rows > 1)

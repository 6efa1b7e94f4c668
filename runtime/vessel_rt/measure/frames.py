"""Frames that look like angiograms: drawn here, of no patient. Does not know what they are for."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from vessel_rt.formats.bundle import TileSpec
from vessel_rt.model.preprocess import tile_grid

__all__ = ["draw_angiogram", "frame_of", "tiles_of"]


def frame_of(tiles: int, spec: TileSpec, seed: int = 0) -> Image.Image:
    """A square RGB frame that is cut into about `tiles` tiles, the thumbnail included; see `tiles_of` for their number."""
    side = spec.size * max(1, round((tiles - (spec.thumbnail and tiles > 1)) ** 0.5))
    return Image.fromarray(draw_angiogram(side, side, seed)).convert("RGB")


def tiles_of(size: tuple[int, int], spec: TileSpec) -> int:
    """The number of tiles of an image of `size`, width and height in pixels, the thumbnail included."""
    columns, rows = tile_grid(*size, spec)
    return columns * rows + (spec.thumbnail and columns * rows > 1)


def draw_angiogram(width: int, height: int, seed: int) -> npt.NDArray[np.uint8]:
    """A dark tree of vessels and a catheter on an uneven background with noise, in gray: [height, width]."""
    random = np.random.default_rng(seed)
    scale = min(width, height) / 512
    contrast = _vessels(random, width, height, scale)
    uneven = Image.fromarray(random.uniform(0.75, 1.15, (5, 5)).astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    beam = 1 - 0.35 * (x**2 + y**2)
    noise = random.normal(0, 0.02, (height, width))
    brightness = 165 * (np.asarray(uneven) * beam * np.exp(-0.9 * contrast) + noise)
    return np.asarray(np.clip(np.rint(brightness), 0, 255), np.uint8)


def _vessels(random: np.random.Generator, width: int, height: int, scale: float) -> npt.NDArray[np.float64]:
    """The contrast agent, 0 to 1: a tree that grows from the tip of a catheter. Drawn twice as large, so that edges are smooth."""
    canvas = Image.new("L", (2 * width, 2 * height))
    draw = ImageDraw.Draw(canvas)
    tip = random.uniform(0.2, 0.35, 2) * (width, height)
    draw.line([(0.25 * width, 0), (0.3 * width, 0.1 * height), tuple(2 * tip)], fill=130, width=max(1, round(9 * scale)))
    growing = [(tip, random.uniform(0.3, 0.9), 9 * scale) for _ in range(2)]
    while growing:
        at, angle, radius = growing.pop()
        bend = random.normal(0, 0.05)
        for _ in range(int(random.integers(10, 24))):
            angle += bend + random.normal(0, 0.12)
            step = at + 11 * scale * np.array([math.cos(angle), math.sin(angle)])
            draw.line([tuple(2 * at), tuple(2 * step)], fill=255, width=max(1, round(2 * radius)))
            at, radius = step, radius * 0.985
        if radius > 1.6 * scale:
            growing += [(at, angle + turn, radius * random.uniform(0.6, 0.85)) for turn in random.normal((-0.45, 0.5), 0.15)]
    smooth = canvas.filter(ImageFilter.GaussianBlur(2.5 * scale)).resize((width, height), Image.Resampling.BOX)
    return np.asarray(smooth, np.float64) / 255

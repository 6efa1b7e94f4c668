"""The frames of goldens: drawn ones, so that no patient's data are in a bundle. Does not know the reference."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vessel_rt.formats.bundle import TileSpec
from vessel_rt.measure.frames import draw_angiogram
from vessel_rt.model.preprocess import tile_grid

__all__ = ["golden_frames"]

_SQUARE, _WIDE, _WIDER = 512, (512, 384), (480, 320)  # 1, 12 and 6 tiles of 448 pixels, without thumbnails


def golden_frames(tiles: TileSpec) -> list[npt.NDArray[np.uint8]]:
    """Three frames, uint8 [height, width], that are cut into 1, 7 and 13 tiles, thumbnails included, if `tiles` is as in InternVL."""
    side = _SQUARE if tile_grid(_SQUARE, _SQUARE, tiles) == (1, 1) else tiles.size
    return [draw_angiogram(width, height, seed) for seed, (width, height) in enumerate(((side, side), _WIDER, _WIDE), start=1)]

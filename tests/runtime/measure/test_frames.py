from __future__ import annotations

import numpy as np
import pytest

from vessel_rt.formats.bundle import Bundle
from vessel_rt.measure.frames import frame_of, tiles_of
from vessel_rt.model.preprocess import tile_pixels


@pytest.mark.parametrize("tiles", [1, 5, 10])
def test_a_frame_has_the_tiles_that_were_asked_for(standin: Bundle, tiles: int) -> None:
    image = frame_of(tiles, standin.tiles)
    assert tiles_of(image.size, standin.tiles) == tiles
    assert len(tile_pixels(image, standin.tiles)) == tiles


def test_frames_are_the_same_each_time_and_have_dark_vessels(standin: Bundle) -> None:
    first, again, other = (np.asarray(frame_of(1, standin.tiles, seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.mean() > 120
    assert (first < 100).mean() > 0.01

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.frames import CODES
from vessel_rt.bench.frames import given_frames, golden_frames, read
from vessel_rt.errors import VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.frames import Frame, Naming, Selection


def test_given_frames_are_grouped_by_their_tiles(frames: Path, standin: Bundle) -> None:
    found = given_frames([str(frames)], Naming(CODES), Selection(num_images=2))
    assert (found.source, found.sizes) == ("given", ((96, 64), (96, 64)))
    assert found.by_tiles(standin.tiles) == {7: [0, 1]}
    first = found.frames[0]
    assert isinstance(first, Frame)
    assert (found.line(0)["name"], found.line(0)["width"], found.line(0)["height"]) == ("a", 96, 64)
    assert read(first).size == (96, 64)


def test_goldens_are_those_of_the_first_bundle_that_has_any(standin: Bundle, golden_standin: Path) -> None:
    golden = Bundle.load(golden_standin)
    found = golden_frames([standin, golden], None)
    assert (found.source, len(found.frames), found.line(0)) == ("goldens", 2, {})
    assert found.by_tiles(golden.tiles) == {1: [0], 5: [1]}
    image = read(found.frames[0])
    assert (image.mode, image.size) == ("RGB", found.sizes[0])
    assert np.array_equal(np.asarray(image)[..., 0], found.frames[0])  # type: ignore[arg-type]
    assert len(golden_frames([golden], 1).frames) == 1
    with pytest.raises(VesselError, match="no bundle has goldens"):
        golden_frames([standin], None)

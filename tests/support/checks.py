"""What the tests of `vessel-rt check` and `bench` share: frames of few tiles, goldens of them, and the type of a function that checks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.goldens import make_goldens
from vessel_rt.check.schema import CheckFile
from vessel_rt.formats.bundle import Bundle
from vessel_rt.measure import timing
from vessel_rt.measure.frames import frame_of

TILES = (1, 5)  # frames of 10, as the command measures, take long

Check = Callable[..., CheckFile]


def once(patch: pytest.MonkeyPatch) -> None:
    """Measure every time once, in this process."""
    for name in ("_LEAST_RUNS", "_MOST_RUNS"):
        patch.setattr(timing, name, 1)


def with_goldens(folder: Path, source: Path, question: str) -> None:
    """A copy of a bundle, with the goldens that it makes itself of a frame for each of TILES."""
    bundle = Bundle.load(Path(shutil.copytree(source, folder)))
    make_goldens(bundle, [frame_of(tiles, bundle.tiles, seed=tiles) for tiles in TILES], [question]).save(bundle)

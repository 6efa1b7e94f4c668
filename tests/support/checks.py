"""What the tests of `vessel-rt check` share: frames of few tiles, goldens of them, and the type of a function that checks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.support.goldens import make_goldens
from vessel_rt.check.frames import frame_of
from vessel_rt.check.schema import CheckFile
from vessel_rt.formats.bundle import Bundle

TILES = (1, 5)  # frames of 10, as the command measures, take long

Check = Callable[..., CheckFile]


def with_goldens(folder: Path, source: Path, question: str) -> None:
    """A copy of a bundle, with the goldens that it makes itself of a frame for each of TILES."""
    bundle = Bundle.load(Path(shutil.copytree(source, folder)))
    make_goldens(bundle, [frame_of(tiles, bundle.tiles, seed=tiles) for tiles in TILES], [question]).save(bundle)

"""Fixtures of the runtime's tests: bundles whose answer is known, and frames to feed them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Tiny
from tests.runtime.standin import build_standin
from vessel_rt.bundle import Bundle


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Answers `Mask [SEG].`; not to be written to."""
    return build_standin(tmp_path_factory.mktemp("standin") / "standin")


def make_frame(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A bright field with a dark bar across it, and noise."""
    pixels = np.random.default_rng(seed).integers(150, 220, (height, width, 3), dtype=np.uint8)
    pixels[height // 3 : height // 2] = 30
    return Image.fromarray(pixels)


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A folder of three good frames: a.jpg, b.png and c.tif."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for seed, name in enumerate(("a.jpg", "b.png", "c.tif")):
        make_frame(seed=seed).save(folder / name)
    return folder


@pytest.fixture
def tiny_frames(tiny: Tiny) -> list[Path]:
    """The frames that come with examples/tiny, sorted."""
    return sorted(tiny.frames.glob("*.jpg"))

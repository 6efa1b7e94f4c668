"""Generated frames, and frames as a run places them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vessel_rt.inputs.frames import Frame
from vessel_rt.inputs.pseudonyms import StudyCodes

CODES = StudyCodes(bytes(32))


def preview(name: str) -> str:
    """The preview of a frame of this name in an output folder."""
    return f"previews/{CODES.code(name)}.jpg"


def make_frame(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A bright field with a dark bar across it, and noise."""
    pixels = np.random.default_rng(seed).integers(150, 220, (height, width, 3), dtype=np.uint8)
    pixels[height // 3 : height // 2] = 30
    return Image.fromarray(pixels)


def placed(*paths: str | Path) -> list[Frame]:
    """The frames of these files, as a run would have them, whether they are there or not."""
    files, count = [Path(path) for path in paths], len(paths)
    codes = [CODES.code(path.stem) for path in files]
    return [
        Frame(path, None, index, path.stem, code, path.name, f"frame {index + 1} of {count} ({code})")
        for index, (path, code) in enumerate(zip(files, codes, strict=True))
    ]

"""The frames that are measured: those that the user names, or the goldens' of a bundle. Does not know how they are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from vessel_rt.bench.schema import Source
from vessel_rt.errors import ImageError, VesselError
from vessel_rt.formats.bundle import Bundle, TileSpec
from vessel_rt.formats.golden import Golden
from vessel_rt.inputs.frames import Frame, Naming, Selection, find_frames, read_frame
from vessel_rt.measure.frames import tiles_of

__all__ = ["BenchFrame", "FrameSet", "given_frames", "golden_frames", "read"]

BenchFrame: TypeAlias = "Frame | npt.NDArray[np.uint8]"
"""A frame to be read, or a gray one [height, width]."""


@dataclasses.dataclass(frozen=True, eq=False)
class FrameSet:
    """Frames, and the width and height of each in pixels."""

    source: Source
    frames: tuple[BenchFrame, ...]
    sizes: tuple[tuple[int, int], ...]

    def by_tiles(self, spec: TileSpec) -> dict[int, list[int]]:
        """The positions of the frames, by the number of tiles that they are cut into."""
        found: dict[int, list[int]] = {}
        for position, size in enumerate(self.sizes):
            found.setdefault(tiles_of(size, spec), []).append(position)
        return dict(sorted(found.items()))

    def line(self, position: int) -> Mapping[str, Any]:
        """What ground truth is looked up by; empty for a frame that has no name."""
        frame, (width, height) = self.frames[position], self.sizes[position]
        if not isinstance(frame, Frame):
            return {}
        return {"name": frame.name, "code": frame.code, "index": frame.index, "width": width, "height": height}


def given_frames(inputs: Sequence[str], naming: Naming, selection: Selection) -> FrameSet:
    """The frames that `inputs` name; all are read once, so that a bad one is found before anything is measured.

    Raises:
        VesselError: an input does not exist or has no frame, or a frame cannot be read.
    """
    frames = find_frames(inputs, naming, selection).frames
    sizes = []
    for frame in tqdm(frames, desc="reading the frames", unit="frame", disable=None, delay=2, leave=False):
        try:
            sizes.append(read_frame(frame).size)
        except ImageError as e:
            raise VesselError(f"{frame.shown}: {e}") from e
    return FrameSet("given", tuple(frames), tuple(sizes))


def golden_frames(bundles: Iterable[Bundle], most: int | None) -> FrameSet:
    """The first `most` frames in the goldens of the first of `bundles` that has any.

    Raises:
        VesselError: none has goldens.
        BundleError: they cannot be read.
    """
    for bundle in bundles:
        if golden := Golden.load(bundle):
            frames = golden.frames[:most]
            return FrameSet("goldens", frames, tuple((frame.shape[1], frame.shape[0]) for frame in frames))
    raise VesselError("no frames: name some, since no bundle has goldens (`vessel-export verify --record` writes them)")


def read(frame: BenchFrame) -> Image.Image:
    """The frame in RGB, 8 bits. Raises ImageError."""
    return read_frame(frame) if isinstance(frame, Frame) else Image.fromarray(frame).convert("RGB")

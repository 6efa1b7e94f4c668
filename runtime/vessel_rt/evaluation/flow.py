"""Optical flow between two frames, and masks that move with it: iterative Lucas-Kanade of scikit-image, on reduced images.

A frame is reduced to SIDE pixels first: flow is smooth, so its time does not depend on the frame's size, and little is lost
(docs/metrics.md). Needs the extra `evaluate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.errors import VesselError
from vessel_rt.evaluation.metrics import Mask

__all__ = ["SIDE", "Shown", "Warp", "load_warp"]

SIDE = 256  # pixels of the longer side, at most
_RADIUS = 7  # pixels around each pixel whose motion counts, at SIDE: scikit-image's default


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """What a frame shows, in gray [height, width] of 0 to 1; compared by identity."""

    gray: npt.NDArray[np.float32]

    @classmethod
    def of(cls, image: Image.Image) -> Shown:
        """The image at SIDE pixels, or as it is if it is smaller."""
        scale = min(1.0, SIDE / max(image.size))
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        return cls(np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), np.float32) / np.float32(255))


class Warp:
    """Moves masks from one frame to the next. Of the last pair of frames, the flow is kept: several objects share it."""

    def __init__(self, flow: Callable[..., npt.NDArray[np.float32]], warp: Callable[..., npt.NDArray[Any]]) -> None:
        self._flow, self._warp = flow, warp
        self._pair: tuple[Shown, Shown] | None = None
        self._field = np.empty((2, 0, 0), np.float32)

    def __call__(self, mask: Mask, before: Shown, now: Shown) -> Mask:
        """The mask [height, width] of the frame `before` where it would be on the frame `now`.

        Each pixel is looked up where it came from, between pixels bilinearly; above one half it is in the mask.
        """
        if self._pair != (before, now):
            self._pair, self._field = (before, now), self._flow(now.gray, before.gray, radius=_RADIUS, dtype=np.float32)
        height, width = mask.shape
        places = np.indices(mask.shape, dtype=np.float32)
        for axis, side in enumerate(mask.shape):
            field = Image.fromarray(self._field[axis]).resize((width, height), Image.Resampling.BILINEAR)
            places[axis] += np.asarray(field) * (side / self._field.shape[1 + axis])
        return np.asarray(self._warp(mask.astype(np.float32), places, order=1, mode="edge") > 0.5)


def load_warp() -> Warp:
    """Import scikit-image. Raises VesselError if it is not installed."""
    try:
        from skimage.registration import optical_flow_ilk
        from skimage.transform import warp
    except ImportError as e:
        raise VesselError("--flow needs scikit-image: pip install 'vessel-rt[evaluate]'") from e
    return Warp(optical_flow_ilk, warp)

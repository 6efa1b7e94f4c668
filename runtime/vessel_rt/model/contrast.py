"""Which frames of an angiographic cine show its vessels best, before any graph runs: those with most contrast agent.

Each frame is reduced to gray with SIDE pixels on its longer side. Its black-hat, the closing by a square less the frame itself, is how dark
each pixel is in a structure thinner than the square: vessels, but also the catheter, ribs and gaps in burnt-in text. What is always there
does not count: for each pixel, a low percentile over time of the black-hat around it is subtracted. The contrast of a frame is the mean
over the darkest share of the pixels that change, smoothed over time. Does not know about files, models or devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.formats.profiles import BEST_FRAMES

__all__ = ["SIDE", "choose_frames", "contrast_of", "reduced"]

SIDE = 128  # pixels of the longer side of a reduced frame
_SQUARE = 11  # pixels, wider than any vessel at this size
_AROUND = 3  # pixels: what is always there moves with breath and heart
_LOW = 20  # percentile over time: contrast agent fills each vessel for most of a short cine, but not for all of it
_CHANGES = 4  # gray levels by which a pixel changes at least; the collimator's shadow does not
_DARKEST = 0.05  # share of the pixels: about that of the vessels of a coronary angiogram
_MOST = 64  # gray levels of one pixel, at most: changing digits are darker than vessels
_SMOOTH = np.array([1, 2, 3, 2, 1], np.float64)  # over time
_FILLED = 0.8  # of the way from the least to the most contrast: a frame is filled
_APART = 6  # frames between two conditioning frames, at least: as many as SAM2 remembers


def reduced(frame: Image.Image, size: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """`frame` in gray [height, width], SIDE pixels on its longer side, or of this `size` (width, height) in pixels."""
    if size is None:
        scale = SIDE / max(frame.size)
        size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
    return np.asarray(frame.convert("L").resize(size, Image.Resampling.BOX))


def contrast_of(frames: Iterable[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float64]:
    """The contrast [frames], in gray levels, of reduced frames [height, width], at least one, of one size and in order of time."""
    gray = np.stack(list(frames))
    hats = _black_hats(gray)
    always = _highest(np.percentile(hats, _LOW, axis=0).astype(np.uint8), _AROUND)
    changes = np.ptp(gray, axis=0) >= _CHANGES
    if not changes.any():
        return np.zeros(len(gray))
    excess = np.clip(hats[:, changes].astype(np.int16) - always[changes], 0, _MOST)
    count = max(1, round(_DARKEST * excess.shape[1]))
    darkest = np.partition(excess, excess.shape[1] - count, axis=1)[:, -count:].mean(axis=1)
    ends = slice(len(_SMOOTH) // 2, -(len(_SMOOTH) // 2))  # mode "same" would give five values for fewer frames
    return np.convolve(darkest, _SMOOTH)[ends] / np.convolve(np.ones(len(darkest)), _SMOOTH)[ends]


def choose_frames(contrast: Sequence[float] | npt.NDArray[np.float64]) -> list[int]:
    """The places of 1 to 3 conditioning frames: the one with most contrast first, then others spread over the filled part of the cine.

    The filled part are the frames around the best with at least 80 % of the contrast's range, without a gap. The others are, one after the
    other, those farthest from the ones chosen, as long as they are at least 6 frames apart.
    """
    values = np.asarray(contrast, np.float64)
    best = int(values.argmax())
    enough = values >= values.min() + _FILLED * (values.max() - values.min())
    gaps = np.flatnonzero(~enough)
    first = int(gaps[gaps < best].max(initial=-1)) + 1
    last = int(gaps[gaps > best].min(initial=len(values))) - 1
    chosen = [best]
    while len(chosen) < BEST_FRAMES:
        distance = {place: min(abs(place - other) for other in chosen) for place in range(first, last + 1)}
        farthest = max(distance, key=lambda place: (distance[place], values[place]))
        if distance[farthest] < _APART:
            break
        chosen.append(farthest)
    return chosen


def _black_hats(gray: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Of each frame [frames, height, width]."""
    closed = _highest(gray, _SQUARE)
    closed = 255 - _highest(255 - closed, _SQUARE)
    return closed - gray  # a closing is nowhere darker


def _highest(values: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """The maximum in the square of `side` pixels (odd) around each pixel of [..., height, width]; borders are continued."""
    for axis in (-2, -1):
        padding = [(0, 0)] * values.ndim
        padding[axis] = (side // 2, side // 2)
        values, width = np.moveaxis(np.pad(values, padding, "edge"), axis, 0), 1
        while width < side:  # the maximum of `width` neighbours, and of those a step further
            step = min(width, side - width)
            values, width = np.maximum(values[:-step], values[step:]), width + step
        values = np.moveaxis(values, 0, axis)
    return values

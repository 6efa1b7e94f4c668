"""How well one mask agrees with another: pure functions of two boolean arrays [height, width]. docs/metrics.md has definitions and sources.

NaN means that a metric is not defined for a pair; means leave such pairs out and report their number. Does not know about files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vessel_rt.model.postprocess import eroded

__all__ = [
    "METRICS",
    "Mask",
    "bootstrap_interval",
    "boundary_f",
    "cldice",
    "dice",
    "hd95",
    "iou",
    "sensitivity",
    "skeletonize",
    "specificity",
]

Mask: TypeAlias = npt.NDArray[np.bool_]

_TOLERANCE = 0.008  # of the image's diagonal, as in DAVIS
_RESAMPLES = 10_000
_AT_ONCE = 2**22  # values resampled at once


def dice(predicted: Mask, truth: Mask) -> float:
    """`2 |P and T| / (|P| + |T|)`; 1 if both are empty."""
    total = int(predicted.sum()) + int(truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 1.0


def iou(predicted: Mask, truth: Mask) -> float:
    """`|P and T| / |P or T|`; 1 if both are empty."""
    union = int((predicted | truth).sum())
    return int((predicted & truth).sum()) / union if union else 1.0


def sensitivity(predicted: Mask, truth: Mask) -> float:
    """The fraction of the object's pixels that were found; NaN if there is no object."""
    return _share(predicted, truth)


def specificity(predicted: Mask, truth: Mask) -> float:
    """The fraction of the background's pixels that are not in the prediction; NaN if there is no background."""
    return _share(~predicted, ~truth)


def cldice(predicted: Mask, truth: Mask) -> float:
    """Centreline Dice (Shit et al., CVPR 2021): the harmonic mean of how much of P's skeleton lies in T, and of T's in P.

    Skeletons are those of the authors' code (see `skeletonize`); others give other values (docs/metrics.md).
    1 if both masks are empty, 0 if one is.
    """
    if not (predicted.any() and truth.any()):
        return float(not (predicted.any() or truth.any()))
    precision, found = _share(truth, skeletonize(predicted)), _share(predicted, skeletonize(truth))
    return 2 * precision * found / (precision + found) if precision + found else 0.0


def hd95(predicted: Mask, truth: Mask) -> float:
    """The 95th percentile of the Hausdorff distance, in pixels: of the distances from each outline to the other, the larger percentile.

    An outline is the mask less its erosion by one pixel along the axes; the image's border is outside. Percentiles are interpolated
    linearly. 0 if both masks are empty, NaN if one is: any number would be arbitrary.
    """
    if not (predicted.any() and truth.any()):
        return float("nan") if predicted.any() or truth.any() else 0.0
    one, other = predicted & ~eroded(predicted), truth & ~eroded(truth)
    return float(max(np.percentile(_distances(one, other), 95), np.percentile(_distances(other, one), 95)))


def boundary_f(predicted: Mask, truth: Mask) -> float:
    """F of DAVIS (Perazzi et al., CVPR 2016), as in davis2017-evaluation: how well the boundaries of two masks agree.

    The harmonic mean of two fractions: of the predicted boundary near the true one, and of the true boundary near the predicted one. Near
    is at a distance of at most 0.008 of the image's diagonal, rounded up to pixels. 1 if both masks have no boundary, 0 if one has none.
    """
    reach = math.ceil(_TOLERANCE * math.hypot(*truth.shape))
    one, other = _boundary(predicted), _boundary(truth)
    if not (one.any() and other.any()):
        return float(not (one.any() or other.any()))
    precision, found = float((_distances(one, other) <= reach).mean()), float((_distances(other, one) <= reach).mean())
    return 2 * precision * found / (precision + found) if precision + found else 0.0


METRICS: Mapping[str, Callable[[Mask, Mask], float]] = {
    "dice": dice,
    "iou": iou,
    "sensitivity": sensitivity,
    "specificity": specificity,
    "cldice": cldice,
    "hd95": hd95,
}


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean over images, from 10,000 resamples; None for fewer than two values."""
    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return None
    rng, means = np.random.default_rng(seed), np.empty(_RESAMPLES)
    rows = max(1, _AT_ONCE // len(sample))
    for start in range(0, _RESAMPLES, rows):
        part = means[start : start + rows]
        part[:] = sample[rng.integers(len(sample), size=(len(part), len(sample)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def skeletonize(mask: Mask) -> Mask:
    """The mask thinned to lines a pixel wide, as by scikit-image's `skeletonize` for 2D images, pixel for pixel.

    That is the skeleton of clDice's own code. Zhang and Suen, Communications of the ACM 27 (1984) 236, with scikit-image's own
    rules where theirs leaves stairs or removes lines of two pixels. Only the object's pixels are visited, so the vessels of a 1024x1024
    frame take milliseconds.
    """
    padded = np.pad(mask, 1).astype(np.uint8, order="C")  # so that `flat` is a view of it
    flat, width = padded.reshape(-1), padded.shape[1]
    ring = np.array([1, -width + 1, -width, -width - 1, -1, width - 1, width, width + 1])  # in the order of _RING
    left = np.flatnonzero(flat)
    changed = True
    while changed:
        changed = False
        for removable in _removable():
            codes = (flat[left[:, None] + ring] << np.arange(8, dtype=np.uint8)).sum(axis=1)
            gone = removable[codes]
            flat[left[gone]] = 0
            left = left[~gone]
            changed |= bool(gone.any())
    return padded[1:-1, 1:-1].astype(np.bool_)


_RING = ("E", "NE", "N", "NW", "W", "SW", "S", "SE")  # the eight neighbours, anticlockwise

# Where scikit-image differs from Zhang and Suen: neighbours of a pixel that is removed in neither, the first, the second or both halves of
# an iteration. tests/runtime/evaluation/test_metrics.py compares with the library.
_NEITHER = ("S SE", "NW W")
_FIRST = ("N NW", "E N NW", "E NE", "NE N", "E NE N", "NW W N", "NE N W", "NW W S", "N W SW", "NE N W SW")
_SECOND = ("E SE", "E N SE", "E S SE", "SW S", "E SW S", "E NE SW S", "W S SE", "W SW", "W SW S")
_BOTH = ("E N", "E S", "N W", "W S")


@functools.cache
def _removable() -> tuple[Mask, Mask]:
    """For each of the 256 neighbourhoods (a bit for each of _RING), whether the pixel is removed, for both halves of an iteration."""
    first, second = np.zeros(256, np.bool_), np.zeros(256, np.bool_)
    for code in range(256):
        e, _, n, _, w, _, s, _ = ring = [bool(code >> place & 1) for place in range(8)]
        into = sum(ring[place] and not ring[place - 1] for place in range(8))  # how often the object begins, going round
        border = 2 <= sum(ring) <= 6 and into == 1
        first[code] = border and not (n and e and s) and not (e and s and w)
        second[code] = border and not (n and e and w) and not (n and s and w)
    for neighbourhoods, goes in ((_NEITHER, (False, False)), (_FIRST, (True, False)), (_SECOND, (False, True)), (_BOTH, (True, True))):
        for names in neighbourhoods:
            code = sum(1 << _RING.index(name) for name in names.split())
            first[code], second[code] = goes
    return first, second


def _share(inside: Mask, of: Mask) -> float:
    total = int(of.sum())
    return int((inside & of).sum()) / total if total else float("nan")


def _boundary(mask: Mask) -> Mask:
    """The pixels that differ from their right, lower, or lower right neighbour; so the image's border is no boundary (DAVIS' seg2bmap)."""
    padded = np.pad(mask, ((0, 1), (0, 1)), "edge")
    boundary = (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1])
    boundary[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return boundary


def _distances(points: Mask, others: Mask) -> npt.NDArray[np.float64]:
    """From each of `points` to the nearest of `others`: along columns first, then along rows, which is exact."""
    height, width = others.shape
    rows = np.arange(height)[:, None]
    above = np.maximum.accumulate(np.where(others, rows, -np.inf), axis=0)
    below = np.minimum.accumulate(np.where(others, rows, np.inf)[::-1], axis=0)[::-1]
    vertical = np.minimum(rows - above, below - rows) ** 2
    ys, xs = np.nonzero(points)
    squared = np.empty(len(ys))
    for start in range(0, len(ys), 1024):  # bounds the memory
        some = slice(start, start + 1024)
        squared[some] = (vertical[ys[some]] + (np.arange(width) - xs[some, None]) ** 2).min(axis=1)
    return np.sqrt(squared)

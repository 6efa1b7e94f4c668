"""How well the masks of cines agree with the ground truth, object by object: J and F as in DAVIS, and how steady masks are over time.

An object is a concept in a cine, asked for by one question. Frames are added one by one, in the order of the cine; of each object only the
masks of the last frame are kept. docs/metrics.md has definitions. Does not know about files.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from vessel_rt.evaluation.flow import Shown, Warp
from vessel_rt.evaluation.metrics import Mask, boundary_f, iou

__all__ = ["CineScore", "CineScores", "mean_score"]


@dataclasses.dataclass(frozen=True)
class CineScore:
    """The scores of an object over `frames` frames: `j` and `f` are means over them.

    `stability` is the mean IoU of the masks of consecutive frames, `true_stability` that of the ground truth; pairs of two empty masks are
    left out, and NaN says that there is no other. `warped_stability` and `true_warped_stability` are the same after the first mask of a
    pair was moved by the optical flow between the frames; NaN without flow.
    """

    code: str
    image: str
    question: str
    concept: str
    frames: int
    j: float
    f: float
    stability: float
    true_stability: float
    warped_stability: float = math.nan
    true_warped_stability: float = math.nan

    @property
    def jf(self) -> float:
        """J&F of DAVIS: the mean of J and F."""
        return (self.j + self.f) / 2


@dataclasses.dataclass
class _Object:
    """What is known of an object so far; `last` are the masks of its last frame, predicted and true, and what that frame shows."""

    image: str
    j: list[float] = dataclasses.field(default_factory=list)
    f: list[float] = dataclasses.field(default_factory=list)
    steady: list[float] = dataclasses.field(default_factory=list)
    truly_steady: list[float] = dataclasses.field(default_factory=list)
    warped: list[float] = dataclasses.field(default_factory=list)
    truly_warped: list[float] = dataclasses.field(default_factory=list)
    last: tuple[Mask, Mask, Shown | None] | None = None


class CineScores:
    """The scores of cines, of which frames are added in order; with `warp`, also of masks moved by optical flow."""

    def __init__(self, warp: Warp | None = None) -> None:
        self._warp = warp
        self._objects: dict[tuple[str, str, str], _Object] = {}
        self._cine = ""

    def add(self, code: str, image: str, question: str, concept: str, predicted: Mask, truth: Mask, shown: Shown | None = None) -> None:
        """Add the next frame of the cine with this study code: one object's masks [height, width], and for `warp` what the frame shows."""
        if code != self._cine:
            for done in self._objects.values():
                done.last = None
            self._cine = code
        found = self._objects.setdefault((code, question, concept), _Object(image))
        found.j.append(iou(predicted, truth))
        found.f.append(boundary_f(predicted, truth))
        if found.last and found.last[0].shape == predicted.shape:
            earlier = found.last[2]
            for values, warped, now, before in (
                (found.steady, found.warped, predicted, found.last[0]),
                (found.truly_steady, found.truly_warped, truth, found.last[1]),
            ):
                if now.any() or before.any():
                    values.append(iou(now, before))
                    if self._warp and earlier and shown:
                        warped.append(iou(now, self._warp(before, earlier, shown)))
        found.last = predicted, truth, shown

    def scores(self) -> tuple[CineScore, ...]:
        """The scores of all objects, in the order in which they were first added."""
        return tuple(
            CineScore(
                code=code,
                image=found.image,
                question=question,
                concept=concept,
                frames=len(found.j),
                j=statistics.fmean(found.j),
                f=statistics.fmean(found.f),
                stability=_mean(found.steady),
                true_stability=_mean(found.truly_steady),
                warped_stability=_mean(found.warped),
                true_warped_stability=_mean(found.truly_warped),
            )
            for (code, question, concept), found in self._objects.items()
        )


def mean_score(scores: Sequence[CineScore]) -> CineScore:
    """The mean of at least one score over objects, each of which counts the same; `code`, `image` and the names are those of the first."""
    first = scores[0]
    return dataclasses.replace(
        first,
        frames=sum(score.frames for score in scores),
        j=_mean([score.j for score in scores]),
        f=_mean([score.f for score in scores]),
        stability=_mean([score.stability for score in scores]),
        true_stability=_mean([score.true_stability for score in scores]),
        warped_stability=_mean([score.warped_stability for score in scores]),
        true_warped_stability=_mean([score.true_warped_stability for score in scores]),
    )


def _mean(values: Sequence[float]) -> float:
    """Of the values that are defined; NaN without any."""
    defined = [value for value in values if not math.isnan(value)]
    return statistics.fmean(defined) if defined else math.nan

"""The time of each step of batches of images, repeated. Does not know who wants to know."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from vessel_rt.model.result import Result
from vessel_rt.model.segmenter import Segmenter

__all__ = ["TOTAL", "medians", "repeated", "timed_batch"]

T = TypeVar("T")

TOTAL = "total"
_LEAST_RUNS = 3  # of one measurement, after one to warm up
_MOST_RUNS = 20
_SECONDS = 2.0  # after which no run is started once there are enough


def timed_batch(segmenter: Segmenter, images: Sequence[Image.Image], question: str) -> tuple[dict[str, float], list[Result]]:
    """Segment `images` at once: milliseconds of an image by step, and their results.

    TOTAL is the wall time from the first preparation to the last mask over the number of images; a step is the mean of the images. On a GPU
    some steps run at the same time, so that they add up to more.

    Raises:
        VesselError: as Segmenter.run.
    """
    began = time.perf_counter()
    pixels = [segmenter.prepare(image) for image in images]
    answers = segmenter.run(pixels, [question])
    results = [segmenter.finish(each, answer) for each, [answer] in zip(pixels, answers, strict=True)]
    total = (time.perf_counter() - began) * 1e3 / len(images)
    steps = dict.fromkeys(step for result in results for step in result.ms)
    return {step: sum(result.ms.get(step, 0.0) for result in results) / len(results) for step in steps} | {TOTAL: total}, results


def repeated(run: Callable[[int], T], least: int = 0) -> list[T]:
    """What `run` returns, called with 1, 2, 3 ... after 0 to warm up: `least` times or a few, more while they take little time."""
    run(0)
    found: list[T] = []
    least = max(least, _LEAST_RUNS)
    end = time.perf_counter() + _SECONDS
    while len(found) < least or (len(found) < _MOST_RUNS and time.perf_counter() < end):
        found.append(run(len(found) + 1))
    return found


def medians(times: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """The median and the 90th percentile of each step of several runs, in milliseconds, rounded to microseconds."""
    found = {}
    for step in times[0]:
        values = [each.get(step, 0.0) for each in times]
        found[step] = round(statistics.median(values), 3), round(float(np.percentile(values, 90)), 3)
    return found

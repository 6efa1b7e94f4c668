"""The time of each step and of a whole image, the first run against later ones, and the images per second by batch size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from vessel_rt.check.frames import frame_of, tiles_of
from vessel_rt.check.loading import LoadedDeployment
from vessel_rt.check.record import Record
from vessel_rt.check.schema import BatchSpeed, StepTime
from vessel_rt.errors import OutOfMemory
from vessel_rt.formats.bundle import Bundle
from vessel_rt.model.segmenter import Segmenter

__all__ = ["MEASURED_TILES", "check_speed", "first_run"]

MEASURED_TILES = (1, 10)
_RUNS = range(3, 21)  # of one measurement: at least and at most
_SECONDS = 2.0  # after which no run is started once there are enough
_BATCHES = (1, 2, 4, 8, 16)
_TOTAL = "total"


def first_run(record: Record, segmenter: Segmenter, bundle: Bundle) -> float | None:
    """Milliseconds of the first image after loading, with the rehearsal of the question's draft; None if it fails. Makes a line."""
    with record.attempt("loading", "first image"):
        began = time.perf_counter()
        segmenter.segment(frame_of(1, bundle.tiles), bundle.prompt.default_question)
        seconds = time.perf_counter() - began
        record.passed("loading", "first image", f"{seconds:.2f} s")
        return seconds * 1e3
    return None


def check_speed(record: Record, segmenter: Segmenter, deployment: LoadedDeployment, device: str, first_ms: float | None) -> int:
    """The lines of `speed`; returns the largest batch that ran."""
    bundle, largest = deployment.bundle, 1
    for tiles in MEASURED_TILES:
        image = frame_of(tiles, bundle.tiles)
        found = tiles_of(image, bundle.tiles)
        name = f"{found} tile{'s' * (found > 1)}"
        with record.attempt("speed", name):
            times = _steps(segmenter, image, bundle.prompt.default_question)
            rows = _rows(times, device, found)
            record.times += rows
            total = next(row for row in rows if row.step == _TOTAL)
            first = f", the first after loading {first_ms:.0f} ms" if first_ms is not None and tiles == 1 else ""
            record.passed("speed", name, f"p50 {total.p50_ms:.1f} ms, p90 {total.p90_ms:.1f} ms of {total.runs} runs{first}")
    if deployment.device.kind == "cpu":
        record.skipped("speed", "batches", "a CPU gains nothing from several images at once (docs/performance.md)")
        return largest
    for tiles in MEASURED_TILES:
        with record.attempt("speed", f"batches of {tiles} tiles"):
            largest = max(largest, _sweep(record, segmenter, deployment, device, tiles))
    return largest


def _steps(segmenter: Segmenter, image: Image.Image, question: str) -> list[Mapping[str, float]]:
    """Milliseconds by step, of several runs after one to warm up."""
    segmenter.segment(image, question)
    times: list[Mapping[str, float]] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < _RUNS[0] or (len(times) < _RUNS[-1] and time.perf_counter() < end):
        began = time.perf_counter()
        result = segmenter.segment(image, question)
        times.append({**result.ms, _TOTAL: (time.perf_counter() - began) * 1e3})
    return times


def _rows(times: Sequence[Mapping[str, float]], device: str, tiles: int) -> list[StepTime]:
    rows = []
    for step in times[0]:
        values = [each.get(step, 0.0) for each in times]
        p50, p90 = statistics.median(values), float(np.percentile(values, 90))
        rows.append(StepTime(device, tiles, step, len(values), round(p50, 3), round(p90, 3)))
    return rows


def _sweep(record: Record, segmenter: Segmenter, deployment: LoadedDeployment, device: str, tiles: int) -> int:
    """Images per second at every batch size that the device has room for; returns the largest."""
    bundle, question = deployment.bundle, deployment.bundle.prompt.default_question
    image = frame_of(tiles, bundle.tiles)
    found = tiles_of(image, bundle.tiles)
    ran: list[BatchSpeed] = []
    for batch in _BATCHES:
        if batch > (deployment.max_batch or deployment.batch):
            break
        try:
            rate = _rate(segmenter, image, question, batch)
        except OutOfMemory:
            if not ran:
                raise
            break
        ran.append(BatchSpeed(device, found, batch, round(rate, 3)))
    record.batches += ran
    told = ", ".join(f"{each.batch}: {each.images_per_second:.2f}" for each in ran)
    record.passed("speed", f"batches of {found} tiles", f"images per second, by images at once: {told}")
    return ran[-1].batch


def _rate(segmenter: Segmenter, image: Image.Image, question: str, batch: int) -> float:
    rates = []
    for _ in range(_RUNS[0] + 1):
        began = time.perf_counter()
        pixels = [segmenter.prepare(image) for _ in range(batch)]
        for each, [answer] in zip(pixels, segmenter.run(pixels, [question]), strict=True):
            segmenter.finish(each, answer)
        rates.append(batch / (time.perf_counter() - began))
    return statistics.median(rates[1:])

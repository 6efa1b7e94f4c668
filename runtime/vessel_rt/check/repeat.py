"""Whether the same image gives the same bytes: twice (determinism), and for minutes (endurance)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vessel_rt.check.record import Record
from vessel_rt.device.nvml import GpuState, gpu_monitor
from vessel_rt.device.providers import Device
from vessel_rt.errors import VesselError
from vessel_rt.measure.memory import MemoryWatch, size
from vessel_rt.model.result import Answer
from vessel_rt.model.segmenter import Segmenter

__all__ = ["check_determinism", "check_endurance"]

_GROWTH = 64 << 20  # bytes after every image was seen once: what an allocator may still round up


def check_determinism(record: Record, segmenter: Segmenter, images: Sequence[Image.Image], question: str) -> None:
    """Every image twice: ids, logits and scores must be the same bytes."""
    with record.attempt("determinism", "twice"):
        faults = []
        for number, image in enumerate(images):
            first, second = (_answer(segmenter, image, question) for _ in range(2))
            if _bytes(first) != _bytes(second):
                faults.append(f"image {number}: {_difference(first, second)}")
        fault = f"{faults[0]}; runs that are continued may mix results that differ" if faults else None
        record.judged("determinism", "twice", f"{len(images) - len(faults)} of {len(images)} images give the same bytes", fault)


def check_endurance(
    record: Record, segmenter: Segmenter, images: Sequence[Image.Image], question: str, minutes: float, device: Device, watch: MemoryWatch
) -> None:
    """Run the images in turn for `minutes`: results must stay the same, and memory must not grow."""
    if not minutes:
        record.skipped("endurance", "soak", "it takes time: give --minutes N")
        return
    with record.attempt("endurance", "soak"):
        states = _States(device)
        expected = [_bytes(_answer(segmenter, image, question)) for image in images]
        before, count, began, differing = watch.now(), 0, time.monotonic(), 0
        while time.monotonic() - began < 60 * minutes:
            for image, first in zip(images, expected, strict=True):
                differing += _bytes(_answer(segmenter, image, question)) != first
                count += 1
            states.read()
        after, seconds = watch.now(), time.monotonic() - began
        figures, faults = [f"{count} images in {seconds:.0f} s ({count / seconds:.2f} a second)"], []
        if differing:
            faults.append(f"{differing} of {count} results differ from the first of the same image: the device makes errors")
        if before is not None and after is not None:
            figures.append(f"memory {size(after - before)} more than at first")
            if after - before > _GROWTH:
                faults.append("the memory in use grows: send check.json")
        figures += states.figures
        record.judged("endurance", "soak", ", ".join(figures), "; ".join(faults) or None)


class _States:
    """Readings of a GPU."""

    def __init__(self, device: Device) -> None:
        self._states: list[GpuState] = []
        try:
            self._monitor = gpu_monitor(device.index) if device.kind != "cpu" else None
        except VesselError:  # the line about memory says so
            self._monitor = None

    def read(self) -> None:
        if self._monitor:
            self._states.append(self._monitor())

    @property
    def figures(self) -> list[str]:
        found = []
        for unit, values in (
            ("°C", [state.celsius for state in self._states]),
            ("MHz", [state.mhz for state in self._states]),
            ("W", [state.watts for state in self._states]),
        ):
            if known := [value for value in values if value is not None]:
                found.append(f"{min(known):.0f} to {max(known):.0f} {unit}")
        slowed = sum(bool(state.slowed) for state in self._states)
        return [*found, f"slowed by heat or power in {slowed} of {len(self._states)} readings"] if self._states else found


def _answer(segmenter: Segmenter, image: Image.Image, question: str) -> Answer:
    [[answer]] = segmenter.run([segmenter.prepare(image)], [question])
    return answer


def _bytes(answer: Answer) -> tuple[object, ...]:
    arrays = (answer.low_res_logits, answer.iou, answer.object_score)
    return (answer.generation.token_ids, *(array.tobytes() for array in arrays))


def _difference(first: Answer, second: Answer) -> str:
    if first.generation.token_ids != second.generation.token_ids or first.low_res_logits.shape != second.low_res_logits.shape:
        return "the answers differ"
    most = float(np.max(np.abs(first.low_res_logits - second.low_res_logits), initial=0.0))
    flipped = int(((first.low_res_logits > 0) != (second.low_res_logits > 0)).sum())
    return f"logits differ by up to {most:.2g}, and {flipped} pixels of the low-res masks"

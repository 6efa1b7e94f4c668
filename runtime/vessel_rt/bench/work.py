"""Measures one bundle on one device, in this process: batch size by batch size. Does not know about other bundles and devices."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeAlias

from vessel_rt.bench.frames import BenchFrame, read
from vessel_rt.bench.masks import PackedMask
from vessel_rt.device.cuda_driver import list_gpus
from vessel_rt.device.deployment import Deployment, choose_device, deploy_on
from vessel_rt.device.host_memory import make_host_plan
from vessel_rt.device.memory_plan import make_plan
from vessel_rt.device.providers import PROVIDERS, Device
from vessel_rt.errors import BundleError, EngineError, ImageError, OutOfMemory
from vessel_rt.formats.bundle import Bundle
from vessel_rt.io.checked_files import CheckedFiles
from vessel_rt.measure.memory import MemoryWatch, gpu_memory_in_use, size
from vessel_rt.measure.page import tiles_text
from vessel_rt.measure.timing import repeated, timed_batch
from vessel_rt.model.segmenter import Segmenter

__all__ = ["Begun", "Failed", "Measured", "Message", "Peaks", "Ready", "Work", "measure"]

_TELLING = 0.5  # seconds between two words on a long step


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """What to measure.

    Attributes:
        bundle: the bundle.
        device: the device; `auto` and `gpu` are chosen there.
        frames: the frames, by number of tiles and by position.
        question: what is asked about each.
        batches: the numbers of images at once, ascending.
        threads: CPU threads of an operator; 0 leaves the choice to ONNX Runtime.
        every_frame: whether each frame is segmented, and its masks are told; otherwise a few are enough.
        files: the files that an earlier process hashed; None: they are hashed now.
    """

    bundle: Bundle
    device: Device
    frames: Mapping[int, Mapping[int, BenchFrame]]
    question: str
    batches: Sequence[int]
    threads: int = 0
    every_frame: bool = True
    files: CheckedFiles | None = None


@dataclasses.dataclass(frozen=True)
class Begun:
    """What is being done now, and at which batch size."""

    what: str
    batch: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Ready:
    """The device that was chosen, ONNX Runtime's name of what runs there, and the files that were hashed."""

    device: str
    provider: str
    files: CheckedFiles


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """The milliseconds of each run by step, and the masks of each frame by its position."""

    batch: int
    tiles: int
    times: Sequence[Mapping[str, float]]
    masks: Mapping[int, Sequence[PackedMask]]


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The peaks of the host's and the device's memory at the end of a batch size, in bytes; None if they are not known."""

    batch: int
    host: int | None
    device: int | None


@dataclasses.dataclass(frozen=True)
class Failed:
    """Why there are no figures: of a batch size and a number of tiles, or of all (None)."""

    batch: int | None
    tiles: int | None
    reason: str


Message: TypeAlias = "Begun | Ready | Measured | Peaks | Failed"


def measure(work: Work, tell: Callable[[Message], object]) -> None:
    """Measure every batch size and number of tiles, and tell the figures as they are made.

    Raises:
        VesselError: nothing can be measured, or nothing more: the device cannot be used, or the bundle cannot be loaded.
    """
    in_use = gpu_memory_in_use(work.device.index) if work.device.kind != "cpu" else None
    tell(Begun("looking for the device"))
    device = choose_device(work.bundle, work.device)
    batches = []
    for batch in work.batches:
        if fault := _memory_fault(work.bundle, device, batch):
            tell(Failed(batch, None, fault))
        else:
            batches.append(batch)
    if not batches:
        return
    with ExitStack() as stack:
        host = stack.enter_context(MemoryWatch(Device("cpu")))
        card = stack.enter_context(MemoryWatch(device, in_use)) if device.kind != "cpu" else None
        deployment = _deployed(work, device, batches, tell)
        tell(Ready(str(device), PROVIDERS[device.kind].name, deployment.files))
        tell(Begun("loading"))
        segmenter = stack.enter_context(Segmenter(deployment, work.threads))
        segmenter.prepare_question(work.question)
        for batch in batches:
            if not _measure_batch(work, segmenter, batch, tell):
                for larger in batches[batches.index(batch) + 1 :]:
                    tell(Failed(larger, None, f"not tried, since there is no memory for {batch} images at once"))
                return
            tell(Peaks(batch, host.peak or None, None if card is None or card.at_start is None else max(card.peak - card.at_start, 0)))


def _memory_fault(bundle: Bundle, device: Device, batch: int) -> str | None:
    """Why `batch` images at once do not fit in the memory of the device, by the plan; None if they do, or if that is not known."""
    try:
        plan = make_host_plan(bundle, batch) if device.kind == "cpu" else make_plan(bundle, batch, list_gpus()[device.index].memory)
    except BundleError:  # an older version exported the bundle
        return None
    images = "one image" if batch == 1 else f"{batch} images"
    return None if plan.fits else f"not run: needs about {size(plan.total)} of memory with {images} at once; there are {size(plan.memory)}"


def _deployed(work: Work, device: Device, batches: list[int], tell: Callable[[Message], object]) -> Deployment:
    """The deployment with the most images at once that the device takes; larger batches are told and removed. Raises VesselError."""
    while True:
        try:
            return deploy_on(work.bundle, device, _Hashing(tell), batch=batches[-1], files=work.files)
        except EngineError as e:
            if len(batches) == 1:
                raise
            tell(Failed(batches.pop(), None, str(e)))


class _Hashing:
    """Tells now and then how much of the files was read."""

    def __init__(self, tell: Callable[[Message], object]) -> None:
        self._tell, self._done, self._told = tell, 0, 0.0

    def __call__(self, read: int, total: int) -> None:
        self._done += read
        if time.monotonic() - self._told > _TELLING:
            self._told = time.monotonic()
            self._tell(Begun(f"hashing, {size(self._done)} of {size(total)}"))


def _measure_batch(work: Work, segmenter: Segmenter, batch: int, tell: Callable[[Message], object]) -> bool:
    """Tell the figures of one batch size; False if there is no memory for it."""
    for tiles, frames in work.frames.items():
        try:
            tell(_measured(work, segmenter, batch, tiles, frames, tell))
        except OutOfMemory as e:
            tell(Failed(batch, None, str(e)))
            return False
        except ImageError as e:
            tell(Failed(batch, tiles, str(e)))
    return True


def _measured(
    work: Work, segmenter: Segmenter, batch: int, tiles: int, frames: Mapping[int, BenchFrame], tell: Callable[[Message], object]
) -> Measured:
    """Time batches of `frames` in turn; the last is filled up with the first, so that all are of the same size."""
    positions, masks = list(frames), dict[int, Sequence[PackedMask]]()

    def run(number: int) -> Mapping[str, float]:
        tell(Begun(f"{batch} at once, {tiles_text(tiles)}, run {number}", batch))
        chosen = [positions[(number * batch + i) % len(positions)] for i in range(batch)]
        times, results = timed_batch(segmenter, [read(frames[position]) for position in chosen], work.question)
        if work.every_frame:
            for position, result in zip(chosen, results, strict=True):
                masks.setdefault(position, [PackedMask.of(mask.pixels) for mask in result.masks])
        return times

    return Measured(batch, tiles, repeated(run, -(-len(positions) // batch) - 1 if work.every_frame else 0), masks)

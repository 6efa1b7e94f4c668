"""`vessel-rt bench`: bundles x devices x batch sizes on the same frames, in turn, each pair in a process of its own."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vessel_rt.bench.frames import FrameSet, given_frames, golden_frames
from vessel_rt.bench.masks import PackedMask, dice_of, least_iou
from vessel_rt.bench.process import measure_apart
from vessel_rt.bench.schema import BenchFile, BenchFrames, BenchRow, BenchRun, BenchStep
from vessel_rt.bench.work import Begun, Failed, Measured, Message, Peaks, Ready, Work
from vessel_rt.device.providers import Device
from vessel_rt.errors import BundleError, VesselError
from vessel_rt.evaluation.ground_truth import GroundTruth, check_concepts, read_truth
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.frames import Naming, Selection
from vessel_rt.inputs.pseudonyms import printable
from vessel_rt.io.checked_files import CheckedFiles
from vessel_rt.measure.machine import describe_machine
from vessel_rt.measure.redact import redactor
from vessel_rt.measure.schema import BundleFacts
from vessel_rt.measure.timing import TOTAL, medians

__all__ = ["BenchOptions", "bench"]


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What to measure, and how.

    Attributes:
        bundles: the bundles, each on all devices.
        devices: the devices; `auto` and `gpu` are chosen for each bundle.
        batches: the images at once.
        inputs: files, folders and globs; without any, the goldens of a bundle.
        naming: how the frames are called on the terminal.
        num_images: only the first so many frames; None: all.
        truth: the ground truth of the frames: annotations, or a folder of masks.
        question: the question; None: the first bundle's.
        rounds: how often each bundle is loaded on each device, in turn.
        threads: CPU threads of an operator; 0 leaves the choice to ONNX Runtime.
    """

    bundles: tuple[Path, ...]
    devices: tuple[Device, ...]
    batches: tuple[int, ...]
    inputs: tuple[str, ...]
    naming: Naming
    num_images: int | None = None
    truth: Path | None = None
    question: str | None = None
    rounds: int = 2
    threads: int = 0


def bench(options: BenchOptions, save: Callable[[BenchFile], object], warn: Callable[[str], object]) -> BenchFile:
    """Measure everything. `save` is called with what was measured so far, after each process and when it is stopped, and `warn` with
    lines for the user.

    What cannot be measured has a row that says why.

    Raises:
        VesselError: no bundle can be read, or there are no frames, or a frame or the ground truth cannot be read.
    """
    started, began = datetime.datetime.now(datetime.UTC), time.perf_counter()
    loaded = [_loaded(folder) for folder in options.bundles]
    bundles = [bundle for bundle in loaded if isinstance(bundle, Bundle)]
    if not bundles:
        raise VesselError(next(str(fault) for fault in loaded if isinstance(fault, BundleError)))
    if options.inputs:
        frames = given_frames(options.inputs, options.naming, Selection(num_images=options.num_images))
    else:
        frames = golden_frames(bundles, options.num_images)
    question = options.question or bundles[0].prompt.default_question
    truth = _truth(options.truth, options, frames, question) if options.truth else None
    scorer = _Scorer(frames, question, truth, warn)
    machine, cut = describe_machine(), frames.by_tiles(bundles[0].tiles)
    configurations = [
        _Configuration(number, folder, bundle, device, frames)
        for number, (folder, bundle) in enumerate(zip(options.bundles, loaded, strict=True))
        for device in options.devices
    ]

    def found(*, finished: bool) -> BenchFile:
        rows = [row for each in configurations for row in each.rows()]
        run = BenchRun(
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - began, 1),
            finished=finished,
            machine=machine,
            source=frames.source,
            frames=tuple(BenchFrames(tiles, len(positions)) for tiles, positions in cut.items()),
            question=question,
            rounds=options.rounds,
            threads=options.threads,
            bundles=tuple(_facts(bundle) if isinstance(bundle, Bundle) else None for bundle in loaded),
            rows=tuple(rows),
        )
        return BenchFile(runs=(run,))

    steps = options.rounds * sum(each.steps(options.batches) for each in configurations)
    with tqdm(total=steps, desc="bench", unit="measurement", disable=None, delay=2, leave=False) as bar:
        for turn in range(options.rounds):
            for each in sorted(configurations, key=lambda each: not each.is_reference):
                try:
                    each.measure(options, question, turn, scorer, bar)
                finally:
                    save(found(finished=False))
    return found(finished=True)


def _loaded(folder: Path) -> Bundle | BundleError:
    try:
        return Bundle.load(folder)
    except BundleError as e:
        return e


def _facts(bundle: Bundle) -> BundleFacts:
    layers, checkpoint = bundle.language_model.layers, bundle.provenance.checkpoint
    return BundleFacts(bundle.sha256, bundle.precision, bundle.weights, checkpoint, layers)


def _truth(path: Path, options: BenchOptions, frames: FrameSet, question: str) -> tuple[Path, GroundTruth]:
    """The ground truth. VesselError if it cannot be read, or is not of these frames or of this question."""
    truth = read_truth(path, options.naming.codes)
    concepts = truth.concepts(question)
    if not concepts:
        raise VesselError(f"{path}: annotates no concept that the question names ({question!r})")
    drawn = [truth.mask(frames.line(position), concept) for position in range(len(frames.frames)) for concept in concepts]
    if all(mask is None for mask in drawn):
        raise VesselError(f"{path}: has no ground truth for any of the frames; they are matched by file name")
    return path, truth


class _Scorer:
    """Scores masks as they are made, so that only those of the first FP32 bundle are kept."""

    def __init__(self, frames: FrameSet, question: str, truth: tuple[Path, GroundTruth] | None, warn: Callable[[str], object]) -> None:
        self._frames, self._question, self._truth, self._warn = frames, question, truth, warn
        self._owner: tuple[object, int] | None = None
        self._reference: dict[int, Sequence[PackedMask]] = {}

    def score(self, masks: Mapping[int, Sequence[PackedMask]], batch: int, of: _Configuration) -> tuple[float | None, float | None]:
        """The mean Dice and the least IoU with the reference; None where there is none, and for the reference's own IoU."""
        if of.is_reference and self._owner in (None, (of, batch)):
            self._owner = of, batch
            self._reference.update(masks)
            return self._dice(masks), None
        return self._dice(masks), least_iou(masks, self._reference)

    def _dice(self, masks: Mapping[int, Sequence[PackedMask]]) -> float | None:
        if self._truth is None:
            return None
        path, truth = self._truth
        try:
            check_concepts(path, truth, self._question, [len(of_frame) for of_frame in masks.values()])
        except VesselError as e:
            self._warn(f"no Dice: {e}")
            self._truth = None
            return None
        return dice_of(masks, truth, self._question, {position: self._frames.line(position) for position in masks})


_Place = tuple[int, int]  # a batch size and a number of tiles


class _Configuration:
    """A bundle on a device: what was measured of it so far."""

    def __init__(self, number: int, folder: Path, bundle: Bundle | BundleError, wanted: Device, frames: FrameSet) -> None:
        self._number, self._wanted, self._frames = number, wanted, frames
        self._bundle = bundle if isinstance(bundle, Bundle) else None
        self._device, self._provider = str(wanted), ""
        self._files: CheckedFiles | None = None
        self._times: dict[_Place, list[Mapping[str, float]]] = {}
        self._peaks: dict[int, Peaks] = {}
        self._faults: dict[tuple[int | None, int | None], str] = {}
        self._scores: dict[_Place, tuple[int, float | None, float | None]] = {}  # masks, mean Dice, least IoU
        if isinstance(bundle, BundleError):
            self._faults[None, None] = redactor(folder)(str(bundle))

    @property
    def is_reference(self) -> bool:
        """Whether the bundle is the one that others are compared with."""
        return self._bundle is not None and self._bundle.precision == "fp32" and self._bundle.quantization is None

    def steps(self, batches: Sequence[int]) -> int:
        """How many measurements a round has."""
        return len(batches) * len(self._frames.by_tiles(self._bundle.tiles)) if self._bundle else 0

    def measure(self, options: BenchOptions, question: str, turn: int, scorer: _Scorer, bar: tqdm[Any]) -> None:
        """Measure it once more, in a process; what failed is not tried again."""
        batches = [batch for batch in sorted(set(options.batches)) if (batch, None) not in self._faults]
        if self._bundle is None or not batches or (None, None) in self._faults:
            return
        frames = {
            tiles: {position: self._frames.frames[position] for position in positions}
            for tiles, positions in self._frames.by_tiles(self._bundle.tiles).items()
        }
        work = Work(self._bundle, self._wanted, frames, question, batches, options.threads, turn == 0, self._files)
        name, current = f"bundle {self._number + 1}", batches[0]

        def hear(message: Message) -> None:
            nonlocal current
            if isinstance(message, Begun):
                current = message.batch or current
                bar.set_postfix_str(f"{name}, {self._device}: {message.what}")
            elif isinstance(message, Measured):
                bar.update()
                if message.masks:
                    count = sum(map(len, message.masks.values()))
                    self._scores[message.batch, message.tiles] = count, *scorer.score(message.masks, message.batch, self)
            self._take(message)

        if (died := measure_apart(work, hear)) is not None:
            self._faults[current if self._times else None, None] = died
            for larger in (batch for batch in batches if batch > current and self._times):
                self._faults[larger, None] = f"not tried, since with {current} images at once {died}"

    def _take(self, message: Message) -> None:
        if isinstance(message, Ready):
            self._device, self._provider, self._files = message.device, message.provider, message.files
        elif isinstance(message, Measured):
            self._times.setdefault((message.batch, message.tiles), []).extend(message.times)
        elif isinstance(message, Peaks):
            before = self._peaks.get(message.batch, message)
            self._peaks[message.batch] = Peaks(message.batch, _largest(before.host, message.host), _largest(before.device, message.device))
        elif isinstance(message, Failed):
            self._faults[message.batch, message.tiles] = printable(message.reason)

    def rows(self) -> list[BenchRow]:
        """A row for each place that was measured, then one for each fault."""
        rows = []
        for (batch, tiles), times in sorted(self._times.items()):
            steps = medians(times)
            masks, dice, overlap = self._scores.get((batch, tiles), (0, None, None))
            peaks = self._peaks.get(batch)
            row = BenchRow(
                bundle=self._number,
                device=self._device,
                provider=self._provider,
                batch=batch,
                tiles=tiles,
                runs=len(times),
                images_per_second=round(1e3 / steps[TOTAL][0], 3),
                steps=tuple(BenchStep(step, *ms) for step, ms in steps.items()),
                host_peak_bytes=peaks.host if peaks else None,
                device_peak_bytes=peaks.device if peaks else None,
                masks=masks,
                dice=None if dice is None else round(dice, 6),
                least_iou=None if overlap is None else round(overlap, 6),
            )
            rows.append(row)
        for (of_batch, of_tiles), fault in self._faults.items():
            rows.append(BenchRow(self._number, self._device, self._provider, of_batch, of_tiles, fault))
        return rows


def _largest(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)

"""One device at work: frames go in, their files are written, and an entry comes out for each. Does not know about other workers."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from vessel_rt.device.deployment import Deployment, deploy_on
from vessel_rt.device.providers import Device
from vessel_rt.errors import ImageError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.profiles import keeps_cores_busy
from vessel_rt.inputs.frames import Frame, frame_times, input_hasher, read_frame
from vessel_rt.inputs.images import Rescale
from vessel_rt.inputs.pseudonyms import remember
from vessel_rt.io.checked_files import CheckedFiles
from vessel_rt.model.cine import CineSegmenter
from vessel_rt.model.result import Result
from vessel_rt.model.segmenter import Segmenter
from vessel_rt.results.writer import Entry, FrameWriter
from vessel_rt.run.cine_pipeline import CinePipeline
from vessel_rt.run.pipeline import Picture, Pipeline

__all__ = ["Job", "WorkOptions", "Worker", "cores"]

_STREAMS = 4  # at most, unless more are asked for: each has a KV cache and activations of its own


@dataclasses.dataclass(frozen=True)
class WorkOptions:
    """How a worker works: `threads` of the CPU are shared by `streams` of batches; 0 and None are chosen automatically.

    `rescale` is for gray images of more than 8 bits, which fail without it; see `read_image`. With `propagate`, the frames of a file or a
    series are a cine, and objects are tracked through it, as `best-frame` or `sa2va` (docs/cines.md).
    """

    questions: tuple[str, ...]
    threads: int = 0
    streams: int | None = None
    batch: int | None = None
    draft: bool = True
    rescale: Rescale | None = None
    propagate: str | None = None

    def streams_on(self, kind: str, frames: int, bundle: Bundle) -> int:
        """How many batches of `frames` in total run at the same time on a kind of device.

        On a CPU, a small model is faster with one core for each batch than with all cores for one (docs/performance.md).
        """
        if self.propagate:  # each frame depends on those before it
            return 1
        several = kind == "cpu" and not keeps_cores_busy(bundle)
        return min(self.streams or (min(self.threads or cores(), _STREAMS) if several else 1), frames)

    def threads_of(self, streams: int) -> int:
        """CPU threads of one operator; 0 leaves the choice to ONNX Runtime."""
        return self.threads if streams == 1 else max(1, (self.threads or cores()) // streams)


class Worker:
    """A bundle deployed on a device, and the threads that keep it busy. A context manager: leaving it frees the graphs' memory.

    `streams` batches of `batch` frames run at the same time, or of `least_batch` after the device ran out of memory.

    Args:
        deployment: what to run, and where.
        options: see WorkOptions.
        total: frames of the whole run, of all workers: how a frame is computed must not depend on how many are left.
        writer: where results go.
        stop: once it is set, no further frame is started.
        say: called with lines for the user.

    Raises:
        VesselError: a file of the bundle cannot be loaded or was changed, or a question is empty or contains an image token.
    """

    def __init__(
        self,
        deployment: Deployment,
        options: WorkOptions,
        total: int,
        writer: FrameWriter,
        stop: threading.Event,
        say: Callable[[str], object],
    ) -> None:
        self._options, self._writer = options, writer
        self.streams = options.streams_on(deployment.device.kind, total, deployment.bundle)
        self.batch = deployment.batch
        self._hash = input_hasher()
        self._times = functools.lru_cache(1)(frame_times)
        threads = options.threads_of(self.streams)
        with ExitStack() as stack:
            self._pipeline: Pipeline[Frame, Entry] | CinePipeline[Entry]
            if options.propagate:
                tracker = stack.enter_context(CineSegmenter(deployment, threads, draft=options.draft))
                segmenter: Segmenter = tracker
                self.batch = 1
                self._pipeline = CinePipeline(
                    tracker, options.propagate, options.questions, read=self._read, finish=self._write, fail=self._fail, stop=stop
                )
            else:
                segmenter = stack.enter_context(Segmenter(deployment, threads, draft=options.draft))
                self._pipeline = Pipeline(
                    segmenter,
                    options.questions,
                    read=self._read,
                    finish=self._write,
                    fail=self._fail,
                    streams=self.streams,
                    batch=self.batch,
                    stop=stop,
                    say=say,
                )
            for question in options.questions:
                segmenter.prepare_question(question)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    @property
    def least_batch(self) -> int:
        return self._pipeline.least_batch

    def run(self, frames: Sequence[Frame]) -> Iterator[Entry]:
        """Process every frame. When it is stopped, or the disk is full, started frames are still written whole.

        Raises:
            VesselError: a result could not be written.
            BundleError: a file of the bundle was changed; all earlier entries were made with the unchanged bundle.
        """
        return self._pipeline.run(frames)

    def _read(self, frame: Frame) -> Picture:
        sha256 = self._hash(frame.path)
        image = read_frame(frame, self._options.rescale)
        times = self._times(frame.path) if self._options.propagate else None
        return Picture(image, sha256, times[frame.number or 0] if times else None)

    def _write(self, frame: Frame, picture: Picture, results: Sequence[Result]) -> Entry:
        try:
            return self._writer.write(frame, str(picture.sha256), picture.image, results, picture.time_ms)
        except ImageError as e:
            return self._fail(frame, e)

    def _fail(self, frame: Frame, error: ImageError) -> Entry:
        return self._writer.failure(frame, self._options.questions, str(error))


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker has to do, as it goes to a process or an actor.

    `total` counts the frames of the whole run, those of other shards and workers included. `files` of the bundle were hashed by
    `check_bundle`; None: they are hashed when the worker is opened.
    """

    bundle: Bundle
    device: Device
    options: WorkOptions
    writer: FrameWriter
    total: int
    show_names: bool = False
    files: CheckedFiles | None = None

    @property
    def streams(self) -> int:
        """How many batches the worker runs at the same time."""
        return self.options.streams_on(self.device.kind, self.total, self.bundle)

    def remember_names(self, frames: Iterable[Frame]) -> None:
        """Let `conceal` replace the names of `frames` in this process, unless they may be shown."""
        if not self.show_names:
            for frame in frames:
                remember(frame.path, frame.code)

    def open(self, stop: threading.Event, say: Callable[[str], object], progress: Callable[[int, int], object] | None = None) -> Worker:
        """Load the bundle on the device, which `choose_devices` or `open_device` returned in this process. Raises VesselError."""
        deployment = deploy_on(
            self.bundle,
            self.device,
            progress,
            batch=self.options.batch,
            streams=self.streams,
            propagate=self.options.propagate,
            files=self.files,
        )
        return Worker(deployment, self.options, self.total, self.writer, stop, say)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1

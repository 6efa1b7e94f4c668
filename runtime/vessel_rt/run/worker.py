"""One device at work: frames go in, their files are written, and an entry comes out for each.

Three things go on at once: a thread reads frames and makes their pixels, a few ahead; others run batches of them through the graphs; one
more makes the masks and writes them, in order. What waits between them is bounded, so memory does not grow with the folder.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self, TypeVar

from PIL import Image

from vessel_rt.device.deployment import Deployment, deploy_on
from vessel_rt.device.providers import Device
from vessel_rt.errors import ImageError, OutOfMemory
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.frames import Frame, input_sha256, read_frame
from vessel_rt.inputs.images import Rescale
from vessel_rt.io.checked_files import CheckedFiles
from vessel_rt.model.segmenter import Answer, Pixels, Segmenter
from vessel_rt.results.writer import Entry, FrameWriter

__all__ = ["Job", "WorkOptions", "Worker", "cores"]

S = TypeVar("S")
T = TypeVar("T")

_STREAMS = 4  # at most, unless more are asked for: each has a KV cache and activations of its own
_READERS = 1  # threads: reading and resizing an image takes less time than its masks, and the first mask does not wait for more
_INPUTS = 64  # files whose hashes are remembered: a cine has many frames


@dataclasses.dataclass(frozen=True)
class WorkOptions:
    """How a worker works: `threads` of the CPU are shared by `streams` of batches; 0 and None leave the choice to the machine.

    `rescale` is for gray images of more than 8 bits, which fail without it; see `read_image`.
    """

    questions: tuple[str, ...]
    threads: int = 0
    streams: int | None = None
    batch: int | None = None
    draft: bool = True
    rescale: Rescale | None = None

    def streams_on(self, kind: str, frames: int) -> int:
        """How many batches of `frames` in all are in work at one time on a kind of device.

        A CPU gets more done with a core for each than with all for one (docs/performance.md).
        """
        most = self.streams or (min(self.threads or cores(), _STREAMS) if kind == "cpu" else 1)
        return min(most, frames)

    def threads_of(self, streams: int) -> int:
        """Of one operator; 0 leaves it to ONNX Runtime."""
        return self.threads if streams == 1 else max(1, (self.threads or cores()) // streams)


class Worker:
    """A bundle deployed on a device, and the threads that keep it busy. A context manager: leaving it frees the graphs' memory.

    `streams` batches of `batch` frames are in work at one time, of `least_batch` after the device has run out of memory.

    Args:
        deployment: what to run, and where.
        options: see WorkOptions.
        total: frames of the whole run, whoever takes them: how one is computed may not depend on how many are left.
        writer: where results go.
        stop: once it is set, no further frame is begun.
        say: told of what a user should know, a line at a time.

    Raises:
        VesselError: a file of the bundle cannot be loaded or was changed, or a question cannot be put into a prompt.
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
        self._options, self._writer, self._stop, self._say = options, writer, stop, say
        self.streams = options.streams_on(deployment.device.kind, total)
        self.batch = self.least_batch = deployment.batch
        self._lock = threading.Lock()
        self._hash = functools.lru_cache(_INPUTS)(input_sha256)
        with ExitStack() as stack:
            self._segmenter = stack.enter_context(Segmenter(deployment, options.threads_of(self.streams), draft=options.draft))
            for question in options.questions:
                self._segmenter.prepare_question(question)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    def run(self, frames: Sequence[Frame]) -> Iterator[Entry]:
        """Take every frame through. Stopped, or out of disk, it ends with what is in hand written whole.

        Raises:
            VesselError: a result could not be written.
            BundleError: a file of the bundle was changed; every entry that came out before is of the unchanged bundle.
        """
        streams = min(self.streams, len(frames))
        with ThreadPoolExecutor(1, "write") as writer, _pool(streams, "run") as runners, _pool(_READERS, "read") as readers:
            going = (frame for frame in frames if not self._stop.is_set())
            read = _ahead(readers, self._read, going, self.least_batch * streams + _READERS)
            answered = _ahead(runners, self._answered, self._batches(read), streams)
            for entries in _ahead(writer, self._write, answered, streams):
                yield from entries

    def _read(self, frame: Frame) -> _Read:
        try:
            began = time.perf_counter()
            sha256, image = self._hash(frame.path), read_frame(frame, self._options.rescale)
            ms = {"read": (time.perf_counter() - began) * 1e3}
            return _Read(frame, sha256, image, self._segmenter.prepare(image), ms=ms)
        except ImageError as e:
            return _Read(frame, error=str(e))

    def _batches(self, read: Iterable[_Read]) -> Iterator[list[_Read]]:
        """As many frames as run together now; one that could not be read goes with them, for the order's sake."""
        batch: list[_Read] = []
        for each in read:
            batch.append(each)
            if sum(one.error is None for one in batch) >= self.least_batch:
                yield batch
                batch = []
        if batch:
            yield batch

    def _answered(self, batch: Sequence[_Read]) -> list[tuple[_Read, list[Answer]]]:
        """Each frame with its answers. A batch that fails is run again in halves, down to the frame that fails alone."""
        if self._stop.is_set():  # what is only read is not in hand yet
            return []
        good = [each.pixels for each in batch if each.pixels]
        if len(good) <= self.least_batch:
            try:
                answers = iter(self._segmenter.run(good, self._options.questions) if good else [])
                return [(_spent(each), next(answers) if each.pixels else []) for each in batch]
            except ImageError as e:
                if len(good) == 1:
                    return [(dataclasses.replace(each, error=str(e), pixels=None) if each.pixels else each, []) for each in batch]
                if isinstance(e, OutOfMemory):
                    with self._lock:  # another stream may have come down further
                        self.least_batch = min(self.least_batch, len(good) // 2)
                    self._say(f"warning: no memory for {len(good)} images at once, going on with {len(good) // 2}")
        return self._answered(batch[: len(batch) // 2]) + self._answered(batch[len(batch) // 2 :])

    def _write(self, answered: Sequence[tuple[_Read, Sequence[Answer]]]) -> list[Entry]:
        return [self._write_one(each, answers) for each, answers in answered]

    def _write_one(self, read: _Read, answers: Sequence[Answer]) -> Entry:
        if read.error or not read.pixels or not read.image or not read.sha256:
            return self._writer.failure(read.frame, self._options.questions, str(read.error))
        results = [self._segmenter.finish(read.pixels, answer) for answer in answers]
        results = [dataclasses.replace(result, ms=read.ms | result.ms) for result in results]
        try:
            return self._writer.write(read.frame, read.sha256, read.image, results)
        except ImageError as e:
            return self._writer.failure(read.frame, self._options.questions, str(e))


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

    def open(self, stop: threading.Event, say: Callable[[str], object], progress: Callable[[int, int], object] | None = None) -> Worker:
        """Load the bundle on the device, which `choose_devices` or `open_device` returned in this process. Raises VesselError."""
        deployment = deploy_on(self.bundle, self.device, progress, batch=self.options.batch, files=self.files)
        return Worker(deployment, self.options, self.total, self.writer, stop, say)


@dataclasses.dataclass(frozen=True, eq=False)
class _Read:
    """A frame on its way: read and prepared, or the error that came of it."""

    frame: Frame
    sha256: str | None = None
    image: Image.Image | None = None
    pixels: Pixels | None = None
    error: str | None = None
    ms: dict[str, float] = dataclasses.field(default_factory=dict)


def _spent(read: _Read) -> _Read:
    """`read` without its pixels, of which a waiting one has megabytes."""
    return dataclasses.replace(read, pixels=read.pixels.spent()) if read.pixels else read


def cores() -> int:
    """Of the CPU, that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _ahead(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S], bound: int) -> Iterator[T]:
    """`function` of each of `items`, in order, computed by `pool` while earlier ones are used; `bound` of them wait at most.

    Where `items` end by an error, what is begun comes out before it.
    """
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            while len(waiting) > bound or (waiting and waiting[0].done()):
                yield waiting.popleft().result()
    except (Exception, KeyboardInterrupt):
        while waiting:
            yield waiting.popleft().result()
        raise
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads for a block: what is in work when it ends is finished, and what is not begun, forgotten."""
    pool = ThreadPoolExecutor(threads, name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)

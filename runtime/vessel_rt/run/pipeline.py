"""Runs images through a Segmenter, in order. Does not know where the images come from or where the results go.

Three stages run at the same time: one thread reads and preprocesses images, a few ahead; others run batches through the graphs; one more
makes the masks and finishes the images in order. The queues between them are bounded, so memory does not grow with the number of images.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

from PIL import Image

from vessel_rt.errors import ImageError, OutOfMemory
from vessel_rt.model.result import Answer, Pixels, Result
from vessel_rt.model.segmenter import Segmenter

__all__ = ["Picture", "Pipeline", "ahead", "pool"]

S = TypeVar("S")
T = TypeVar("T")

_READERS = 1  # threads: reading and resizing an image takes less time than its masks, and with one thread the first mask comes sooner


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """An RGB image, the SHA-256 of its file, if it has one, and its time in its cine in ms, if it is known."""

    image: Image.Image
    sha256: str | None
    time_ms: float | None = None


class Pipeline(Generic[S, T]):
    """Turns items of type S into results of type T.

    `least_batch` is the current batch size: it starts as `batch` and is halved whenever the device runs out of memory.

    Args:
        segmenter: runs the batches.
        questions: each is asked about each image.
        read: reads an item. Raises ImageError.
        finish: makes the result of an item from its picture and one model result per question.
        fail: makes the result of an item that failed with this error.
        streams: how many batches run at the same time.
        batch: how many images run at once.
        stop: once it is set, no further item is started.
        say: called with lines for the user.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        questions: Sequence[str],
        *,
        read: Callable[[S], Picture],
        finish: Callable[[S, Picture, list[Result]], T],
        fail: Callable[[S, ImageError], T],
        streams: int = 1,
        batch: int = 1,
        stop: threading.Event | None = None,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        self._segmenter, self._questions = segmenter, questions
        self._read, self._finish, self._fail = read, finish, fail
        self._streams, self.least_batch = streams, batch
        self._stop, self._say = stop or threading.Event(), say
        self._lock = threading.Lock()

    def run(self, items: Iterable[S]) -> Iterator[T]:
        """Process every item. The caller's thread iterates over `items`, some items ahead of the results."""
        with ThreadPoolExecutor(1, "write") as writer, pool(self._streams, "run") as runners, pool(_READERS, "read") as readers:
            going = (item for item in items if not self._stop.is_set())
            read = ahead(readers, self._prepared, going, self.least_batch * self._streams + _READERS)
            answered = ahead(runners, self._answered, self._batches(read), self._streams)
            for finished in ahead(writer, self._finished, answered, self._streams):
                yield from finished

    def _prepared(self, item: S) -> _Read[S]:
        try:
            began = time.perf_counter()
            picture = self._read(item)
            ms = {"read": (time.perf_counter() - began) * 1e3}
            return _Read(item, picture, self._segmenter.prepare(picture.image), ms=ms)
        except ImageError as e:
            return _Read(item, error=_bare(e))

    def _batches(self, read: Iterable[_Read[S]]) -> Iterator[list[_Read[S]]]:
        """Batches of the current size. Images that could not be read are extra, to keep the order."""
        batch: list[_Read[S]] = []
        for each in read:
            batch.append(each)
            if sum(one.error is None for one in batch) >= self.least_batch:
                yield batch
                batch = []
        if batch:
            yield batch

    def _answered(self, batch: Sequence[_Read[S]]) -> list[tuple[_Read[S], list[Answer]]]:
        """Each image with its answers. A batch that fails is run again in halves, down to the single image that fails."""
        if self._stop.is_set():  # images that were only read are not started
            return []
        good = [each.pixels for each in batch if each.pixels]
        if len(good) <= self.least_batch:
            try:
                answers = iter(self._segmenter.run(good, self._questions) if good else [])
                return [(_spent(each), next(answers) if each.pixels else []) for each in batch]
            except ImageError as e:
                if len(good) == 1:
                    return [(dataclasses.replace(each, error=_bare(e), pixels=None) if each.pixels else each, []) for each in batch]
                if isinstance(e, OutOfMemory):
                    with self._lock:  # another stream may have reduced it further
                        self.least_batch = min(self.least_batch, len(good) // 2)
                    self._say(f"warning: no memory for {len(good)} images at once, continuing with {len(good) // 2}")
        return self._answered(batch[: len(batch) // 2]) + self._answered(batch[len(batch) // 2 :])

    def _finished(self, answered: Sequence[tuple[_Read[S], Sequence[Answer]]]) -> list[T]:
        return [self._finished_one(each, answers) for each, answers in answered]

    def _finished_one(self, read: _Read[S], answers: Sequence[Answer]) -> T:
        if read.error or not read.pixels or not read.picture:
            return self._fail(read.item, read.error or ImageError("not read"))
        results = [self._segmenter.finish(read.pixels, answer) for answer in answers]
        results = [dataclasses.replace(result, ms=read.ms | result.ms) for result in results]
        return self._finish(read.item, read.picture, results)


@dataclasses.dataclass(frozen=True, eq=False)
class _Read(Generic[S]):
    """An item after the first stage: read and preprocessed, or its error."""

    item: S
    picture: Picture | None = None
    pixels: Pixels | None = None
    error: ImageError | None = None
    ms: dict[str, float] = dataclasses.field(default_factory=dict)


def _bare(error: ImageError) -> ImageError:
    """`error` without its traceback, which would keep the arrays of the failed call in memory."""
    return type(error)(str(error))


def _spent(read: _Read[S]) -> _Read[S]:
    """`read` without its pixels, which would take megabytes while it waits."""
    return dataclasses.replace(read, pixels=read.pixels.spent()) if read.pixels else read


def ahead(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S], bound: int) -> Iterator[T]:
    """Apply `function` to `items` in `pool`, and yield the results in order; at most `bound` of them wait.

    If `items` raises an error, the results of items that were started come before it.
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
def pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool for the block. When the block ends, calls in progress are finished and the others are cancelled."""
    pool = ThreadPoolExecutor(threads, name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)

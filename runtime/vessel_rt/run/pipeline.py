"""Images through a Segmenter, in order. Does not know where they come from, nor where results go.

Three things go on at once: a thread reads images and makes their pixels, a few ahead; others run batches of them through the graphs; one
more makes the masks and finishes them, in order. What waits between them is bounded, so memory does not grow with the number of images.
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

__all__ = ["Picture", "Pipeline"]

S = TypeVar("S")
T = TypeVar("T")

_READERS = 1  # threads: reading and resizing an image takes less time than its masks, and the first mask does not wait for more


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """An image as it was read (RGB), and the SHA-256 of the file that it came from, if any."""

    image: Image.Image
    sha256: str | None


class Pipeline(Generic[S, T]):
    """Takes items of type S to results of type T.

    `least_batch` is the batch size now: it starts as `batch`, and is halved whenever the device runs out of memory.

    Args:
        segmenter: what runs the batches.
        questions: each is asked about each image.
        read: reads an item. Raises ImageError.
        finish: takes an item, its picture and its results, one for each question.
        fail: takes an item, and the error why it has no results.
        streams: how many batches run at the same time.
        batch: how many images run at once.
        stop: once it is set, no further item is begun.
        say: told of what a user should know, a line at a time.
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
        """Take every item through. `items` is iterated by the caller's thread, some items ahead of the results."""
        with ThreadPoolExecutor(1, "write") as writer, _pool(self._streams, "run") as runners, _pool(_READERS, "read") as readers:
            going = (item for item in items if not self._stop.is_set())
            read = _ahead(readers, self._prepared, going, self.least_batch * self._streams + _READERS)
            answered = _ahead(runners, self._answered, self._batches(read), self._streams)
            for finished in _ahead(writer, self._finished, answered, self._streams):
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
        """As many images as run together now; one that could not be read goes with them, for the order's sake."""
        batch: list[_Read[S]] = []
        for each in read:
            batch.append(each)
            if sum(one.error is None for one in batch) >= self.least_batch:
                yield batch
                batch = []
        if batch:
            yield batch

    def _answered(self, batch: Sequence[_Read[S]]) -> list[tuple[_Read[S], list[Answer]]]:
        """Each image with its answers. A batch that fails is run again in halves, down to the image that fails alone."""
        if self._stop.is_set():  # what is only read is not in hand yet
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
                    with self._lock:  # another stream may have come down further
                        self.least_batch = min(self.least_batch, len(good) // 2)
                    self._say(f"warning: no memory for {len(good)} images at once, going on with {len(good) // 2}")
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
    """An item on its way: read and prepared, or the error that came of it."""

    item: S
    picture: Picture | None = None
    pixels: Pixels | None = None
    error: ImageError | None = None
    ms: dict[str, float] = dataclasses.field(default_factory=dict)


def _bare(error: ImageError) -> ImageError:
    """`error` without its traceback, which would keep alive what the failed call had in memory."""
    return type(error)(str(error))


def _spent(read: _Read[S]) -> _Read[S]:
    """`read` without its pixels, of which a waiting one has megabytes."""
    return dataclasses.replace(read, pixels=read.pixels.spent()) if read.pixels else read


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

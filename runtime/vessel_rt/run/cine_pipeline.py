"""Runs cines through a CineSegmenter. The frames of a file are one cine: each depends on those before it.

While a frame runs through the graphs, the next ones are read, and the one before is written. Does not know how objects are tracked.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from vessel_rt.errors import ImageError
from vessel_rt.inputs.frames import Frame
from vessel_rt.model.cine import CineSegmenter
from vessel_rt.model.result import Pixels, Result
from vessel_rt.run.pipeline import Picture, ahead, pool

__all__ = ["CinePipeline"]

T = TypeVar("T")

_READ_AHEAD = 2  # frames
_WRITTEN_BEHIND = 2


class CinePipeline(Generic[T]):
    """Turns frames into results of type T, as Pipeline does.

    Args:
        segmenter: tracks the objects.
        questions: each is asked about each cine.
        read: reads a frame. Raises ImageError.
        finish: makes the result of a frame from its picture and one model result per question.
        fail: makes the result of a frame that failed with this error.
        stop: once it is set, no further frame is started.
    """

    least_batch = 1

    def __init__(
        self,
        segmenter: CineSegmenter,
        questions: Sequence[str],
        *,
        read: Callable[[Frame], Picture],
        finish: Callable[[Frame, Picture, Sequence[Result]], T],
        fail: Callable[[Frame, ImageError], T],
        stop: threading.Event,
    ) -> None:
        self._segmenter, self._questions = segmenter, questions
        self._read, self._finish, self._fail, self._stop = read, finish, fail, stop

    def run(self, frames: Iterable[Frame]) -> Iterator[T]:
        """Process every frame; those of one file follow one another. If one fails, so do those after it in its cine."""
        for _, cine in itertools.groupby(frames, lambda frame: frame.path):
            if not self._stop.is_set():
                yield from self._run_cine(list(cine))

    def _run_cine(self, frames: Sequence[Frame]) -> Iterator[T]:
        left, read = deque(frames), deque[Picture]()
        writing: deque[Future[T]] = deque()
        error: ImageError | None = None
        with pool(1, "write") as writer, pool(1, "read") as reader:
            try:
                for results in self._segmenter.run_cine(self._pixels(reader, frames, read), self._questions):
                    named = [self._named(result, frames) for result in results]
                    writing.append(writer.submit(self._finish, left.popleft(), read.popleft(), named))
                    while len(writing) > _WRITTEN_BEHIND or (writing and writing[0].done()):
                        yield writing.popleft().result()
                    if self._stop.is_set():
                        break
            except ImageError as e:
                error = type(e)(str(e))  # without its traceback, which would keep arrays in memory
            while writing:
                yield writing.popleft().result()
        if error:
            yield from (self._fail(frame, error) for frame in left)

    def _pixels(self, reader: ThreadPoolExecutor, frames: Sequence[Frame], read: deque[Picture]) -> Iterator[Pixels]:
        """The frames' pixels; their pictures are appended to `read`."""
        for found in ahead(reader, self._prepared, enumerate(frames), _READ_AHEAD):
            if isinstance(found, ImageError):
                raise found
            read.append(found[0])
            yield found[1]

    def _prepared(self, placed: tuple[int, Frame]) -> tuple[Picture, Pixels] | ImageError:
        place, frame = placed
        try:
            picture = self._read(frame)
            return picture, self._segmenter.prepare_frame(picture.image, place)
        except ImageError as e:  # not raised here: `ahead` would first yield the frames after it
            return ImageError(f"frame {frame.number or 0} of its cine: {e}")

    def _named(self, result: Result, frames: Sequence[Frame]) -> Result:
        """`result` with numbers of frames in the file in place of places in the cine."""
        places = result.propagated_from
        return (
            result if places is None else dataclasses.replace(result, propagated_from=tuple(frames[place].number or 0 for place in places))
        )

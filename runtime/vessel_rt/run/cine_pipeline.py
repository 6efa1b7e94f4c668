"""Runs cines through a CineSegmenter. The frames of a file or a series are one cine: each depends on those before it.

While a frame runs through the graphs, the next ones are read, and the one before is written. With `best-frame` a cine is read twice: first
to measure the contrast of its frames, of which only small pictures are kept, then in the order of tracking. Does not know how objects are
tracked.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.errors import ImageError
from vessel_rt.inputs.frames import Frame
from vessel_rt.model.cine import CineSegmenter
from vessel_rt.model.contrast import choose_frames, contrast_of, reduced
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
        propagate: `best-frame` or `sa2va` (docs/cines.md).
        questions: each is asked about each cine, or about each of its chosen frames.
        read: reads a frame. Raises ImageError.
        finish: makes the result of a frame from its picture and one model result per question.
        fail: makes the result of a frame that failed with this error.
        stop: once it is set, no further frame is started.
    """

    least_batch = 1

    def __init__(
        self,
        segmenter: CineSegmenter,
        propagate: str,
        questions: Sequence[str],
        *,
        read: Callable[[Frame], Picture],
        finish: Callable[[Frame, Picture, Sequence[Result]], T],
        fail: Callable[[Frame, ImageError], T],
        stop: threading.Event,
    ) -> None:
        self._segmenter, self._propagate, self._questions = segmenter, propagate, questions
        self._read, self._finish, self._fail, self._stop = read, finish, fail, stop

    def run(self, frames: Iterable[Frame]) -> Iterator[T]:
        """Process every frame; those of one cine follow one another, but their results come in the order of tracking.

        If a frame cannot be read, so do those after it in its cine with `sa2va`; with `best-frame` the others go on without it.
        """
        for _, cine in itertools.groupby(frames, lambda frame: frame.cine):
            if not self._stop.is_set():
                yield from self._run_cine(list(cine))

    def _run_cine(self, frames: Sequence[Frame]) -> Iterator[T]:
        cine = _Cine(frames)
        writing: deque[Future[T]] = deque()
        error: ImageError | None = None
        with pool(1, "write") as writer, pool(1, "read") as reader:
            try:
                for place, results in self._tracked(reader, cine):
                    named = [self._named(result, frames) for result in results]
                    writing.append(writer.submit(self._finish, cine.left.pop(place), cine.read.pop(place), named))
                    while len(writing) > _WRITTEN_BEHIND or (writing and writing[0].done()):
                        yield writing.popleft().result()
                    if self._stop.is_set():
                        break
            except ImageError as e:
                error = type(e)(str(e))  # without its traceback, which would keep arrays in memory
            while writing:
                yield writing.popleft().result()
        for place, frame in cine.left.items():
            if reason := cine.unread.get(place, error):
                yield self._fail(frame, reason)

    def _tracked(self, reader: ThreadPoolExecutor, cine: _Cine) -> Iterator[tuple[int, list[Result]]]:
        """The places of the frames in the order of tracking, and their results."""
        if self._propagate == "sa2va":
            yield from enumerate(self._segmenter.run_cine(self._every(reader, cine), self._questions))
            return
        contrast = self._contrast(reader, cine)
        if contrast and not self._stop.is_set():
            places = list(contrast)
            chosen = [places[index] for index in choose_frames(list(contrast.values()))]
            read = functools.partial(self._readable, reader, cine)
            yield from self._segmenter.run_from(chosen, places, read, self._questions)

    def _contrast(self, reader: ThreadPoolExecutor, cine: _Cine) -> dict[int, float]:
        """The contrast of each frame that can be read, by place; only reduced frames are kept."""
        small: dict[int, npt.NDArray[np.uint8]] = {}
        size: tuple[int, int] | None = None
        going = (place for place in cine.left if not self._stop.is_set())
        for place, found in zip(cine.left, ahead(reader, functools.partial(self._read_at, cine), going, _READ_AHEAD), strict=False):
            if isinstance(found, ImageError):
                cine.unread[place] = found
            else:
                small[place] = reduced(found.image, size)
                size = small[place].shape[1], small[place].shape[0]
        return dict(zip(small, contrast_of(small.values()).tolist(), strict=True)) if small else {}

    def _readable(
        self, reader: ThreadPoolExecutor, cine: _Cine, places: Sequence[int], prepare: Callable[[Image.Image], Pixels]
    ) -> Iterator[tuple[int, Pixels]]:
        """The frames at `places` that can be read; their pictures are kept in `cine.read`."""
        for place, found in zip(places, ahead(reader, functools.partial(self._prepared, cine, prepare), places, _READ_AHEAD), strict=True):
            if isinstance(found, ImageError):
                cine.unread[place] = found
            else:
                cine.read[place] = found[0]
                yield place, found[1]

    def _every(self, reader: ThreadPoolExecutor, cine: _Cine) -> Iterator[Pixels]:
        """All frames, in order. Raises the ImageError of the first that cannot be read."""

        def prepared(place: int) -> tuple[Picture, Pixels] | ImageError:
            return self._prepared(cine, lambda image: self._segmenter.prepare_frame(image, place), place)

        for place, found in enumerate(ahead(reader, prepared, list(cine.left), _READ_AHEAD)):
            if isinstance(found, ImageError):
                raise ImageError(f"frame {cine.frames[place].cine_number} of its cine: {found}")
            cine.read[place] = found[0]
            yield found[1]

    def _prepared(self, cine: _Cine, prepare: Callable[[Image.Image], Pixels], place: int) -> tuple[Picture, Pixels] | ImageError:
        found = self._read_at(cine, place)
        try:
            return found if isinstance(found, ImageError) else (found, prepare(found.image))
        except ImageError as e:
            return type(e)(str(e))

    def _read_at(self, cine: _Cine, place: int) -> Picture | ImageError:
        try:
            return self._read(cine.frames[place])
        except ImageError as e:  # not raised here: `ahead` would first yield the frames after it
            return type(e)(str(e))

    def _named(self, result: Result, frames: Sequence[Frame]) -> Result:
        """`result` with numbers of frames in place of places in the cine."""
        places = result.propagated_from
        if places is None:
            return result
        return dataclasses.replace(result, propagated_from=tuple(frames[place].cine_number for place in places))


class _Cine:
    """The frames of a cine, by place: those left to do, the pictures of those being tracked, the errors of those that cannot be read."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self.frames = frames
        self.left = dict(enumerate(frames))
        self.read: dict[int, Picture] = {}
        self.unread: dict[int, ImageError] = {}

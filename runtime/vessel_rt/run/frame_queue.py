"""The frames of a run that are left, and how many of them a worker gets at once. Does not know what a worker is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

from vessel_rt.inputs.frames import Frame

__all__ = ["FrameQueue"]

_MOST = 16  # rounds per share, at most: a worker reads ahead only within its share
_TICK = 0.2  # seconds between two checks of `stop`


class FrameQueue:
    """Hands out `frames` to `workers`. Every method may be called from several threads.

    A share is a whole number of rounds. A round is what a worker processes at the same time: its batch times its streams. While many frames
    are left a share has many rounds, so that a worker can read ahead; near the end it has one. The last round is divided evenly.
    """

    def __init__(self, frames: Sequence[Frame], workers: int, stop: threading.Event) -> None:
        self._left, self._alone = deque(frames), deque[Frame]()
        self._workers, self._stop = workers, stop
        self._last: int | None = None  # frames per share of the last round
        self._lost: set[str] = set()
        self._working = 0
        self._changed = threading.Condition()

    def take(self, round_size: int) -> list[Frame]:
        """The next share of a worker with rounds of `round_size` frames; the worker calls `done` afterwards. Empty when all is done.

        Waits while other workers have the last frames, which may come back.
        """
        with self._changed:
            while not self._stop.is_set():
                if self._alone or self._left:
                    self._working += 1
                    return [self._alone.popleft()] if self._alone else self._share(round_size)
                if not self._working:
                    break
                self._changed.wait(_TICK)
            return []

    def lose(self, frames: Iterable[Frame]) -> list[Frame]:
        """Note that a process died that had these frames. They are tried again, each alone; those lost before are returned instead."""
        frames = list(frames)
        again = [frame for frame in frames if frame.name in self._lost]
        with self._changed:
            self._lost.update(frame.name for frame in frames)
        self.try_alone(frame for frame in frames if frame not in again)
        return again

    def try_alone(self, frames: Iterable[Frame]) -> None:
        """Also hand out these, each as a share of its own."""
        with self._changed:
            self._alone.extend(frames)
            self._changed.notify_all()

    def done(self) -> None:
        """A worker is finished with a share."""
        with self._changed:
            self._working -= 1
            self._changed.notify_all()

    @property
    def empty(self) -> bool:
        """Whether nothing is left to hand out."""
        with self._changed:
            return not (self._alone or self._left)

    def _share(self, round_size: int) -> list[Frame]:
        left, of_all = len(self._left), round_size * self._workers
        if left > of_all:
            size = min(max(left // (2 * of_all), 1), _MOST) * round_size
        else:
            self._last = self._last or -(-left // self._workers)
            size = min(self._last, round_size)
        return [self._left.popleft() for _ in range(min(size, left))]

"""The frames of a run that are left, and how many of them a worker gets at once. Knows nothing of what a worker is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

from vessel_rt.inputs.frames import Frame

__all__ = ["FrameQueue"]

_MOST = 16  # rounds at once, at most: a worker reads ahead only within what it has taken
_TICK = 0.2  # seconds between two looks at `stop`


class FrameQueue:
    """Hands out `frames` to `workers`. Every method may be called from several threads.

    A share is a whole number of rounds (what a worker has in work at one time: its batch times its streams), many while many frames are
    left, so that a worker reads ahead, and one near the end. What is left for the last round is shared evenly.
    """

    def __init__(self, frames: Sequence[Frame], workers: int, stop: threading.Event) -> None:
        self._left, self._alone = deque(frames), deque[Frame]()
        self._workers, self._stop = workers, stop
        self._last: int | None = None  # frames of a share of the last round
        self._lost: set[str] = set()
        self._working = 0
        self._changed = threading.Condition()

    def take(self, round_size: int) -> list[Frame]:
        """The next share of a worker with rounds of `round_size` frames, until `done` in its hand; empty when all is done.

        Waits where nothing is left but what others have in hand, which may come back.
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
        """These were in work when a process died: they are tried again, each alone. Returned, and not tried, are those lost before."""
        frames = list(frames)
        again = [frame for frame in frames if frame.name in self._lost]
        with self._changed:
            self._lost.update(frame.name for frame in frames)
        self.try_alone(frame for frame in frames if frame not in again)
        return again

    def try_alone(self, frames: Iterable[Frame]) -> None:
        """Hand these out, too, each as a share of its own."""
        with self._changed:
            self._alone.extend(frames)
            self._changed.notify_all()

    def done(self) -> None:
        """A share is no longer in hand."""
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

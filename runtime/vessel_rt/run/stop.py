"""The request to stop a run, from SIGINT, SIGTERM or a failure. Does not know how a run stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Stop"]


class Stop(threading.Event):
    """Set when a run must not start further frames; `signal` is the signal that caused this, if one did."""

    def __init__(self) -> None:
        super().__init__()
        self.signal: signal.Signals | None = None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """In the block, SIGINT and SIGTERM set it; the same signal again ends the process at once. Finished results are kept."""
        if threading.current_thread() is not threading.main_thread():  # no handler can be set here
            yield
            return

        def stop(number: int, _: object) -> None:
            self.signal = signal.Signals(number)
            self.set()
            signal.signal(number, signal.SIG_DFL)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

"""A function run in a process of its own while this one goes on: for Python code that would hold up the threads beside it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

from vessel_rt.errors import VesselError

__all__ = ["beside"]

P = ParamSpec("P")
T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextlib.contextmanager
def beside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Iterator[Callable[[], T]]:
    """Start `function`, a module's own, with arguments that can be pickled; what is yielded waits for its result, or raises its error.

    The process ends with the block at the latest, and, on Linux, with this process however that ends.

    Raises:
        VesselError: (when the result is asked for) the process was killed, as a system does that is out of memory.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args, kwargs), daemon=True)
    process.start()
    sender.close()

    def result() -> T:
        try:
            value, error = receiver.recv()
        except EOFError:
            process.join()
            raise VesselError(f"{function.__name__}: its process ended with code {process.exitcode}; is there memory enough?") from None
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    try:
        yield result
    finally:
        process.kill()
        process.join()


def _answer(sender: Connection, function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """In the other process: (result, None) or (None, error), the error with its traceback as a note."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is interrupted too, and ends this one
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        sender.send((function(*args, **kwargs), None))
    except Exception as e:
        e.add_note(traceback.format_exc())
        sender.send((None, e))

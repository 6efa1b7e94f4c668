"""Runs a function in a child process while this process continues: for Python code that would block the other threads here."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Generic, ParamSpec, TypeVar

from vessel_rt.errors import VesselError

__all__ = ["SubprocessCall", "subprocess_call"]

P = ParamSpec("P")
T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# A plain process: multiprocessing would run the caller's script again.
_CHILD = "from vessel_export.io.subprocess_call import _run_child; _run_child()"


@dataclasses.dataclass(frozen=True)
class SubprocessCall(Generic[P, T]):
    """A function in a child process: `start` sends its arguments, once; `result` waits for its result, or raises its error."""

    start: Callable[P, None]
    result: Callable[[], T]


@contextlib.contextmanager
def subprocess_call(function: Callable[P, T]) -> Iterator[SubprocessCall[P, T]]:
    """Start a child process for `function`, which must be importable. It imports while the caller prepares the arguments.

    Arguments and result are pickled. The process ends with the block at the latest and, on Linux, with this process, however that ends.

    Raises:
        VesselError: (by `result`) the process was killed, usually for lack of memory.
    """
    with subprocess.Popen([sys.executable, "-P", "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        into, out_of = process.stdin, process.stdout

        def start(*args: P.args, **kwargs: P.kwargs) -> None:
            _send((args, kwargs), into)

        def result() -> T:
            try:
                value, error = pickle.load(out_of)
            except (EOFError, pickle.UnpicklingError):  # no result, or half of one
                code = process.wait()
                raise VesselError(
                    f"{function.__name__}: its process ended with code {code}, probably for lack of memory; free some"
                ) from None
            if error is not None:
                raise error
            return value  # type: ignore[no-any-return]

        try:
            _send(function, into)
            yield SubprocessCall(start, result)
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):  # the buffer was not empty when the process ended
                into.close()


def _send(value: object, into: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):  # `result` reports how the process ended
        pickle.dump(value, into, protocol=pickle.HIGHEST_PROTOCOL)
        into.flush()


def _run_child() -> None:
    """In the child: read a function, then its arguments; write (result, None) or (None, error) with the traceback as a note."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    gc.disable()  # tracing creates millions of objects, and collecting them takes time and frees little
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # send prints to stderr
    try:
        function = pickle.load(sys.stdin.buffer)
        args, kwargs = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):  # the parent ended, or needs no result
        return
    try:
        answer: tuple[object, Exception | None] = function(*args, **kwargs), None
    except Exception as e:
        e.add_note(traceback.format_exc())
        answer = None, e
    with contextlib.suppress(BrokenPipeError), out:
        pickle.dump(answer, out, protocol=pickle.HIGHEST_PROTOCOL)

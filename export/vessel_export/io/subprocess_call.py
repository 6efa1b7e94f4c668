"""A function run in a process of its own while this one goes on: for Python code that would hold up the threads beside it."""

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

__all__ = ["Beside", "beside"]

P = ParamSpec("P")
T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# a plain process: multiprocessing would run the caller's script again
_ANSWER = "from vessel_export.io.subprocess_call import _answer; _answer()"


@dataclasses.dataclass(frozen=True)
class Beside(Generic[P, T]):
    """The process's two ends: `call` hands the arguments over, once; `result` waits for what came of them, or raises its error."""

    call: Callable[P, None]
    result: Callable[[], T]


@contextlib.contextmanager
def beside(function: Callable[P, T]) -> Iterator[Beside[P, T]]:
    """Start a process, which imports what `function`, a module's own, needs while this one prepares its arguments.

    Arguments and result are pickled. The process ends with the block at the latest, and, on Linux, with this process however that ends.

    Raises:
        VesselError: (when the result is asked for) the process was killed, as a system does that is out of memory.
    """
    with subprocess.Popen([sys.executable, "-P", "-c", _ANSWER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        into, out_of = process.stdin, process.stdout

        def call(*args: P.args, **kwargs: P.kwargs) -> None:
            _send((args, kwargs), into)

        def result() -> T:
            try:
                value, error = pickle.load(out_of)
            except (EOFError, pickle.UnpicklingError):  # it ended without an answer, or within one
                code = process.wait()
                raise VesselError(f"{function.__name__}: its process ended with code {code}; is there memory enough?") from None
            if error is not None:
                raise error
            return value  # type: ignore[no-any-return]

        try:
            _send(function, into)
            yield Beside(call, result)
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):  # what was left in the buffer when the process ended
                into.close()


def _send(value: object, into: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):  # `result` tells how the process ended
        pickle.dump(value, into, protocol=pickle.HIGHEST_PROTOCOL)
        into.flush()


def _answer() -> None:
    """In the other process: reads a function, then its arguments; writes (result, None) or (None, error), the traceback as its note."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is interrupted too, and ends this one
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    gc.disable()  # among the millions of objects that tracing makes, looking for garbage takes time and frees little
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed goes to stderr
    try:
        function = pickle.load(sys.stdin.buffer)
        args, kwargs = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):  # the first process ended, or needs no answer
        return
    try:
        answer: tuple[object, Exception | None] = function(*args, **kwargs), None
    except Exception as e:
        e.add_note(traceback.format_exc())
        answer = None, e
    with contextlib.suppress(BrokenPipeError), out:
        pickle.dump(answer, out, protocol=pickle.HIGHEST_PROTOCOL)

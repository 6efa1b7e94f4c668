"""A measurement in a process of its own, so that memory peaks are its own and a crash ends nothing else: both ends of the pipe."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable

from vessel_rt.bench.work import Failed, Message, Work, measure
from vessel_rt.errors import VesselError, first_line
from vessel_rt.inputs.frames import Frame
from vessel_rt.inputs.pseudonyms import conceal, remember
from vessel_rt.io.child_process import parent_pipes
from vessel_rt.measure.redact import redactor

__all__ = ["measure_apart", "serve"]

_PROGRAM = "from vessel_rt.bench.process import serve; serve()"


def measure_apart(work: Work, hear: Callable[[Message], object]) -> str | None:
    """`measure` in a process that is started now; `hear` gets its messages as they arrive, without paths, host names and image names.

    Returns:
        How the process died; None if it came to its end.
    """
    # -P: import no module from the current folder. A session of its own: only the parent handles Ctrl-C.
    command = [sys.executable, "-P", "-c", _PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdin
        assert child.stdout
        try:
            pickle.dump(work, child.stdin)
            child.stdin.flush()
            while (message := pickle.load(child.stdout)) is not None:
                hear(message)
            return None
        except (EOFError, pickle.UnpicklingError, BrokenPipeError):  # it is gone
            return _death(child.wait())
        finally:
            child.kill()
            with contextlib.suppress(BrokenPipeError):  # the buffer was not empty when it died
                child.stdin.close()


def _death(code: int) -> str:
    if code == -getattr(signal, "SIGKILL", 9):
        return "its process was killed, probably for lack of memory"
    return f"its process died ({f'signal {-code}' if code < 0 else f'exit code {code}'})"


def serve() -> None:
    """The child's side: a Work comes in, messages go out, None last."""
    commands, replies = parent_pipes()
    work: Work = pickle.load(commands)
    for frames in work.frames.values():
        for frame in frames.values():
            if isinstance(frame, Frame):
                remember(frame.path, frame.code)
    shorten = redactor(work.bundle.folder)

    def told(text: str) -> str:
        return shorten(conceal(text))

    def tell(message: Message | None) -> None:
        if isinstance(message, Failed):
            message = Failed(message.batch, message.tiles, told(message.reason))
        pickle.dump(message, replies)
        replies.flush()

    try:
        measure(work, tell)
    except VesselError as e:
        tell(Failed(None, None, str(e)))
    except Exception as e:
        print(told(traceback.format_exc()), end="", file=sys.stderr)
        tell(Failed(None, None, f"{type(e).__name__}: {first_line(e)}; this is a bug of vessel-rt"))
    tell(None)
    os._exit(0)  # a broken device may hang in the cleanup of its library

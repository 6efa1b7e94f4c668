"""A worker in a separate process: both ends of the pipe. The process gets frames and answers with entries.

The process is a plain child that reads pickles from its standard input, so it is not affected by a terminal's Ctrl-C and does not import
the user's script. When the parent is gone, its input ends and it exits. Does not know the other processes of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from vessel_rt.device.providers import open_device
from vessel_rt.errors import DeviceError, VesselError
from vessel_rt.inputs.frames import Frame
from vessel_rt.inputs.pseudonyms import conceal
from vessel_rt.io.child_process import parent_pipes
from vessel_rt.results.writer import Entry
from vessel_rt.run.worker import Job

__all__ = ["PATIENCE", "Died", "Patience", "WorkerProcess", "serve"]

_PROGRAM = "from vessel_rt.run.worker_process import serve; serve()"
_TICK = 0.2  # seconds between two checks of the clock and of `stop`
_DEATH = 5.0  # seconds that a killed process may take to end; one that hangs in a driver never ends
_ORPHAN = 1  # exit code of a process whose parent is gone


@dataclasses.dataclass(frozen=True)
class Patience:
    """How many seconds to wait for a process before it is killed.

    `loading` is the limit until its first entry: it may read and hash tens of gigabytes, and TensorRT compiles engines then. `stalled`, or
    `stalled_times` the slowest entry so far, is the limit for one entry. `stopping`, or `stopping_times` the slowest entry so far, is the
    limit for finishing its frames when the run is stopped.
    """

    loading: float = 3600.0
    stalled: float = 600.0
    stalled_times: float = 20.0
    stopping: float = 30.0
    stopping_times: float = 3.0

    def overdue(self, waited: float, slowest: float | None) -> float | None:
        """The limit that `waited` exceeds, or None. `slowest` is the time of the slowest entry, None before the first one."""
        limit = self.loading if slowest is None else max(self.stalled, self.stalled_times * slowest)
        return limit if waited > limit else None


PATIENCE = Patience()


class Died(Exception):
    """A worker process is gone, or was killed. `lasting`: it does not end although it was killed, so it still holds its device."""

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class WorkerProcess:
    """A child that works on `job`. Threads exchange the messages with it, so that no call blocks.

    Args:
        job: what it works on, and where.
        stop: once it is set, the process is told to start no further frame, and is killed if it does not end in time.
        say: called with what the process says to the user.
        patience: how long to wait before it is killed.
    """

    def __init__(self, job: Job, stop: threading.Event, say: Callable[[str], object], patience: Patience = PATIENCE) -> None:
        self._device, self._stop, self._say, self._patience = job.device, stop, say, patience
        self.streams = self.batch = self.least_batch = 1
        self._ready = False
        self._told: float | None = None  # when it was told to stop
        self._heard = time.monotonic()
        self._slowest: float | None = None  # seconds between two entries
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        # -P: import no module from the current folder. A session of its own: only the parent handles Ctrl-C.
        command = [sys.executable, "-P", "-c", _PROGRAM]
        errors = None if _is_open(2) else subprocess.DEVNULL
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._write, self._read)]
        for thread in self._threads:
            thread.start()
        self._send(job)

    def wait_until_ready(self) -> None:
        """Raise Died if it ends before it is ready, VesselError if it cannot load its bundle."""
        self.batch, self.streams = self._receive("ready")
        self.least_batch, self._ready = self.batch, True

    def run(self, frames: Sequence[Frame]) -> Iterator[Entry]:
        """Yield the entries of `frames` as they arrive. Raises Died, or VesselError if a result cannot be written."""
        self._heard = time.monotonic()
        self._send(list(frames))
        while (answer := self._receive("entry")) is not None:
            entry, self.least_batch = answer
            yield entry

    def close(self) -> None:
        """End the process; anything it still does is discarded."""
        self._outbox.put(b"")
        if self._kill() is None:
            return  # it keeps its pipes, so the threads cannot end
        for thread in self._threads:
            thread.join()
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(OSError):
                assert pipe
                pipe.close()

    def _send(self, message: Any) -> None:
        self._outbox.put(pickle.dumps(message))

    def _receive(self, wanted: str) -> Any:
        """The content of the next message of the kind `wanted`; other messages are handled here."""
        while True:
            if self._stop.is_set() and self._told is None:
                self._told = time.monotonic()
                self._send(None)
            try:
                kind, content = self._inbox.get(timeout=_TICK)
            except queue.Empty:
                self._check_the_clock()
                continue
            if kind == wanted:
                return content
            if kind == "say":
                self._say(content)
            elif kind == "gone":
                raise self._death()
            elif kind == "device":
                self._kill()
                raise Died(f"device {self._device}: {content}")
            elif kind == "error":
                raise VesselError(content)
            else:
                raise RuntimeError(f"in the process of device {self._device}:\n{content}")

    def _check_the_clock(self) -> None:
        """Kill the process and raise Died if it exceeds its limit."""
        now = time.monotonic()
        if self._told is not None:
            grace = max(self._patience.stopping, self._patience.stopping_times * (self._slowest or 0.0)) if self._ready else 0.0
            if now - self._told > grace:
                raise self._killed(f"did not stop within {grace:.0f} seconds")
        elif limit := self._patience.overdue(now - self._heard, self._slowest):
            raise self._killed(f"made no progress for {limit:.0f} seconds")

    def _killed(self, why: str) -> Died:
        ended = self._kill() is not None
        did = "was killed" if ended else "cannot be killed"
        return Died(f"the process of device {self._device} {why} and {did}", lasting=not ended)

    def _death(self) -> Died:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=1)
        code = self._kill()  # it may still run and only have closed its pipe
        if code is None:
            return Died(f"the process of device {self._device} does not answer and cannot be killed", lasting=True)
        return Died(f"the process of device {self._device} died ({f'signal {-code}' if code < 0 else f'exit code {code}'})")

    def _kill(self) -> int | None:
        """Its exit code, or None if it does not end."""
        self._child.kill()
        try:
            return self._child.wait(_DEATH)
        except subprocess.TimeoutExpired:
            return None

    def _write(self) -> None:
        """In a thread: send the messages to the child."""
        assert self._child.stdin
        with contextlib.suppress(OSError):  # it is gone; `_read` notices
            while message := self._outbox.get():
                self._child.stdin.write(message)
                self._child.stdin.flush()

    def _read(self) -> None:
        """In a thread: receive the messages of the child, and note when they arrive."""
        assert self._child.stdout
        try:
            while True:
                kind, content = pickle.load(self._child.stdout)
                now = time.monotonic()
                if kind == "entry" and content is not None:
                    self._slowest = max(self._slowest or 0.0, now - self._heard)
                self._heard = now
                self._inbox.put((kind, content))
        except Exception:  # its end, or half a message of a dying process
            self._inbox.put(("gone", None))


def serve() -> None:
    """The child's side. A Job comes first, then lists of frames; None means to start no further frame. It ends silently with its parent."""
    commands, replies = parent_pipes()
    sending = threading.Lock()

    def reply(kind: str, content: Any) -> None:
        try:
            with sending:
                pickle.dump((kind, content), replies)
                replies.flush()
        except OSError:
            os._exit(_ORPHAN)

    try:
        job: Job = pickle.load(commands)
    except (EOFError, pickle.UnpicklingError):
        os._exit(_ORPHAN)
    stop, chunks = threading.Event(), queue.SimpleQueue[list[Frame]]()
    threading.Thread(target=_listen, args=(commands, chunks, stop), daemon=True).start()
    try:
        open_device(job.device)
        with job.open(stop, lambda text: reply("say", text)) as worker:
            reply("ready", (worker.batch, worker.streams))
            while True:
                frames = chunks.get()
                job.remember_names(frames)
                for entry in worker.run(frames):
                    reply("entry", (entry, worker.least_batch))
                reply("entry", None)
    except DeviceError as e:
        reply("device", str(e))
        os._exit(1)  # a broken device may hang in the cleanup of its library
    except VesselError as e:
        reply("error", str(e))
    except Exception:
        reply("bug", conceal(traceback.format_exc()))


def _listen(commands: IO[bytes], chunks: queue.SimpleQueue[list[Frame]], stop: threading.Event) -> None:
    """Receive the parent's messages as they arrive. When it is gone, end: another run may start in the same folder."""
    try:
        while True:
            message = pickle.load(commands)
            if message is None:
                stop.set()
            else:
                chunks.put(message)
    finally:
        os._exit(_ORPHAN)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True

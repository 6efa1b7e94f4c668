"""Several devices at work on one run: a process for each, which takes frames as it is done with others, and may die.

A process has a whole device, loads the bundle itself and writes its frames' files; entries come back to the one process that keeps the
record. It is a plain child, spoken to in pickles over its standard input and output, so that neither a terminal's Ctrl-C nor the import of
a user's script reaches it; when its parent is gone, its input ends, and so does it.
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
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from vessel_rt.bundle import Bundle
from vessel_rt.checked_files import CheckedFiles
from vessel_rt.deployment import deploy
from vessel_rt.errors import VesselError
from vessel_rt.frames import Frame
from vessel_rt.outputs import Entry, FrameWriter, failure
from vessel_rt.privacy import conceal, remember
from vessel_rt.session import Device
from vessel_rt.worker import Worker, WorkOptions

__all__ = ["Job", "Workers", "serve"]

_MOST = 16  # batches a worker takes at once, at most: it works ahead only within what it has taken, and the last ones are shared out
_PROGRAM = "from vessel_rt.workers import serve; serve()"


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know. `names` are of the run's frames, those of other parts, too; `files` of the bundle are checked."""

    bundle: Bundle
    device: Device
    options: WorkOptions
    output: Path
    names: Collection[str]
    settings: str
    show_names: bool = False
    files: CheckedFiles | None = None

    def open(self, stop: threading.Event, say: Callable[[str], object], progress: Callable[[int, int], object] | None = None) -> Worker:
        """Load the bundle on the device. Raises VesselError."""
        deployment = deploy(self.bundle, self.device, progress, batch=self.options.batch, files=self.files)
        writer = FrameWriter(self.output, self.names, self.settings)
        return Worker(deployment, self.options, len(self.names), writer, self.settings, stop, say)


class Workers:
    """A process for each of `jobs`; in all else like a Worker. Entering loads them all, leaving ends them.

    A process that dies is started again. The frames that it had in hand are tried once more, each alone, so that the one that kills fails,
    and no other.

    Raises:
        VesselError: on entering, a process that cannot load its bundle; while running, a result that cannot be written.
    """

    def __init__(self, jobs: Sequence[Job], stop: threading.Event, say: Callable[[str], object]) -> None:
        self._jobs, self._stop, self._say = jobs, stop, say
        self._processes: list[_Process] = []
        self._left: deque[Frame] = deque()
        self._alone: deque[Frame] = deque()
        self._lost: set[str] = set()
        self._lock = threading.Lock()

    @property
    def streams(self) -> int:
        """Of one process."""
        return self._processes[0].streams

    @property
    def batch(self) -> int:
        """Frames at once, at first."""
        return self._processes[0].batch

    @property
    def least_batch(self) -> int:
        """Frames at once, after a device has run out of memory."""
        return min(process.least_batch for process in self._processes)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            self._processes.extend(_Process(job, self._say) for job in self._jobs)
            for process in self._processes:
                process.wait_until_ready()
            stack.pop_all()
        threading.Thread(target=self._pass_on_stop, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop.set()
        self._close()

    def run(self, frames: Sequence[Frame]) -> Iterator[Entry]:
        """Take every frame through, in no order. See Worker.run."""
        self._left.extend(frames)
        done: queue.SimpleQueue[Entry | BaseException | None] = queue.SimpleQueue()
        threads = [threading.Thread(target=self._drive, args=(place, done)) for place in range(len(self._jobs))]
        for thread in threads:
            thread.start()
        try:
            working = len(threads)
            while working:
                entry = done.get()
                if isinstance(entry, BaseException):
                    raise entry
                if entry is None:
                    working -= 1
                else:
                    yield entry
        except BaseException:
            self._stop.set()
            raise
        finally:
            for thread in threads:
                thread.join()

    def _drive(self, place: int, done: queue.SimpleQueue[Entry | BaseException | None]) -> None:
        """Keep one process busy, from a thread of its own."""
        try:
            while frames := self._take():
                waiting = {frame.name: frame for frame in frames}
                try:
                    for entry in self._processes[place].run(frames):
                        del waiting[entry.name]
                        done.put(entry)
                except _Died as e:
                    if self._stop.is_set():
                        break
                    self._say(f"warning: {e}; it is started again")
                    self._processes[place] = _Process(self._jobs[place], self._say)
                    self._processes[place].wait_until_ready()
                    for entry in self._lose(waiting.values()):
                        done.put(entry)
        except BaseException as e:
            done.put(e)
        finally:
            done.put(None)

    def _take(self) -> list[Frame]:
        """What a process works on next: many frames while there are many, that it may work ahead; few at the end, that all end together."""
        with self._lock:
            if self._stop.is_set():
                return []
            if self._alone:
                return [self._alone.popleft()]
            at_once = self.batch * self.streams
            fair = len(self._left) // (2 * len(self._jobs))
            return [self._left.popleft() for _ in range(min(len(self._left), max(at_once, min(fair, _MOST * at_once))))]

    def _lose(self, frames: Collection[Frame]) -> list[Entry]:
        """Frames whose process died: to be tried alone, or given up."""
        job = self._jobs[0]
        with self._lock:
            given_up = [frame for frame in frames if frame.name in self._lost]
            self._alone.extend(frame for frame in frames if frame.name not in self._lost)
            self._lost.update(frame.name for frame in frames)
        return [failure(frame, job.options.questions, "the process that worked on it died, twice", job.settings) for frame in given_up]

    def _pass_on_stop(self) -> None:
        self._stop.wait()
        for process in self._processes:
            process.stop()

    def _close(self) -> None:
        for process in self._processes:
            process.close()


class _Died(Exception):
    """A worker's process is gone."""


class _Process:
    """One child, as its parent sees it."""

    def __init__(self, job: Job, say: Callable[[str], object]) -> None:
        self._device, self._say = job.device, say
        self.streams = self.batch = self.least_batch = 1
        self._sending = threading.Lock()
        # -P: no module from the folder that the user happens to be in. A session of its own: Ctrl-C is for the parent to deal with.
        command = [sys.executable, "-P", "-c", _PROGRAM]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        with contextlib.suppress(_Died):  # wait_until_ready says so
            self._send(job)

    def wait_until_ready(self) -> None:
        try:
            self.batch, self.streams = self._receive("ready")
            self.least_batch = self.batch
        except _Died as e:
            raise VesselError(f"device {self._device}: {e}, before it was ready") from e

    def run(self, frames: Sequence[Frame]) -> Iterator[Entry]:
        self._send(list(frames))
        while (answer := self._receive("entry")) is not None:
            entry, self.least_batch = answer
            yield entry

    def stop(self) -> None:
        with contextlib.suppress(_Died, ValueError):  # ValueError: closed already
            self._send(None)

    def close(self) -> None:
        """End it; by now it has nothing to do, or what it does is not wanted."""
        if self._child.stdin and self._child.stdout:
            with self._sending, contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()
            self._child.kill()
            self._child.wait()
            self._child.stdout.close()

    def _send(self, message: Any) -> None:
        assert self._child.stdin
        try:
            with self._sending:
                pickle.dump(message, self._child.stdin)
                self._child.stdin.flush()
        except BrokenPipeError as e:
            raise self._death() from e

    def _receive(self, wanted: str) -> Any:
        """What comes next of the kind that is wanted; what comes between is dealt with."""
        assert self._child.stdout
        while True:
            try:
                kind, content = pickle.load(self._child.stdout)
            except (EOFError, pickle.UnpicklingError) as e:
                raise self._death() from e
            if kind == wanted:
                return content
            if kind == "say":
                self._say(content)
            elif kind == "error":
                raise VesselError(content)
            else:
                raise RuntimeError(f"in the process of device {self._device}:\n{content}")

    def _death(self) -> _Died:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=1)
        self._child.kill()  # where it is there still, and only says nothing any more
        code = self._child.wait()
        return _Died(f"the process of device {self._device} died ({f'signal {-code}' if code < 0 else f'exit code {code}'})")


def serve() -> None:
    """The child's side: a Job comes first, then lists of frames; None means to begin no more."""
    commands, replies = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is not for the parent
    sending = threading.Lock()

    def reply(kind: str, content: Any) -> None:
        with sending:
            pickle.dump((kind, content), replies)
            replies.flush()

    job: Job = pickle.load(commands)
    stop, chunks = threading.Event(), queue.SimpleQueue[list[Frame]]()
    threading.Thread(target=_listen, args=(commands, chunks, stop), daemon=True).start()
    try:
        with job.open(stop, lambda text: reply("say", text)) as worker:
            reply("ready", (worker.batch, worker.streams))
            while True:
                frames = chunks.get()
                if not job.show_names:
                    for frame in frames:
                        remember(frame.path, frame.code)
                for entry in worker.run(frames):
                    reply("entry", (entry, worker.least_batch))
                reply("entry", None)
    except VesselError as e:
        reply("error", str(e))
    except Exception:
        reply("bug", conceal(traceback.format_exc()))


def _listen(commands: IO[bytes], chunks: queue.SimpleQueue[list[Frame]], stop: threading.Event) -> None:
    """Take the parent's messages as they come; when it is gone, be gone too: another run may begin in the same folder."""
    try:
        while True:
            message = pickle.load(commands)
            if message is None:
                stop.set()
            else:
                chunks.put(message)
    finally:
        os._exit(0)

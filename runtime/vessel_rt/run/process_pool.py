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
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from vessel_rt.device.deployment import deploy
from vessel_rt.device.session import Device
from vessel_rt.errors import DeviceError, VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.frames import Frame
from vessel_rt.inputs.pseudonyms import conceal, remember
from vessel_rt.io.checked_files import CheckedFiles
from vessel_rt.results.writer import Entry, FrameWriter, failure
from vessel_rt.run.frame_queue import Shares
from vessel_rt.run.worker import Worker, WorkOptions
from vessel_rt.run.worker_process import PATIENCE, Died, Patience, WorkerProcess, die_with_parent

__all__ = ["Job", "Workers", "serve"]

RESTARTS = 3  # of a device's process without a finished frame in between; then the device is given up
_ORPHAN = 1  # exit code of a process whose parent is gone


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know. `names` are of the run's frames, those of other shards, too; `files` of the bundle are checked."""

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

    A process that dies, makes no progress (see Patience) or finds its device faulty is started again. The frames that it had in hand are
    tried once more, each alone, so that the one that kills fails, and no other. A device whose process has ended more than `RESTARTS`
    times before it finished a frame is given up, and the frames go to the other devices.

    Raises:
        VesselError: on entering, a process that cannot load its bundle; while running, a result that cannot be written.
        DeviceError: every device was given up; what is done is kept.
    """

    def __init__(self, jobs: Sequence[Job], stop: threading.Event, say: Callable[[str], object], patience: Patience = PATIENCE) -> None:
        self._jobs, self._stop, self._say, self._patience = jobs, stop, say, patience
        self._devices: list[_Device] = []

    @property
    def streams(self) -> int:
        """Of one process."""
        return self._devices[0].process.streams

    @property
    def batch(self) -> int:
        """Frames at once, at first."""
        return self._devices[0].process.batch

    @property
    def least_batch(self) -> int:
        """Frames at once, after a device has run out of memory."""
        return min(device.least_batch for device in self._devices)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            for job in self._jobs:
                self._devices.append(_Device(job, self._stop, self._say, self._patience))
            for device in self._devices:
                device.wait_until_ready()
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop.set()
        self._close()

    def run(self, frames: Sequence[Frame]) -> Iterator[Entry]:
        """Take every frame through, in no order. See Worker.run."""
        shares = Shares(frames, len(self._devices), self._stop)
        done: queue.SimpleQueue[Entry | BaseException | None] = queue.SimpleQueue()
        threads = [threading.Thread(target=device.drive, args=(shares, done)) for device in self._devices]
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
        if not (shares.empty or self._stop.is_set()):
            raise DeviceError(f"no device is left to work on ({self._devices[-1].fault}); what is done is kept")

    def _close(self) -> None:
        for device in self._devices:
            device.close()


class _Device:
    """A device, and the processes that work on it, one after the other; the first is started at once."""

    def __init__(self, job: Job, stop: threading.Event, say: Callable[[str], object], patience: Patience) -> None:
        self._job, self._stop, self._say, self._patience = job, stop, say, patience
        self._suspects: list[Frame] = []  # that a process died with, alone and not for the first time; the device may yet be the cause
        self._deaths = 0  # since a frame was finished
        self.fault: Died | None = None  # the last one
        self.process = self._started()
        self.least_batch = 1

    def _started(self) -> WorkerProcess:
        return WorkerProcess(self._job, self._stop, self._say, self._patience)

    def wait_until_ready(self) -> None:
        """Raises VesselError if the first process does not load."""
        try:
            self.process.wait_until_ready()
        except Died as e:
            raise VesselError(f"{e}, before it was ready") from e
        self.least_batch = self.process.least_batch

    def drive(self, shares: Shares, done: queue.SimpleQueue[Entry | BaseException | None]) -> None:
        """Keep a process busy, from a thread of its own; None says that it is done, or the device given up."""
        try:
            while frames := shares.take(self.process.streams * self.process.least_batch):
                try:
                    alive = self._work(frames, shares, done)
                finally:
                    shares.give_back()
                if not alive:
                    return
            if not self._stop.is_set():
                self._blame_suspects(done)
        except BaseException as e:
            done.put(e)
        finally:
            done.put(None)

    def close(self) -> None:
        self.process.close()

    def _work(self, frames: Sequence[Frame], shares: Shares, done: queue.SimpleQueue[Entry | BaseException | None]) -> bool:
        """Have the process work on `frames`; whether there is a process afterwards."""
        waiting = {frame.name: frame for frame in frames}
        try:
            for entry in self.process.run(frames):
                del waiting[entry.name]
                self.least_batch = min(self.least_batch, self.process.least_batch)
                if entry.error is None:  # so the device works
                    self._blame_suspects(done)
                    self._deaths = 0
                done.put(entry)
            return True
        except Died as e:
            if self._stop.is_set():
                self._say(f"warning: {e}")
                return False
            self._suspects += shares.lose(waiting.values())
            if not self._start_again(e):
                shares.try_alone(self._suspects)
                return False
            return True

    def _start_again(self, died: Died) -> bool:
        """A new process, ready, in the place of the one that died; False where the device is given up or the run is stopped."""
        while not self._stop.is_set():
            self.fault, self._deaths = died, self._deaths + 1
            if died.lasting or self._deaths > RESTARTS:
                self._say(f"warning: {died}; device {self._job.device} is given up")
                return False
            self._say(f"warning: {died}; it is started again")
            self.process.close()
            self.process = self._started()
            try:
                self.process.wait_until_ready()
                return True
            except Died as e:
                died = e
            except VesselError as e:
                died = Died(f"the process of device {self._job.device} cannot start ({e})")
        return False

    def _blame_suspects(self, done: queue.SimpleQueue[Entry | BaseException | None]) -> None:
        for frame in self._suspects:
            done.put(failure(frame, self._job.options.questions, "the process that worked on it died, twice", self._job.settings))
        self._suspects.clear()


def serve() -> None:
    """The child's side: a Job comes first, then lists of frames; None means to begin no more. It ends, silently, with its parent."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent deals with it
    commands, replies = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(2, sys.stdout.fileno())  # what a library prints is not for the parent
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
    except DeviceError as e:
        reply("device", str(e))
        os._exit(1)  # a broken device may hang in its library's cleanup
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
        os._exit(_ORPHAN)

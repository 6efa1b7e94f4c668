"""Runs several devices: one process per device, which is restarted when it dies.

A process loads the bundle itself and writes the files of its frames. It sends entries to the parent, which alone writes the journal. Does
not know the protocol of a process (worker_process.py) or what it does with a frame (worker.py).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from vessel_rt.errors import DeviceError, VesselError
from vessel_rt.inputs.frames import Frame
from vessel_rt.results.writer import Entry
from vessel_rt.run.frame_queue import FrameQueue
from vessel_rt.run.worker import Job
from vessel_rt.run.worker_process import PATIENCE, Died, Patience, WorkerProcess

__all__ = ["ProcessPool"]

RESTARTS = 3  # of a device's process without a finished frame in between; after that the device is given up


class ProcessPool:
    """A process for each of `jobs`, with the interface of a Worker. Entering loads all of them, leaving ends them.

    A process that dies, makes no progress (see Patience) or finds its device faulty is restarted. The frames that it was working on are
    tried once more, each alone, so that only a frame that kills the process fails. A device whose process ended more than RESTARTS times
    without finishing a frame is given up, and its frames go to the other devices.

    Raises:
        VesselError: on entering, a process cannot load its bundle; while running, a result cannot be written.
        DeviceError: every device was given up; finished results are kept.
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
        """Frames at once at the start."""
        return self._devices[0].process.batch

    @property
    def least_batch(self) -> int:
        """Frames at once after a device ran out of memory."""
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
        """Process every frame, in no particular order. See Worker.run."""
        queued = FrameQueue(frames, len(self._devices), self._stop)
        done: queue.SimpleQueue[Entry | BaseException | None] = queue.SimpleQueue()
        threads = [threading.Thread(target=device.drive, args=(queued, done)) for device in self._devices]
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
        if not (queued.empty or self._stop.is_set()):
            raise DeviceError(f"no working device is left ({self._devices[-1].fault}); finished results are kept")

    def _close(self) -> None:
        for device in self._devices:
            device.close()


class _Device:
    """A device, and the processes that work on it, one after another; the first is started at once."""

    def __init__(self, job: Job, stop: threading.Event, say: Callable[[str], object], patience: Patience) -> None:
        self._job, self._stop, self._say, self._patience = job, stop, say, patience
        self._suspects: list[Frame] = []  # each was alone in a process that died, for the second time; the device may still be the cause
        self._deaths = 0  # since the last finished frame
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

    def drive(self, queued: FrameQueue, done: queue.SimpleQueue[Entry | BaseException | None]) -> None:
        """Keep a process busy, in a thread of its own; puts None at the end, or when the device is given up."""
        try:
            while frames := queued.take(self.process.streams * self.process.least_batch):
                try:
                    alive = self._work(frames, queued, done)
                finally:
                    queued.done()
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

    def _work(self, frames: Sequence[Frame], queued: FrameQueue, done: queue.SimpleQueue[Entry | BaseException | None]) -> bool:
        """Let the process work on `frames`; returns whether there is a process afterwards."""
        waiting = {frame.name: frame for frame in frames}
        try:
            for entry in self.process.run(frames):
                del waiting[entry.name]
                self.least_batch = min(self.least_batch, self.process.least_batch)
                if entry.error is None:  # the device works
                    self._blame_suspects(done)
                    self._deaths = 0
                done.put(entry)
            return True
        except Died as e:
            if self._stop.is_set():
                self._say(f"warning: {e}")
                return False
            alive = self._start_again(e)
            self._suspects += queued.lose(waiting.values())  # now, so that the new process takes them: others may be about to die, too
            if not alive:
                queued.try_alone(self._suspects)
            return alive

    def _start_again(self, died: Died) -> bool:
        """Replace the process that died; False if the device is given up or the run is stopped."""
        while not self._stop.is_set():
            self.fault, self._deaths = died, self._deaths + 1
            if died.lasting or self._deaths > RESTARTS:
                self._say(f"warning: {died}; device {self._job.device} is given up")
                return False
            self._say(f"warning: {died}; it is restarted")
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
            done.put(self._job.writer.failure(frame, self._job.options.questions, "the process that worked on it died twice"))
        self._suspects.clear()

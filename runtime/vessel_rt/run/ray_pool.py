"""Runs a Ray cluster: Ray Data's `map_batches` over a pool of actors, each with a device and a bundle.

All hosts see the bundle, the inputs and the output folder under the same paths. Only numbers go through Ray's data: an actor gets the
frames as an argument when it is created, and Ray does not log arguments. Does not know what a worker does with a frame.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import logging
import os
import queue
import re
import secrets
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec

from vessel_rt.device.deployment import MOST_IMAGES
from vessel_rt.device.providers import open_device
from vessel_rt.errors import DeviceError, VesselError, first_line
from vessel_rt.inputs.frames import Frame
from vessel_rt.inputs.pseudonyms import conceal
from vessel_rt.io.child_process import die_with_parent
from vessel_rt.results.writer import Entry
from vessel_rt.run.worker import Job
from vessel_rt.run.worker_process import PATIENCE, Patience

__all__ = ["RayPool", "check_address"]

# Two actors of a whole CPU each leave none for the tasks that feed them, and the run hangs (ray issue 44687).
_CPUS = 0.5
_RESTARTS = 2  # of an actor that dies, and of the task that it had
_ROUNDS = 3  # of an actor in one task if it chooses its batch itself: a multiple of most batches up to MOST_IMAGES
_REACHING, _CONNECTING = 5.0, 60.0  # seconds for a connection to the address, and for Ray to join the cluster there
_TICK = 0.2  # seconds between two checks of the clock and of `stop`


def check_address(address: str) -> str:
    """`address` itself: `local`, `auto`, or HOST:PORT, optionally with ray://. Raises ValueError."""
    if address not in ("local", "auto") and _host_and_port(address) is None:
        raise ValueError(f"{address!r} is not the address of a Ray cluster: use HOST:PORT, ray://HOST:PORT, auto or local")
    return address


class RayPool:
    """An actor for each of `jobs`, or, for GPUs, for each GPU of the cluster; with the interface of a Worker.

    Args:
        jobs: equal except for their devices; an actor sees only its own GPU, as number 0.
        address: of a cluster, in the form of `check_address`; `local` starts one on this host, on its loopback interface only.
        stop: once it is set, no further entry is waited for.
        patience: how long to wait for an entry.

    Raises:
        VesselError: Ray is not installed, the cluster cannot be reached or has no GPU; while running, a result cannot be written, or the
            cluster makes no progress.
    """

    def __init__(self, jobs: Sequence[Job], address: str, stop: threading.Event, patience: Patience = PATIENCE) -> None:
        self._jobs, self._address, self._stop, self._patience = jobs, address, stop, patience
        self.streams = self.batch = self.least_batch = 1  # until an actor reports them

    def __enter__(self) -> Self:
        self._reach()
        self._ray = _import_ray(local=self._address == "local")
        try:
            if self._address == "local":  # from this thread, since Ray ends with the thread that started it
                self._init(num_cpus=max(2, len(self._jobs)), include_dashboard=False)
                self._check_loopback()
            else:
                self._connect()
        except (ConnectionError, ValueError, OSError, RuntimeError) as e:
            raise VesselError(f"--ray {self._address}: {first_line(e)}") from e
        self._ray.data.DataContext.get_current().enable_progress_bars = False
        for name in ("ray.data", "ray.data.__init__"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._ray.shutdown()

    def run(self, frames: Sequence[Frame]) -> Iterator[Entry]:
        """Process every frame, in no particular order. See Worker.run."""
        job, absolute = self._jobs[0], [dataclasses.replace(frame, path=frame.path.absolute()) for frame in frames]
        bundle = msgspec.structs.replace(job.bundle, folder=job.bundle.folder.absolute())  # each host checks its files itself
        gpus = 0 if job.device.kind == "cpu" else int(self._ray.cluster_resources().get("GPU", 0))
        if job.device.kind != "cpu" and not gpus:
            raise VesselError(f"--ray {self._address}: the cluster has no GPU; use --devices cpu:N, or add hosts with a GPU")
        actors = gpus or len(self._jobs)
        share = _rows(job, len(frames), actors)
        rows = self._ray.data.range(len(frames), override_num_blocks=-(-len(frames) // share))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # max_restarts has no other way in yet; without it an actor that dies is restarted forever
            entries = rows.map_batches(
                _Actor,
                fn_constructor_args=(dataclasses.replace(job, bundle=bundle, writer=job.writer.absolute()), absolute),
                compute=self._ray.data.ActorPoolStrategy(size=actors),
                batch_size=share,
                max_restarts=_RESTARTS,
                max_task_retries=_RESTARTS,
                # Before the actor's process starts: NumPy's threads would spin on cores that the graphs need.
                runtime_env={"env_vars": {"OPENBLAS_NUM_THREADS": "1"}},
                **({"num_gpus": 1} if gpus else {"num_cpus": _CPUS}),
            )
        least: int | None = None
        for found in self._found(entries):
            self.streams, self.batch, now = (found.pop(key) for key in ("streams", "batch", "least_batch"))
            self.least_batch = least = min(least or now, now)
            yield Entry(**found)

    def _found(self, entries: Any) -> Iterator[dict[str, Any]]:
        """What the actors return, row by row, until `stop` is set. A thread waits for it, since Ray waits forever for a hung actor."""
        rows: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_put_rows, args=(entries, rows), daemon=True).start()
        heard, slowest = time.monotonic(), None
        while not self._stop.is_set():
            try:
                row = rows.get(timeout=_TICK)
            except queue.Empty:
                if limit := self._patience.overdue(time.monotonic() - heard, slowest):
                    raise VesselError(f"--ray {self._address}: no progress for {limit:.0f} seconds; finished results are kept") from None
                continue
            now = time.monotonic()
            heard, slowest = now, max(slowest or 0.0, now - heard)
            if row is None:
                return
            if isinstance(row, self._ray.exceptions.RayError):
                raise VesselError(f"--ray {self._address}: {first_line(row)}; finished results are kept") from row
            if isinstance(row, BaseException):
                raise row
            found = json.loads(row["entry"])
            if "error_of_all" in found:
                raise VesselError(found["error_of_all"])
            yield found

    def _init(self, **more: Any) -> None:
        self._ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR, **more)

    def _connect(self) -> None:
        """Join the cluster. Raises what Ray raises, or VesselError if it takes too long: Ray may try for ten minutes."""
        outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def connect() -> None:
            try:
                self._init()
                outcome.put(None)
            except BaseException as e:
                outcome.put(e)

        threading.Thread(target=connect, daemon=True).start()
        try:
            error = outcome.get(timeout=_CONNECTING)
        except queue.Empty:
            raise VesselError(f"--ray {self._address}: no Ray cluster answers there within {_CONNECTING:.0f} seconds") from None
        if error:
            raise error

    def _reach(self) -> None:
        """Raise VesselError if nothing listens at the address; Ray takes minutes to find out."""
        place = _host_and_port(self._address)
        if place:
            try:
                socket.create_connection(place, _REACHING).close()
            except OSError as e:
                advice = "give the HOST:PORT that `ray start --head` showed, or no address for a cluster on this host"
                raise VesselError(f"--ray {self._address}: nothing answers there ({e.strerror or e}); {advice}") from e

    def _check_loopback(self) -> None:
        if not ipaddress.ip_address(self._ray.util.get_node_ip_address()).is_loopback:
            self._ray.shutdown()
            raise VesselError("--ray: Ray was already imported and would listen on the network; start this run in a separate process")


class _Actor:
    """A Worker in the form of Ray Data: a class whose objects take a batch of rows and return one."""

    def __init__(self, job: Job, frames: Sequence[Frame]) -> None:
        die_with_parent()
        self._frames = frames
        job.remember_names(frames)
        open_device(job.device)
        self._worker = job.open(threading.Event(), lambda text: None)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[str]]:
        worker = self._worker
        try:
            entries = list(worker.run([self._frames[int(place)] for place in rows["id"]]))
            told = {"streams": worker.streams, "batch": worker.batch, "least_batch": worker.least_batch}
            found = [vars(entry) | told for entry in entries]
        except DeviceError as e:
            print(e, file=sys.stderr, flush=True)  # Ray's logs
            os._exit(1)  # for another actor to take over
        except VesselError as e:
            found = [{"error_of_all": str(e)}]
        except Exception:
            raise RuntimeError(conceal(traceback.format_exc())) from None  # Ray logs it
        return {"entry": [json.dumps(entry) for entry in found]}


def _import_ray(local: bool) -> Any:
    """Import Ray and Ray Data. They read what `local` needs from the environment when they are imported."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its messages about Ray's internals would tear the progress bar
    if local:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all its sockets on 127.0.0.1, on Linux too
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # otherwise Ray saves one in ~/.ray
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as e:
        raise VesselError("--ray needs Ray: pip install 'vessel-rt[ray]'") from e
    return ray


def _host_and_port(address: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"(?:ray://)?(\[[0-9a-fA-F:.]+\]|[^\s:/]+):(\d{1,5})", address)
    return (match[1].strip("[]"), int(match[2])) if match and 0 < int(match[2]) < 65536 else None


def _rows(job: Job, frames: int, actors: int) -> int:
    """Frames of one task: whole rounds of an actor's batch x streams; fewer only if some actors would get none.

    Unless it was given, the batch of a GPU is not known before its actor exists; _ROUNDS x MOST_IMAGES then leave few partial batches.
    """
    batch = job.options.batch or (1 if job.device.kind == "cpu" else _ROUNDS * MOST_IMAGES)
    return max(1, min(batch * job.options.streams_on(job.device.kind, frames, job.bundle), -(-frames // actors)))


def _put_rows(entries: Any, rows: queue.SimpleQueue[Any]) -> None:
    """In a thread: put the rows of `entries`, then the error that ended them, or None."""
    try:
        for row in entries.iter_rows():
            rows.put(row)
        rows.put(None)
    except BaseException as e:
        rows.put(e)

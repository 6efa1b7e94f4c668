"""The hosts of a Ray cluster at work on one run: Ray Data's `map_batches` over a pool of actors, each with a device and a bundle.

All hosts see the bundle, the inputs and the output folder under the same paths. Nothing but numbers goes through Ray's data: the frames'
files reach an actor when it is made, as an argument, which Ray does not log.
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

from vessel_rt.device.deployment import MOST_IMAGES
from vessel_rt.device.providers import open_device
from vessel_rt.errors import DeviceError, VesselError, first_line
from vessel_rt.inputs.frames import Frame
from vessel_rt.inputs.pseudonyms import conceal, remember
from vessel_rt.results.writer import Entry
from vessel_rt.run.worker import Job
from vessel_rt.run.worker_process import PATIENCE, Patience, die_with_parent

__all__ = ["RayPool", "check_address"]

# Two actors of a whole CPU each leave none for what feeds them, and the run hangs (ray issue 44687).
_CPUS = 0.5
_RESTARTS = 2  # of an actor that dies, and of what it had in hand
_ROUNDS = 3  # of an actor in one task, where its batch is its own choice: a multiple of most batches up to MOST_IMAGES
_REACHING, _CONNECTING = 5.0, 60.0  # seconds for a connection to the address, and for Ray to join the cluster there
_TICK = 0.2  # seconds between two looks at the clock and at `stop`


def check_address(address: str) -> str:
    """`address` itself: `local`, `auto`, or HOST:PORT, perhaps with ray:// before it; ValueError says so for any other."""
    if address not in ("local", "auto") and _host_and_port(address) is None:
        raise ValueError(f"{address!r} is no address of a Ray cluster: take HOST:PORT, ray://HOST:PORT, auto or local")
    return address


class RayPool:
    """An actor for each of `jobs`, or, where these are for GPUs, for each GPU of the cluster; in all else like a Worker.

    Args:
        jobs: all alike but for their devices; on a GPU an actor sees only its own, as number 0.
        address: of a cluster, as `check_address` takes it; `local` starts one on this host, which listens on its loopback interface alone.
        stop: once it is set, no further entry is waited for.
        patience: how long an entry is waited for.

    Raises:
        VesselError: Ray is not installed, the cluster cannot be reached or has no GPU; while running, a result cannot be written, or the
            cluster makes no progress.
    """

    def __init__(self, jobs: Sequence[Job], address: str, stop: threading.Event, patience: Patience = PATIENCE) -> None:
        self._jobs, self._address, self._stop, self._patience = jobs, address, stop, patience
        self.streams = self.batch = self.least_batch = 1  # until an actor tells

    def __enter__(self) -> Self:
        self._reach()
        self._ray = _import_ray(local=self._address == "local")
        try:
            if self._address == "local":  # from this thread, since Ray ends with the one that started it
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
        """Take every frame through, in no order. See Worker.run."""
        job, absolute = self._jobs[0], [dataclasses.replace(frame, path=frame.path.absolute()) for frame in frames]
        bundle = dataclasses.replace(job.bundle, folder=job.bundle.folder.absolute())  # whose files each host checks for itself
        gpus = 0 if job.device.kind == "cpu" else int(self._ray.cluster_resources().get("GPU", 0))
        if job.device.kind != "cpu" and not gpus:
            raise VesselError(f"--ray {self._address}: the cluster has no GPU; take --devices cpu:N, or add hosts with one")
        actors = gpus or len(self._jobs)
        share = _rows(job, len(frames), actors)
        rows = self._ray.data.range(len(frames), override_num_blocks=-(-len(frames) // share))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # max_restarts, without which an actor that dies is started for ever, has no other way in yet
            entries = rows.map_batches(
                _Actor,
                fn_constructor_args=(dataclasses.replace(job, bundle=bundle, writer=job.writer.absolute()), absolute),
                compute=self._ray.data.ActorPoolStrategy(size=actors),
                batch_size=share,
                max_restarts=_RESTARTS,
                max_task_retries=_RESTARTS,
                # Before the actor's process begins: NumPy's threads would wait, spinning, on cores that the graphs need.
                runtime_env={"env_vars": {"OPENBLAS_NUM_THREADS": "1"}},
                **({"num_gpus": 1} if gpus else {"num_cpus": _CPUS}),
            )
        least: int | None = None
        for found in self._found(entries):
            self.streams, self.batch, now = (found.pop(key) for key in ("streams", "batch", "least_batch"))
            self.least_batch = least = min(least or now, now)
            yield Entry(**found)

    def _found(self, entries: Any) -> Iterator[dict[str, Any]]:
        """What the actors return, row by row, until `stop` is set. A thread waits for it, since Ray waits for a hung actor for ever."""
        rows: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_put_rows, args=(entries, rows), daemon=True).start()
        heard, slowest = time.monotonic(), None
        while not self._stop.is_set():
            try:
                row = rows.get(timeout=_TICK)
            except queue.Empty:
                if limit := self._patience.overdue(time.monotonic() - heard, slowest):
                    raise VesselError(f"--ray {self._address}: no progress for {limit:.0f} seconds; what is done is kept") from None
                continue
            now = time.monotonic()
            heard, slowest = now, max(slowest or 0.0, now - heard)
            if row is None:
                return
            if isinstance(row, self._ray.exceptions.RayError):
                raise VesselError(f"--ray {self._address}: {first_line(row)}; what is done is kept") from row
            if isinstance(row, BaseException):
                raise row
            found = json.loads(row["entry"])
            if "error_of_all" in found:
                raise VesselError(found["error_of_all"])
            yield found

    def _init(self, **more: Any) -> None:
        self._ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR, **more)

    def _connect(self) -> None:
        """Join the cluster, or raise what Ray raises, or VesselError if it takes too long: Ray itself may try for ten minutes."""
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
        """VesselError if nothing listens at the address, which Ray takes minutes to find out."""
        place = _host_and_port(self._address)
        if place:
            try:
                socket.create_connection(place, _REACHING).close()
            except OSError as e:
                mend = "give the HOST:PORT that `ray start --head` showed, or no address for a cluster on this host"
                raise VesselError(f"--ray {self._address}: nothing answers there ({e.strerror or e}); {mend}") from e

    def _check_loopback(self) -> None:
        if not ipaddress.ip_address(self._ray.util.get_node_ip_address()).is_loopback:
            self._ray.shutdown()
            raise VesselError(
                "--ray: Ray was imported before, so that it would listen on the network; start this run in a process of its own"
            )


class _Actor:
    """A Worker as Ray Data wants it: a class whose objects take a batch of rows and return one."""

    def __init__(self, job: Job, frames: Sequence[Frame]) -> None:
        die_with_parent()
        self._frames = frames
        if not job.show_names:
            for frame in frames:
                remember(frame.path, frame.code)
        open_device(job.device)
        self._worker = job.open(threading.Event(), lambda text: None)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[str]]:
        worker = self._worker
        try:
            entries = [dataclasses.asdict(entry) for entry in worker.run([self._frames[int(place)] for place in rows["id"]])]
            told = {"streams": worker.streams, "batch": worker.batch, "least_batch": worker.least_batch}
            found = [entry | told for entry in entries]
        except DeviceError as e:
            print(e, file=sys.stderr, flush=True)  # Ray's logs
            os._exit(1)  # for another actor to take over
        except VesselError as e:
            found = [{"error_of_all": str(e)}]
        except Exception:
            raise RuntimeError(conceal(traceback.format_exc())) from None  # Ray logs it
        return {"entry": [json.dumps(entry) for entry in found]}


def _import_ray(local: bool) -> Any:
    """Ray and its data part. What `local` needs is read from the environment, at the time of the import."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it is about Ray's own affairs, in the middle of the progress bar
    if local:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all its sockets on 127.0.0.1, on Linux, too
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray keeps one in ~/.ray
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
    """Frames of one task: whole rounds of an actor's batch x streams, fewer only where the actors would not all have some.

    The batch of a GPU is not known before an actor is there, unless it was given: then _ROUNDS x MOST_IMAGES are few partial batches.
    """
    batch = job.options.batch or (1 if job.device.kind == "cpu" else _ROUNDS * MOST_IMAGES)
    return max(1, min(batch * job.options.streams_on(job.device.kind, frames), -(-frames // actors)))


def _put_rows(entries: Any, rows: queue.SimpleQueue[Any]) -> None:
    """A thread's: what iterating over `entries` gives; then the error that ends it, or None."""
    try:
        for row in entries.iter_rows():
            rows.put(row)
        rows.put(None)
    except BaseException as e:
        rows.put(e)

"""The hosts of a Ray cluster at work on one run: Ray Data's `map_batches` over a pool of actors, each with a device and a bundle.

All hosts see the bundle, the inputs and the output folder under the same paths. Nothing but numbers goes through Ray's data: the frames'
files reach an actor when it is made, as an argument, which Ray does not log.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from vessel_rt.errors import VesselError, first_line
from vessel_rt.frames import Frame
from vessel_rt.outputs import Entry
from vessel_rt.privacy import conceal, remember
from vessel_rt.workers import Job

__all__ = ["RayWorkers"]

# Two actors of a whole CPU each leave none for what feeds them, and the run hangs (ray issue 44687).
_CPUS = 0.5
_RESTARTS = 2  # of an actor that dies, and of what it had in hand


class RayWorkers:
    """An actor for each of `jobs`, or, where these are for GPUs, for each GPU of the cluster; in all else like a Worker.

    Args:
        jobs: all alike but for their devices; on a GPU an actor sees only its own, as number 0.
        address: of a cluster, as `ray.init` takes it; `local` starts one on this host.
        stop: once it is set, no further entry is waited for.

    Raises:
        VesselError: Ray is not installed, the cluster cannot be reached or has no GPU; while running, a result cannot be written.
    """

    def __init__(self, jobs: Sequence[Job], address: str, stop: threading.Event) -> None:
        self._jobs, self._address, self._stop = jobs, address, stop
        self.streams = self.batch = self.least_batch = jobs[0].options.batch or 1

    def __enter__(self) -> Self:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it is about Ray's own affairs, in the middle of the progress bar
        try:
            import ray
            import ray.data
        except ModuleNotFoundError as e:
            raise VesselError("--ray needs Ray: pip install 'vessel-rt[ray]'") from e
        self._ray: Any = ray
        mine: dict[str, Any] = {"num_cpus": max(2, len(self._jobs)), "include_dashboard": False} if self._address == "local" else {}
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR, **mine)
        except (ConnectionError, ValueError, OSError, RuntimeError) as e:
            raise VesselError(f"--ray {self._address}: {first_line(e)}") from e
        ray.data.DataContext.get_current().enable_progress_bars = False
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
        at_once = 4 * (job.options.batch or 1)
        rows = self._ray.data.range(len(frames)).repartition(max(1, min(len(frames), 8 * actors)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # max_restarts, without which an actor that dies is started for ever, has no other way in yet
            entries = rows.map_batches(
                _Actor,
                fn_constructor_args=(dataclasses.replace(job, bundle=bundle, output=job.output.absolute()), absolute),
                compute=self._ray.data.ActorPoolStrategy(size=actors),
                batch_size=at_once,
                max_restarts=_RESTARTS,
                max_task_retries=_RESTARTS,
                **({"num_gpus": 1} if gpus else {"num_cpus": _CPUS}),
            )
        try:
            for row in entries.iter_rows():
                found = json.loads(row["entry"])
                if "error" in found:
                    raise VesselError(found["error"])
                self.least_batch = min(self.least_batch, found.pop("least_batch"))
                yield Entry(**found)
                if self._stop.is_set():
                    return
        except self._ray.exceptions.RayError as e:
            raise VesselError(f"--ray {self._address}: {first_line(e)}; what is done is kept") from e


class _Actor:
    """A Worker as Ray Data wants it: a class whose objects take a batch of rows and return one."""

    def __init__(self, job: Job, frames: Sequence[Frame]) -> None:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        self._frames = frames
        if not job.show_names:
            for frame in frames:
                remember(frame.path, frame.code)
        self._worker = job.open(threading.Event(), lambda text: None)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[str]]:
        try:
            entries = [dataclasses.asdict(entry) for entry in self._worker.run([self._frames[int(place)] for place in rows["id"]])]
            found = [entry | {"least_batch": self._worker.least_batch} for entry in entries]
        except VesselError as e:
            found = [{"error": str(e)}]
        except Exception:
            raise RuntimeError(conceal(traceback.format_exc())) from None  # Ray logs it
        return {"entry": [json.dumps(entry) for entry in found]}

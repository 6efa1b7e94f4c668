"""The memory that a check takes on its device, against the plan. Does not know what is run."""

from __future__ import annotations

from vessel_rt.check.record import Record
from vessel_rt.device.deployment import Deployment
from vessel_rt.device.host_memory import needed_memory
from vessel_rt.device.memory_plan import make_plan
from vessel_rt.measure.memory import MemoryWatch, size

__all__ = ["check_memory"]


def check_memory(record: Record, deployment: Deployment, watch: MemoryWatch) -> None:
    """The line `memory`: the peak since `watch` began, against what was planned for as many images at once as the deployment runs."""
    if watch.at_start is None:
        record.skipped("memory", "peak", str(watch.missing))
        return
    taken = max(watch.peak - watch.at_start, 0)
    with record.attempt("memory", "peak"):
        if deployment.device.kind == "cpu":
            planned = needed_memory(deployment.bundle)
            figure = size(taken) + ("" if planned is None else f" of {size(planned)} planned")
            short = watch.available is not None and taken > watch.available
            record.judged("memory", "peak", figure, "more than was available: the machine swaps, and is slow" if short else None)
            return
        plan = make_plan(deployment.bundle, deployment.batch, 0)
        fault = "more than planned: use a smaller --batch, and send check.json to whoever made the bundle" if taken > plan.total else None
        record.judged("memory", "peak", f"{size(taken)} of {size(plan.total)} planned for {deployment.batch} images at once", fault)

"""`vessel-rt devices`: every kind of device, whether it can be used here, and what is missing. Loads no graph."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence

from vessel_rt.device.cuda_driver import Gpu, list_gpus
from vessel_rt.device.deployment import deployment_fault
from vessel_rt.device.providers import PROVIDERS, Device, device_fault
from vessel_rt.errors import VesselError
from vessel_rt.formats.bundle import Bundle

__all__ = ["DeviceReport", "devices_json", "devices_table", "list_devices"]


@dataclasses.dataclass(frozen=True)
class DeviceReport:
    """A device, its GPU, and why it cannot be used (None if it can)."""

    device: Device
    gpu: Gpu | None
    fault: str | None


def list_devices(bundle: Bundle | None = None) -> list[DeviceReport]:
    """Every device here, and one entry for every kind that is missing. With `bundle`, whether the bundle runs on it."""
    return list(_reports(bundle))


def _reports(bundle: Bundle | None) -> Iterator[DeviceReport]:
    try:
        gpus: Sequence[Gpu] = list_gpus()
    except VesselError:  # the faults of the devices say so
        gpus = ()
    for kind in PROVIDERS:
        for gpu in (gpus or (None,)) if kind != "cpu" else (None,):
            device = Device(kind, gpu.index if gpu else 0)
            yield DeviceReport(device, gpu, deployment_fault(bundle, device) if bundle else device_fault(device))


def devices_table(reports: Sequence[DeviceReport]) -> str:
    """A line per device: its name for --device, its GPU, and `usable`, or why not and what to do."""
    rows = [(str(report.device), _gpu_text(report.gpu), report.fault or "usable") for report in reports]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{device:{widths[0]}}  {gpu:{widths[1]}}  {fault}" for device, gpu, fault in rows)


def _gpu_text(gpu: Gpu | None) -> str:
    return f"{gpu.name}, {gpu.architecture}, {gpu.memory / 2**30:.1f} GiB" if gpu else "-"


def devices_json(reports: Sequence[DeviceReport]) -> str:
    """The same as JSON: a list of objects with `device`, `usable`, `fault` and `gpu`."""
    entries = [
        {
            "device": str(report.device),
            "usable": report.fault is None,
            "fault": report.fault,
            "gpu": dataclasses.asdict(report.gpu) if report.gpu else None,
        }
        for report in reports
    ]
    return json.dumps(entries, indent=1)

from __future__ import annotations

import json

from vessel_rt.device.cuda_driver import Gpu
from vessel_rt.device.device_report import DeviceReport, devices_json, devices_table, list_devices
from vessel_rt.device.providers import PROVIDERS, Device
from vessel_rt.formats.bundle import Bundle


def test_every_kind_is_listed_and_the_cpu_is_usable(standin: Bundle) -> None:
    for reports in (list_devices(), list_devices(standin)):
        assert {report.device.kind for report in reports} == PROVIDERS.keys()
        assert reports[-1] == DeviceReport(Device("cpu"), None, None)
        assert all(report.fault and "\n" not in report.fault for report in reports if report.gpu is None and report.device.kind != "cpu")


def test_table_and_json_say_the_same() -> None:
    gpu = Gpu(1, "NVIDIA GeForce RTX 3090", "sm86", 24 << 30)
    reports = [
        DeviceReport(Device("cuda", 1), gpu, None),
        DeviceReport(Device("rtx"), None, "there is no driver"),
        DeviceReport(Device("cpu"), None, None),
    ]
    assert devices_table(reports).splitlines() == [
        "cuda:1  NVIDIA GeForce RTX 3090, sm86, 24.0 GiB  usable",
        "rtx:0   -                                        there is no driver",
        "cpu     -                                        usable",
    ]
    entries = json.loads(devices_json(reports))
    assert entries[0] == {
        "device": "cuda:1",
        "usable": True,
        "fault": None,
        "gpu": {"index": 1, "name": "NVIDIA GeForce RTX 3090", "architecture": "sm86", "memory": 24 << 30},
    }
    assert (entries[1]["usable"], entries[1]["fault"], entries[1]["gpu"]) == (False, "there is no driver", None)

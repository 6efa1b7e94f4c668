from __future__ import annotations

import sys

import pytest

from tests.support.fake_gpu import RTX_3090, install_gpu
from vessel_rt.device.nvml import GpuState, driver_version, gpu_monitor
from vessel_rt.errors import VesselError


def test_a_gpu_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    library = install_gpu(monkeypatch)
    read = gpu_monitor(0)
    assert read() == GpuState(1 << 30, RTX_3090.memory, 60, 1700, 300.0, False)
    library.used, library.reasons = 2 << 30, 32
    assert read() == GpuState(2 << 30, RTX_3090.memory, 60, 1700, 300.0, True)
    assert driver_version() == "580.65.06"


def test_what_a_gpu_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    library = install_gpu(monkeypatch)
    library.broken = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetTemperature")
    assert gpu_monitor(0)() == GpuState(1 << 30, RTX_3090.memory, None, 1700, None, None)


def test_a_library_that_fails_or_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = install_gpu(monkeypatch)
    read = gpu_monitor(0)
    library.broken = ("nvmlDeviceGetMemoryInfo", "nvmlSystemGetDriverVersion")
    with pytest.raises(VesselError, match="Not Supported"):
        read()
    assert driver_version() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(VesselError, match="pip install nvidia-ml-py"):
        gpu_monitor(0)
    assert driver_version() is None

"""The state of a GPU, as NVIDIA's management library tells it: memory in use, clock, temperature, power.

Needs the package nvidia-ml-py, which the extras gpu and rtx install. Does not know about ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from vessel_rt.device.cuda_driver import pci_bus
from vessel_rt.errors import VesselError, first_line

__all__ = ["GpuState", "driver_version", "gpu_monitor"]

_HEAT = ("nvmlClocksThrottleReasonHwSlowdown", "nvmlClocksThrottleReasonSwThermalSlowdown", "nvmlClocksThrottleReasonHwThermalSlowdown")


@dataclasses.dataclass(frozen=True)
class GpuState:
    """One reading. `used` and `total` memory are in bytes, and `used` is that of all processes.

    `celsius` is the temperature, `mhz` the clock of the multiprocessors, `watts` the power. `slowed`: heat or a failing supply lowers the
    clock. None: the GPU does not tell.
    """

    used: int
    total: int
    celsius: int | None
    mhz: int | None
    watts: float | None
    slowed: bool | None


def gpu_monitor(index: int) -> Callable[[], GpuState]:
    """A function that reads the state of GPU `index` (CUDA's number).

    Raises:
        VesselError: nvidia-ml-py is not installed, or the driver does not answer. The function raises it, too.
    """
    nvml, bus = _nvml(), pci_bus(index)
    handle = _asked(nvml, lambda: nvml.nvmlDeviceGetHandleByPciBusId(bus))

    def read() -> GpuState:
        memory = _asked(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        reasons = _told(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        milliwatts = _told(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return GpuState(
            used=int(memory.used),
            total=int(memory.total),
            celsius=_told(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            mhz=_told(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            watts=None if milliwatts is None else milliwatts / 1000,
            slowed=None if reasons is None else any(reasons & getattr(nvml, name) for name in _HEAT),
        )

    return read


def driver_version() -> str | None:
    """The version of NVIDIA's driver, such as `580.65.06`; None if it cannot be asked."""
    try:
        nvml = _nvml()
        version = _asked(nvml, nvml.nvmlSystemGetDriverVersion)
    except VesselError:
        return None
    return version.decode("ascii", "replace") if isinstance(version, bytes) else str(version)


def _nvml() -> Any:
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        raise VesselError("nvidia-ml-py is not installed: pip install nvidia-ml-py") from None
    _asked(nvml, nvml.nvmlInit)
    return nvml


def _asked(nvml: Any, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except nvml.NVMLError as e:
        raise VesselError(f"NVIDIA's management library fails ({first_line(e)}): nvidia-smi may say why") from e


def _told(nvml: Any, call: Callable[[], Any]) -> Any:
    """What the GPU says; None if it does not tell: many notebooks do not."""
    try:
        return call()
    except nvml.NVMLError:
        return None

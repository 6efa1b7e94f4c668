"""A GPU that is not there: the CPU under the name of a card, with a management library that tells what it is told to."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest

from vessel_rt.check import check, machine, speed
from vessel_rt.device import cuda_driver, deployment, nvml, providers, session
from vessel_rt.device.cuda_driver import Gpu
from vessel_rt.device.providers import PROVIDERS
from vessel_rt.measure import machine as measure_machine

RTX_3090 = Gpu(0, "NVIDIA GeForce RTX 3090", "sm86", 24 << 30)


class NvmlError(Exception):
    """What the library raises."""


@dataclasses.dataclass
class FakeNvml:
    """What the management library tells: bytes in use, and so on. `broken` names calls that fail."""

    used: int = 1 << 30
    celsius: int = 60
    mhz: int = 1700
    milliwatts: int = 300_000
    reasons: int = 0
    broken: tuple[str, ...] = ()

    def module(self) -> Any:
        """A stand-in for the module pynvml."""
        found = types.ModuleType("pynvml")
        calls = {
            "nvmlInit": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: "580.65.06",
            "nvmlDeviceGetHandleByPciBusId": lambda bus: bus,
            "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(used=self.used, total=RTX_3090.memory),
            "nvmlDeviceGetTemperature": lambda handle, sensor: self.celsius,
            "nvmlDeviceGetClockInfo": lambda handle, clock: self.mhz,
            "nvmlDeviceGetPowerUsage": lambda handle: self.milliwatts,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: self.reasons,
        }
        for name, call in calls.items():
            setattr(found, name, self._or_fail(name, call))
        constants = {"NVML_TEMPERATURE_GPU": 0, "NVML_CLOCK_SM": 1, "NVMLError": NvmlError}
        constants |= {"nvmlClocksThrottleReasonHwSlowdown": 8, "nvmlClocksThrottleReasonSwThermalSlowdown": 32}
        constants |= {"nvmlClocksThrottleReasonHwThermalSlowdown": 64}
        for name, value in constants.items():
            setattr(found, name, value)
        return found

    def _or_fail(self, name: str, call: Any) -> Any:
        def called(*arguments: Any) -> Any:
            if name in self.broken:
                raise NvmlError("Not Supported")
            return call(*arguments)

        return called


def install_gpu(patch: pytest.MonkeyPatch, *, on_the_cpu: bool = False) -> FakeNvml:
    """Let `cuda` be the CPU's kernels under the name of an RTX 3090. With `on_the_cpu`, ONNX Runtime says that they are the CPU's."""
    for module in (cuda_driver, deployment, providers, check, machine, speed, measure_machine):
        patch.setattr(module, "list_gpus", lambda: (RTX_3090,))
    patch.setattr(machine, "driver_cuda", lambda: (13, 0))
    patch.setattr(nvml, "pci_bus", lambda index: "0000:01:00.0")
    cpu = PROVIDERS["cpu"]
    patch.setitem(
        PROVIDERS, "cuda", dataclasses.replace(PROVIDERS["cuda"], name=cpu.name, memory="cpu", probe=cpu.probe, choose=cpu.choose)
    )
    if not on_the_cpu:
        real = session._placement
        patch.setattr(session, "_placement", lambda loaded: {"CUDAExecutionProvider": real(loaded)[cpu.name]})
    library = FakeNvml()
    patch.setitem(sys.modules, "pynvml", library.module())
    return library

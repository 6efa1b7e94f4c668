"""The machine: its GPUs, memory and libraries, against what the runtime needs. Loads no graph."""

from __future__ import annotations

import importlib.metadata
import platform
import re

import vessel_rt
from vessel_rt.check.record import Record
from vessel_rt.device.cuda_driver import driver_cuda, list_gpus
from vessel_rt.device.host_memory import available_memory
from vessel_rt.device.nvml import driver_version, gpu_monitor
from vessel_rt.device.providers import Device, onnxruntime
from vessel_rt.errors import VesselError
from vessel_rt.measure.machine import describe_machine

__all__ = ["check_gpu", "check_machine"]

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # they install the same files
_GIB = 2**30


def check_machine(record: Record) -> None:
    """The lines `software` and `cpu`, and the facts of check.json."""
    record.machine = facts = describe_machine()
    with record.attempt("machine", "software"):
        figure = f"vessel-rt {vessel_rt.__version__}, onnxruntime {onnxruntime().__version__}, Python {platform.python_version()}"
        record.judged("machine", "software", figure, _software_fault(facts.versions))
    parts = [f"{facts.cores} cores", " ".join(facts.features)]
    free = available_memory()
    if facts.memory_bytes is not None and free is not None:
        parts.append(f"{free / _GIB:.1f} of {facts.memory_bytes / _GIB:.1f} GiB memory free")
    record.passed("machine", "cpu", ", ".join(filter(None, parts)))


def check_gpu(record: Record, device: Device) -> None:
    """The line `gpu` of a device that works."""
    if device.kind == "cpu":
        record.skipped("machine", "gpu", "the device is the CPU")
        return
    with record.attempt("machine", "gpu"):
        gpu, cuda = list_gpus()[device.index], driver_cuda()
        try:
            state = gpu_monitor(device.index)()
            memory = f"{(state.total - state.used) / _GIB:.1f} of {state.total / _GIB:.1f} GiB free"
        except VesselError:
            memory = f"{gpu.memory / _GIB:.1f} GiB"
        driver = f"driver {driver_version() or 'of an unknown version'} (CUDA {cuda[0]}.{cuda[1]})"
        record.judged("machine", "gpu", f"{gpu.name}, {gpu.architecture}, {memory}, {driver}", _driver_fault(device, cuda))


def _driver_fault(device: Device, cuda: tuple[int, int]) -> str | None:
    """Why the driver cannot run the CUDA that ONNX Runtime was built with; a driver runs every minor version of its CUDA."""
    built = str(getattr(onnxruntime(), "cuda_version", "") or "")
    major = re.match(r"\d+", built)
    if device.kind == "rtx" or major is None or int(major[0]) <= cuda[0]:
        return None
    return f"onnxruntime needs CUDA {built}, and the driver runs {cuda[0]}.{cuda[1]} at most: install a newer driver"


def _software_fault(versions: dict[str, str]) -> str | None:
    """What is wrong with the installed packages."""
    if all(name in versions for name in _RUNTIMES):
        return (
            "onnxruntime and onnxruntime-gpu overwrite each other: pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them"
        )
    needed, found = _needed_runtime(), onnxruntime().__version__
    if needed and _numbers(found) < _numbers(needed):
        return f"onnxruntime {found} is older than {needed}: pip install --upgrade onnxruntime, or onnxruntime-gpu if that is installed"
    return None


def _needed_runtime() -> str | None:
    """The oldest version of ONNX Runtime that the package's own metadata admits."""
    try:
        requirements = importlib.metadata.requires("vessel-rt") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [re.match(r"onnxruntime(?:-gpu)?\b[^;]*>=\s*([\d.]+)", requirement) for requirement in requirements]
    return next((match[1] for match in found if match), None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))

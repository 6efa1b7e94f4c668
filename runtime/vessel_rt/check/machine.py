"""The machine: its processor, GPUs, memory and libraries, against what the runtime needs. Loads no graph."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import vessel_rt
from vessel_rt.check.record import Record
from vessel_rt.check.schema import MachineFacts, MachineGpu
from vessel_rt.device.cuda_driver import Gpu, driver_cuda, list_gpus
from vessel_rt.device.host_memory import available_memory, total_memory
from vessel_rt.device.nvml import driver_version, gpu_monitor
from vessel_rt.device.providers import Device, onnxruntime
from vessel_rt.errors import VesselError
from vessel_rt.formats.engine_sidecar import builder_version

__all__ = ["check_gpu", "check_machine"]

_CPUINFO = Path("/proc/cpuinfo")
_FEATURES = re.compile(r"avx2|fma|f16c|avx512f|avx_vnni|avx512_(?:vnni|bf16|fp16)|amx_\w+|asimd\w*|sve2?|i8mm|bf16")
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # they install the same files
# The packages that bring what ONNX Runtime's providers load: CUDA, cuDNN, TensorRT, TensorRT-RTX.
_LIBRARIES = re.compile(r"onnxruntime[\w-]*|nvidia-[\w-]+|tensorrt[\w-]*|numpy|pillow|tokenizers|safetensors")
_GIB = 2**30


def check_machine(record: Record) -> None:
    """The lines `software` and `cpu`, and the facts of check.json."""
    versions = _versions()
    try:
        gpus: Sequence[Gpu] = list_gpus()
    except VesselError:  # a device that needs one says so
        gpus = ()
    cpu, features = _processor()
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    memory, free = total_memory(), available_memory()
    record.machine = MachineFacts(
        system=f"{platform.system()} {platform.machine()}",
        cpu=cpu,
        cores=cores,
        features=features,
        memory_bytes=memory,
        gpus=tuple(MachineGpu(gpu.name, gpu.architecture, gpu.memory) for gpu in gpus),
        driver=driver_version() if gpus else None,
        versions=versions,
    )
    with record.attempt("machine", "software"):
        figure = f"vessel-rt {vessel_rt.__version__}, onnxruntime {onnxruntime().__version__}, Python {platform.python_version()}"
        record.judged("machine", "software", figure, _software_fault(versions))
    parts = [f"{cores} cores", " ".join(features)]
    if memory is not None and free is not None:
        parts.append(f"{free / _GIB:.1f} of {memory / _GIB:.1f} GiB memory free")
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


def _versions() -> dict[str, str]:
    """What is installed, by name; of TensorRT-RTX also the version of the library itself."""
    installed = {str(each.metadata["Name"]).lower(): each.version for each in importlib.metadata.distributions() if each.metadata["Name"]}
    found = {name: version for name, version in sorted(installed.items()) if _LIBRARIES.fullmatch(name)}
    library = builder_version("rtx")
    return {
        "vessel-rt": vessel_rt.__version__,
        "python": platform.python_version(),
        **found,
        **({"tensorrt-rtx": library} if library else {}),
    }


def _processor() -> tuple[str | None, tuple[str, ...]]:
    """The processor's name and the instruction sets that matter, where Linux tells."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None, ()
    fields: dict[str, str] = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    flags = fields.get("flags", fields.get("Features", "")).split()
    return fields.get("model name") or None, tuple(sorted(flag for flag in flags if _FEATURES.fullmatch(flag)))

"""The machine: its processor, GPUs, memory and libraries. Has no names of hosts, users or folders. Loads no graph."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import vessel_rt
from vessel_rt.device.cuda_driver import Gpu, list_gpus
from vessel_rt.device.host_memory import total_memory
from vessel_rt.device.nvml import driver_version
from vessel_rt.errors import VesselError
from vessel_rt.formats.engine_sidecar import builder_version
from vessel_rt.measure.schema import MachineFacts, MachineGpu

__all__ = ["describe_machine"]

_CPUINFO = Path("/proc/cpuinfo")
_FEATURES = re.compile(r"avx2|fma|f16c|avx512f|avx_vnni|avx512_(?:vnni|bf16|fp16)|amx_\w+|asimd\w*|sve2?|i8mm|bf16")
# The packages that bring what ONNX Runtime's providers load: CUDA, cuDNN, TensorRT, TensorRT-RTX.
_LIBRARIES = re.compile(r"onnxruntime[\w-]*|nvidia-[\w-]+|tensorrt[\w-]*|numpy|pillow|tokenizers|safetensors")


def describe_machine() -> MachineFacts:
    """The machine and its libraries, as far as they tell."""
    try:
        gpus: Sequence[Gpu] = list_gpus()
    except VesselError:  # a device that needs one says so
        gpus = ()
    cpu, features = _processor()
    return MachineFacts(
        system=f"{platform.system()} {platform.machine()}",
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        features=features,
        memory_bytes=total_memory(),
        gpus=tuple(MachineGpu(gpu.name, gpu.architecture, gpu.memory) for gpu in gpus),
        driver=driver_version() if gpus else None,
        versions=_versions(),
    )


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

"""Whether a bundle fits in the memory of the host, for runs on a CPU. Does not load anything.

Without this check, Linux kills the process in the middle of loading, without a message.
"""

from __future__ import annotations

from pathlib import Path

from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle import Bundle

__all__ = ["anonymous_memory", "available_memory", "needed_memory", "require_memory", "stage_memory", "total_memory"]

_MEMINFO, _STATUS = Path("/proc/meminfo"), Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup")  # of a container: the root of its own hierarchy (cgroup v2)

# Anonymous memory that ONNX Runtime takes, over the bytes of the weights. It copies the matrices to the layout of its kernels and has no
# FP16 kernels for a CPU, so FP16 becomes FP32. Measured with the language model of the 8B model: INT8 1.17; FP16 is killed on 24 GiB.
_FACTORS = {"fp32": 1.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.15, "int4": 1.15}
_GB = 1e9


def needed_memory(bundle: Bundle) -> int:
    """The least memory, in bytes, that the weights of `bundle` take on a CPU. Activations and the KV cache come on top of it."""
    return sum(stage_memory(bundle, name) for name in bundle.stages)


def stage_memory(bundle: Bundle, stage: str) -> int:
    """The part of `needed_memory` that the weights of `stage` take."""
    quantized = bundle.quantization.matrices if bundle.quantization else {}
    return int(_FACTORS[bundle.weights if stage in quantized else bundle.precision] * bundle.weight_bytes(stage))


def total_memory() -> int | None:
    """The memory of the host in bytes, without swap; None if the system does not tell."""
    return _kilobytes(_MEMINFO, "MemTotal")


def anonymous_memory() -> int | None:
    """The memory of this process in bytes, without files that are mapped: the system cannot take it back. None if it does not tell."""
    return _kilobytes(_STATUS, "RssAnon")


def _kilobytes(path: Path, field: str) -> int | None:
    try:
        line = next(line for line in path.read_text(encoding="ascii").splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None


def available_memory() -> int | None:
    """Bytes of memory and swap that this process can still take, within the limit of its container; None if the system does not tell."""
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="ascii").splitlines())
        free = sum(int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = ((_CGROUP / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or no limit: memory.max is `max`
        return free


def require_memory(bundle: Bundle, processes: int = 1) -> None:
    """Raise BundleError if the weights of `bundle` do not fit in the memory of the host, once for each process."""
    needed, free = processes * needed_memory(bundle), available_memory()
    if free is None or needed <= free:
        return
    advice = "use a GPU, or a machine with more memory"
    if processes > 1:
        advice = f"use fewer processes (--devices), {advice}"
    elif not bundle.quantization:
        advice = f"export it with --recipe cpu-int8, {advice}"
    raise BundleError(
        f"{bundle.folder}: needs at least {needed / _GB:.1f} GB of memory on a CPU; {free / _GB:.1f} GB are available: {advice}"
    )

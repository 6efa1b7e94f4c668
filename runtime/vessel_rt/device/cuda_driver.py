"""NVIDIA's GPUs, as CUDA's driver lists them: name, compute capability, memory. Does not know about ONNX Runtime."""

from __future__ import annotations

import ctypes
import dataclasses
import sys

from vessel_rt.errors import VesselError

__all__ = ["MENDS", "Gpu", "driver_cuda", "list_gpus", "pci_bus"]

# What mends errors of CUDA, by their numbers, which are the same in the driver and in the CUDA runtime.
MENDS = {
    2: "end other programs on the GPU (nvidia-smi lists them)",
    35: "NVIDIA's driver is too old: install the newest one for the GPU",
    46: "another program has the GPU to itself (nvidia-smi lists them), or its compute mode forbids programs (nvidia-smi -c 0 as root)",
    100: "if there is one, CUDA_VISIBLE_DEVICES may hide it",
    209: "this onnxruntime-gpu has no kernels for the GPU, which is too old or too new for it",
    803: "NVIDIA's driver was updated: restart the machine",
}

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU: its number in CUDA's order, its name, its compute capability as in `sm86`, its total memory in bytes."""

    index: int
    name: str
    architecture: str
    memory: int


def list_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA sees, at least one.

    Raises:
        VesselError: there is no driver or no GPU, or the driver fails.
    """
    cuda = _driver()
    code = cuda.cuInit(0)
    count = ctypes.c_int()
    if code == 0:
        code = cuda.cuDeviceGetCount(ctypes.byref(count))
    if code == _NO_DEVICE or (code == 0 and count.value == 0):
        raise VesselError(f"NVIDIA's driver sees no GPU here; {MENDS[_NO_DEVICE]}")
    if code:
        raise VesselError(f"NVIDIA's driver fails (CUDA error {code}): {MENDS.get(code, 'nvidia-smi may say why')}")
    return tuple(_gpu(cuda, index) for index in range(count.value))


def driver_cuda() -> tuple[int, int]:
    """The newest version of CUDA that the driver runs, such as (13, 0). Raises VesselError if there is no driver."""
    version = ctypes.c_int()
    if code := _driver().cuDriverGetVersion(ctypes.byref(version)):
        raise VesselError(f"NVIDIA's driver does not tell its version (CUDA error {code}): nvidia-smi may say why")
    return version.value // 1000, version.value % 1000 // 10


def pci_bus(index: int) -> str:
    """Where GPU `index` of `list_gpus` is on the PCI bus, such as `0000:01:00.0`: CUDA and NVML number GPUs differently.

    Raises:
        VesselError: there is no driver, or no such GPU.
    """
    cuda, device, text = _driver(), ctypes.c_int(), ctypes.create_string_buffer(32)
    codes = (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), index),
        cuda.cuDeviceGetPCIBusId(text, len(text), device),
    )
    if any(codes):
        raise VesselError(f"NVIDIA's driver does not describe GPU {index} (CUDA errors {codes}): nvidia-smi may say why")
    return text.value.decode("ascii", "replace")


def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        raise VesselError(f"there is no NVIDIA driver here ({_LIBRARY} is missing): install it if there is a GPU") from None


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    codes = (
        cuda.cuDeviceGet(ctypes.byref(device), index),
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
    )
    if any(codes):
        raise VesselError(f"NVIDIA's driver does not describe GPU {index} (CUDA errors {codes}): nvidia-smi may say why")
    return Gpu(index, name.value.decode("utf-8", "replace"), f"sm{major.value}{minor.value}", memory.value)

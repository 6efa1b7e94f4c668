"""The kinds of devices that ONNX Runtime runs graphs on: what each needs, and whether it works here.

The one module that imports onnxruntime. Does not know about graphs or bundles. A new kind of device is a new row of PROVIDERS.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vessel_rt.device.cuda_driver import MENDS, list_gpus
from vessel_rt.errors import VesselError, first_line
from vessel_rt.formats.engine_sidecar import packed_cuda_runtime
from vessel_rt.formats.profiles import Profile

__all__ = ["PROVIDERS", "Device", "EngineCache", "ExecutionProvider", "device_fault", "failure", "onnxruntime", "open_device"]

_INSTALL_GPU = "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'vessel-rt[gpu]'"  # each has removed files of the other

_CUDNN = "cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9"
_FAILURE = re.compile(r"(CUDA|CUBLAS|CUDNN|CUFFT) failure (-?\d+): (.*?) ; GPU=")
_UNLOADED = re.compile(r"^Failed to load (?:.*[/\\])?([\w.-]+): (.*)", re.MULTILINE)  # what preload_dlls prints


@dataclasses.dataclass(frozen=True)
class EngineCache:
    """Where ONNX Runtime saves what it compiles at run time, and the shapes to compile for.

    `tensorrt` saves engines; `rtx` saves kernels that its engines leave to be compiled for the GPU at hand. The folder must exist and
    belong to one bundle: an engine is found by its graph's nodes, which two bundles share, and not by its weights.
    """

    folder: Path
    profile: Profile


@dataclasses.dataclass(frozen=True)
class ExecutionProvider:
    """What runs on a kind of device.

    `name` is ONNX Runtime's name, `package` what installs it (None: it is built into ONNX Runtime), `install` how to get it. `memory` is
    ONNX Runtime's name for the memory there. `probe` raises an error that says why a device is not usable. `choose` sets the options of a
    session for a device, and returns what to pass as its `providers`.
    """

    name: str
    package: str | None
    install: str
    memory: str
    probe: Callable[[Device], None]
    choose: Callable[[Any, Device, EngineCache | None], Sequence[tuple[str, dict[str, str]]] | None]

    @property
    def installed(self) -> bool:
        """Whether it is installed. A driver or a library may still be missing."""
        return bool(importlib.util.find_spec(self.package)) if self.package else self.name in onnxruntime().get_available_providers()


@dataclasses.dataclass(frozen=True)
class Device:
    """Where graphs run: a key of PROVIDERS, or `auto` or `gpu` until one is chosen, and the number of the GPU."""

    kind: str
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Device:
        """`auto`, `cpu`, or `cuda`, `rtx` or `tensorrt`, optionally with `:N`, as a Device; ValueError says what is valid."""
        match = re.fullmatch(r"([a-z]+)(?::(\d+))?", text)
        if not match or match[1] not in ("auto", *PROVIDERS) or (match[2] and match[1] in ("auto", "cpu")):
            raise ValueError(f"{text!r} is not a device: use auto, cpu, or one of cuda, rtx, tensorrt, with :N for GPU number N")
        return cls(match[1], int(match[2] or 0))

    @classmethod
    def parse_several(cls, text: str) -> tuple[Device, ...]:
        """`0,1,2,3` as those GPUs, `cpu:2` as the CPU for two processes, `cuda:0,cuda:1` as Devices; ValueError says what is valid."""
        devices: list[Device] = []
        for part in text.split(","):
            if part.isdecimal():
                devices.append(cls("gpu", int(part)))
            elif match := re.fullmatch(r"cpu:([1-9]\d{0,2})", part):
                devices.extend([cls("cpu")] * int(match[1]))
            else:
                devices.append(cls.parse(part))
        if len({device.kind for device in devices}) > 1 or (devices[0].kind != "cpu" and len(set(devices)) < len(devices)):
            raise ValueError(f"{text!r}: use one kind of device, and each GPU once, such as 0,1,2,3 or cuda:0,cuda:1 or cpu:2")
        return tuple(devices)

    def __str__(self) -> str:
        return self.kind if self.kind in ("auto", "cpu") else f"{self.kind}:{self.index}"


def onnxruntime() -> Any:
    """The onnxruntime module, imported on first use, with its telemetry off. Nothing else imports it.

    The user chooses which of its packages to install. A program that imports onnxruntime before vessel_rt has to set
    ORT_DISABLE_TELEMETRY=1 itself: the library reads it once, when it is loaded.

    Raises:
        VesselError: none is installed.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # disable_telemetry_events() is too late: the library has started by then
    try:
        import onnxruntime
    except ModuleNotFoundError as e:
        raise VesselError(
            "onnxruntime is not installed: choose one of pip install 'vessel-rt[cpu]', 'vessel-rt[gpu]', 'vessel-rt[rtx]'"
        ) from e
    if not hasattr(onnxruntime, "InferenceSession"):  # the remains of a folder, after one of two packages was removed
        raise VesselError(
            "onnxruntime is incomplete: pip uninstall onnxruntime onnxruntime-gpu, then pip install one of 'vessel-rt[cpu]', "
            "'vessel-rt[gpu]', 'vessel-rt[rtx]'"
        )
    return onnxruntime


def failure(error: BaseException) -> str:
    """What an error of ONNX Runtime says in one line: CUDA's words and what mends them, without the C++ and the host's name around them."""
    if found := _FAILURE.search(str(error)):
        library, code, words = found.groups()
        mend = MENDS.get(int(code)) if library == "CUDA" else None
        return f"{library} error {code}, {words}" + (f": {mend}" if mend else "")
    if found := re.search(r"Failed to allocate memory for requested buffer of size \d+", str(error)):
        return found[0]
    return first_line(error)


def _probe_cpu(device: Device) -> None:
    """Always usable."""


def _probe_cuda(device: Device) -> None:
    """Load CUDA's and cuDNN's libraries from where pip puts them, then allocate a value.

    ONNX Runtime prints which libraries of CUDA it does not find. It looks for cuDNN's when the first convolution runs.
    """
    ort = onnxruntime()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        ort.preload_dlls()
    unloaded = _UNLOADED.findall(said.getvalue())
    try:
        _allocate_a_value(device)
        ctypes.CDLL(_CUDNN)
    except Exception as e:  # ONNX Runtime's errors share no base class
        if isinstance(e, OSError):
            unloaded = [(_CUDNN, str(e))]
        if _FAILURE.search(str(e)) or not unloaded:
            raise
        name, why = unloaded[0]
        what = f"{name} is missing" if "No such file" in why or "Could not find" in why else f"{name} cannot be loaded ({why})"
        needed = f"onnxruntime-gpu {ort.__version__} needs CUDA {ort.cuda_version} and cuDNN 9"
        raise VesselError(f"{what}; {needed}: {_INSTALL_GPU}") from e


def _probe_tensorrt(device: Device) -> None:
    """As for CUDA, then let ONNX Runtime load TensorRT, as it does before it makes a session."""
    _probe_cuda(device)
    with contextlib.suppress(ImportError):
        import tensorrt  # noqa: F401  # loads its libraries from where pip puts them
    ort = onnxruntime()
    ort.capi.onnxruntime_pybind11_state.register_tensorrt_plugins_as_custom_ops(ort.SessionOptions(), {})


def _probe_rtx(device: Device) -> None:
    """TensorRT-RTX is a separate library, which is registered with ONNX Runtime once per process."""
    ort = onnxruntime()  # before the provider's package, which would import it with its telemetry on
    import onnxruntime_ep_nv_tensorrt_rtx as rtx

    if rtx.get_ep_name() not in ort.get_available_providers():
        try:
            for library in packed_cuda_runtime(Path(rtx.get_library_path())):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            ort.register_execution_provider_library(rtx.get_ep_name(), rtx.get_library_path())
        except Exception as e:  # ONNX Runtime's errors share no base class
            raise RuntimeError(first_line(e).rpartition("with error: ")[2]) from e
    _rtx_device(device.index)
    _allocate_a_value(device)


def _allocate_a_value(device: Device) -> None:
    onnxruntime().OrtValue.ortvalue_from_shape_and_type((1,), np.float32, PROVIDERS[device.kind].memory, device.index)


def _choose_cpu(options: Any, device: Device, cache: EngineCache | None) -> Sequence[tuple[str, dict[str, str]]]:
    return [(PROVIDERS["cpu"].name, {})]


def _choose_cuda(options: Any, device: Device, cache: EngineCache | None) -> Sequence[tuple[str, dict[str, str]]]:
    return [(PROVIDERS["cuda"].name, {"device_id": str(device.index)})]


def _choose_tensorrt(options: Any, device: Device, cache: EngineCache | None) -> Sequence[tuple[str, dict[str, str]]]:
    """Strongly typed, since no precision is enabled: the graph's own types decide. CUDA runs what TensorRT does not."""
    settings = {"device_id": str(device.index)}
    if cache:
        for key in ("trt_engine_cache", "trt_timing_cache"):
            settings |= {f"{key}_enable": "1", f"{key}_path": str(cache.folder)}
        settings |= cache.profile.options("trt_profile")
    return [(PROVIDERS["tensorrt"].name, settings), *_choose_cuda(options, device, cache)]


def _choose_rtx(options: Any, device: Device, cache: EngineCache | None) -> None:
    """Only engines that were built before: none is built here, and no node is left to the CPU."""
    options.add_provider_for_devices([_rtx_device(device.index)], {"nv_runtime_cache_path": str(cache.folder)} if cache else {})
    options.add_session_config_entry("session.disable_model_compile", "1")
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")


def _rtx_device(index: int) -> Any:
    """The provider's device whose memory is that of GPU `index`; VesselError if it lists none."""
    ort = onnxruntime()
    for found in ort.get_ep_devices():
        if found.ep_name == PROVIDERS["rtx"].name and found.memory_info(ort.OrtDeviceMemoryType.DEFAULT).device_id == index:
            return found
    raise VesselError("TensorRT-RTX does not run on this GPU, only on RTX 30 and later: take --device cuda")


PROVIDERS = {
    "rtx": ExecutionProvider(
        "NvTensorRTRTXExecutionProvider", "onnxruntime_ep_nv_tensorrt_rtx", "pip install 'vessel-rt[rtx]'", "cuda", _probe_rtx, _choose_rtx
    ),
    "tensorrt": ExecutionProvider(
        "TensorrtExecutionProvider",
        None,
        f"{_INSTALL_GPU}, and NVIDIA's TensorRT 10",
        "cuda",
        _probe_tensorrt,
        _choose_tensorrt,
    ),
    "cuda": ExecutionProvider("CUDAExecutionProvider", None, _INSTALL_GPU, "cuda", _probe_cuda, _choose_cuda),
    "cpu": ExecutionProvider("CPUExecutionProvider", None, "pip install 'vessel-rt[cpu]'", "cpu", _probe_cpu, _choose_cpu),
}


def open_device(wanted: Device) -> Device:
    """Prove that `wanted` works, load its libraries into this process, and return it.

    Raises:
        VesselError: it cannot be used; no other device is used instead.
    """
    fault = device_fault(wanted)
    if fault:
        raise VesselError(f"--device {wanted}: {fault}")
    return wanted


def device_fault(device: Device) -> str | None:
    """Why graphs cannot run on `device`, and what to do; None if they can."""
    ort, provider = onnxruntime(), PROVIDERS[device.kind]
    faults = []
    if device.kind != "cpu":
        try:
            if device.index >= len(list_gpus()):
                faults.append(f"there is no GPU {device.index} here")
        except VesselError as e:
            faults.append(str(e))
    if not provider.installed:
        why = "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other; " if _both_installed() else ""
        faults.append(f"{why}{provider.name} is not installed: {provider.install}")
    if faults:
        return "; ".join(faults)
    ort.set_default_logger_severity(4)  # otherwise ONNX Runtime prints pages about what is probed here
    try:
        provider.probe(device)
    except VesselError as e:
        return str(e)
    except Exception as e:  # ONNX Runtime's errors share no base class
        return failure(e) if _FAILURE.search(str(e)) else f"{failure(e)}: {provider.install}, or a newer driver"
    finally:
        ort.set_default_logger_severity(3)  # errors: each session would warn that CUDA is not a plugin
    return None


def _both_installed() -> bool:
    return {"onnxruntime", "onnxruntime-gpu"} <= {found.name for found in importlib.metadata.distributions()}

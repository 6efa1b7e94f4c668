"""The one seam between the pipeline and ONNX Runtime: named arrays in, named arrays out, on any provider.

Knows nothing of images, tokens or bundles. A new kind of device is a new row of PROVIDERS.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import io
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from vessel_rt.device.cuda_driver import list_gpus
from vessel_rt.errors import GraphError, OutOfMemory, VesselError, first_line
from vessel_rt.formats.engine_sidecar import packed_cuda_runtime
from vessel_rt.formats.profiles import Profile

if TYPE_CHECKING:
    from onnxruntime import OrtValue

__all__ = ["PROVIDERS", "Device", "EngineCache", "Provider", "Session", "Value", "device_fault", "onnxruntime", "open_device"]

Value: TypeAlias = "npt.NDArray[Any] | OrtValue"

# TensorProto's numbers, for values of types that NumPy may not have; and a type of the same size that it has.
_ONNX_TYPES = {"float32": (1, np.uint32), "float16": (10, np.uint16), "bfloat16": (16, np.uint16)}

# ONNX Runtime's names of types, and a TensorSpec's.
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16", "tensor(int64)": "int64"}

# Operators that on the CPU would make a GPU wait: ONNX Runtime places shape arithmetic there by design, these for want of a kernel.
_HEAVY = frozenset({"Attention", "Conv", "ConvTranspose", "Gemm", "LayerNormalization", "MatMul", "RotaryEmbedding", "TensorScatter"})

# What ONNX Runtime's arenas, CUDA and TensorRT say when there is none left.
_OUT_OF_MEMORY = re.compile(r"allocate memory|out of memory|bad_alloc|ALLOC_FAILED|BFCArena", re.IGNORECASE)

# What a plain RuntimeError of ONNX Runtime's bindings says when it is the device's; other ones are bugs.
_OF_THE_DEVICE = re.compile(r"CUDA|CUDNN|CUBLAS|TensorRT", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class EngineCache:
    """Where ONNX Runtime keeps what it compiles at run time, and the shapes to compile for.

    For `tensorrt` that is engines, for `rtx` the kernels that its engines leave to be compiled for the GPU at hand. The folder must be
    there, and of one bundle: an engine is found in it by its graph's nodes, which two bundles share, and not by weights.
    """

    folder: Path
    profile: Profile


@dataclasses.dataclass(frozen=True)
class Provider:
    """What runs on a kind of device.

    `name` is ONNX Runtime's, `package` what installs it (None: ONNX Runtime was built with it), `install` how to come by it. `memory` is
    ONNX Runtime's name for the memory there. `probe` proves a device usable, by an error that says why it is not. `choose` sets the options
    of a session for a device, and returns what to pass as its `providers`.
    """

    name: str
    package: str | None
    install: str
    memory: str
    probe: Callable[[Device], None]
    choose: Callable[[Any, Device, EngineCache | None], Sequence[tuple[str, dict[str, str]]] | None]

    @property
    def installed(self) -> bool:
        """Whether it is there; it may lack a driver or a library all the same."""
        return bool(importlib.util.find_spec(self.package)) if self.package else self.name in onnxruntime().get_available_providers()


@dataclasses.dataclass(frozen=True)
class Device:
    """Where graphs run: a key of PROVIDERS, or `auto` or `gpu` until one is chosen, and which of several alike."""

    kind: str
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Device:
        """`auto`, `cpu`, or `cuda`, `rtx` or `tensorrt`, perhaps with `:N`, as a Device; ValueError says what would do."""
        match = re.fullmatch(r"([a-z]+)(?::(\d+))?", text)
        if not match or match[1] not in ("auto", *PROVIDERS) or (match[2] and match[1] in ("auto", "cpu")):
            raise ValueError(f"{text!r} is not a device: take auto, cpu, or one of cuda, rtx, tensorrt, with :N for the GPU of that number")
        return cls(match[1], int(match[2] or 0))

    @classmethod
    def parse_several(cls, text: str) -> tuple[Device, ...]:
        """`0,1,2,3` as those GPUs, `cpu:2` as the CPU for two processes, `cuda:0,cuda:1` as Devices; ValueError says what would do."""
        devices: list[Device] = []
        for part in text.split(","):
            if part.isdecimal():
                devices.append(cls("gpu", int(part)))
            elif match := re.fullmatch(r"cpu:([1-9]\d{0,2})", part):
                devices.extend([cls("cpu")] * int(match[1]))
            else:
                devices.append(cls.parse(part))
        if len({device.kind for device in devices}) > 1 or (devices[0].kind != "cpu" and len(set(devices)) < len(devices)):
            raise ValueError(f"{text!r}: one kind of device, and each GPU once; such as 0,1,2,3 or cuda:0,cuda:1 or cpu:2")
        return tuple(devices)

    def __str__(self) -> str:
        return self.kind if self.kind in ("auto", "cpu") else f"{self.kind}:{self.index}"


def onnxruntime() -> Any:
    """The onnxruntime module, imported on first use, with its telemetry off. Nothing else imports it.

    Which of its packages is installed is the user's choice. A program that imports onnxruntime before vessel_rt has to set
    ORT_DISABLE_TELEMETRY=1 itself: the library reads it once, when it is loaded.

    Raises:
        VesselError: none is installed.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # disable_telemetry_events() comes too late: the library has begun by then
    try:
        import onnxruntime
    except ModuleNotFoundError as e:
        raise VesselError(
            "onnxruntime is not installed: choose one of pip install 'vessel-rt[cpu]', 'vessel-rt[gpu]', 'vessel-rt[rtx]'"
        ) from e
    return onnxruntime


def _probe_cpu(device: Device) -> None:
    """Always there."""


def _probe_cuda(device: Device) -> None:
    """Finds CUDA's and cuDNN's libraries where pip puts them, then has CUDA hold a value. ONNX Runtime prints what it does not find."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        onnxruntime().preload_dlls()
    try:
        _hold_a_value(device)
    except Exception as e:  # ONNX Runtime's errors share no base class
        missing = [line for line in said.getvalue().splitlines() if line.startswith("Failed")]
        raise VesselError(missing[0] if missing else first_line(e)) from e


def _probe_tensorrt(device: Device) -> None:
    """As for CUDA; then has ONNX Runtime load TensorRT, as it does before it makes a session."""
    _probe_cuda(device)
    with contextlib.suppress(ImportError):
        import tensorrt  # noqa: F401  # loads its libraries from where pip puts them
    ort = onnxruntime()
    ort.capi.onnxruntime_pybind11_state.register_tensorrt_plugins_as_custom_ops(ort.SessionOptions(), {})


def _probe_rtx(device: Device) -> None:
    """TensorRT-RTX is a library of its own, which is registered with ONNX Runtime once a process."""
    ort = onnxruntime()  # before the provider's package, which would import it with its telemetry on
    import onnxruntime_ep_nv_tensorrt_rtx as rtx

    if rtx.get_ep_name() not in ort.get_available_providers():
        try:
            for library in packed_cuda_runtime(Path(rtx.get_library_path())):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            ort.register_execution_provider_library(rtx.get_ep_name(), rtx.get_library_path())
        except Exception as e:  # ONNX Runtime's errors share no base class
            raise VesselError(first_line(e).rpartition("with error: ")[2]) from e
    _rtx_device(device.index)
    _hold_a_value(device)


def _hold_a_value(device: Device) -> None:
    onnxruntime().OrtValue.ortvalue_from_shape_and_type((1,), np.float32, PROVIDERS[device.kind].memory, device.index)


def _choose_cpu(options: Any, device: Device, cache: EngineCache | None) -> Sequence[tuple[str, dict[str, str]]]:
    return [(PROVIDERS["cpu"].name, {})]


def _choose_cuda(options: Any, device: Device, cache: EngineCache | None) -> Sequence[tuple[str, dict[str, str]]]:
    return [(PROVIDERS["cuda"].name, {"device_id": str(device.index)})]


def _choose_tensorrt(options: Any, device: Device, cache: EngineCache | None) -> Sequence[tuple[str, dict[str, str]]]:
    """Strongly typed, since no precision is enabled: the graph's own types decide. CUDA runs what TensorRT leaves."""
    settings = {"device_id": str(device.index)}
    if cache:
        for key in ("trt_engine_cache", "trt_timing_cache"):
            settings |= {f"{key}_enable": "1", f"{key}_path": str(cache.folder)}
        settings |= cache.profile.options("trt_profile")
    return [(PROVIDERS["tensorrt"].name, settings), *_choose_cuda(options, device, cache)]


def _choose_rtx(options: Any, device: Device, cache: EngineCache | None) -> None:
    """Engines that were built beforehand, and nothing else: none is built here, and no node is left to the CPU."""
    options.add_provider_for_devices([_rtx_device(device.index)], {"nv_runtime_cache_path": str(cache.folder)} if cache else {})
    options.add_session_config_entry("session.disable_model_compile", "1")
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")


def _rtx_device(index: int) -> Any:
    """The provider's device whose memory is that of GPU `index`; VesselError if it lists none."""
    ort = onnxruntime()
    for found in ort.get_ep_devices():
        if found.ep_name == PROVIDERS["rtx"].name and found.memory_info(ort.OrtDeviceMemoryType.DEFAULT).device_id == index:
            return found
    raise VesselError("TensorRT-RTX does not run on this GPU")


PROVIDERS = {
    "rtx": Provider(
        "NvTensorRTRTXExecutionProvider", "onnxruntime_ep_nv_tensorrt_rtx", "pip install 'vessel-rt[rtx]'", "cuda", _probe_rtx, _choose_rtx
    ),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        None,
        "pip uninstall onnxruntime, then pip install 'vessel-rt[gpu]', and NVIDIA's TensorRT 10",
        "cuda",
        _probe_tensorrt,
        _choose_tensorrt,
    ),
    "cuda": Provider(
        "CUDAExecutionProvider", None, "pip uninstall onnxruntime, then pip install 'vessel-rt[gpu]'", "cuda", _probe_cuda, _choose_cuda
    ),
    "cpu": Provider("CPUExecutionProvider", None, "pip install 'vessel-rt[cpu]'", "cpu", _probe_cpu, _choose_cpu),
}


def open_device(wanted: Device) -> Device:
    """`wanted` itself, proven to work.

    Raises:
        VesselError: it cannot be used; nothing else is taken in its place.
    """
    fault = device_fault(wanted)
    if fault:
        raise VesselError(f"--device {wanted}: {fault}")
    return wanted


def device_fault(device: Device) -> str | None:
    """Why graphs cannot run on `device`, and what would mend it; None if they can."""
    ort, provider = onnxruntime(), PROVIDERS[device.kind]
    faults = []
    if device.kind != "cpu":
        try:
            if device.index >= len(list_gpus()):
                faults.append(f"there is no GPU {device.index} here")
        except VesselError as e:
            faults.append(str(e))
    if not provider.installed:
        faults.append(f"{provider.name} is not installed: {provider.install}")
    if faults:
        return "; ".join(faults)
    ort.set_default_logger_severity(4)  # of what is found out here, ONNX Runtime would print pages
    try:
        provider.probe(device)
    except Exception as e:  # ONNX Runtime's errors share no base class
        return f"{first_line(e)}: {provider.install}, or a newer driver"
    finally:
        ort.set_default_logger_severity(2)
    return None


class Session:
    """One loaded graph. A context manager: leaving it frees the graph's memory.

    Args:
        path: the .onnx file; its external data, or its engines, are found beside it.
        device: a device that `open_device` returned.
        threads: CPU threads for one operator; 0 leaves the choice to ONNX Runtime (all physical cores).
        cache: for `tensorrt` and `rtx`; without it, what they compile at run time is not kept.

    Raises:
        VesselError: ONNX Runtime cannot load the graph, or leaves all of it, or operators that are costly there, to the CPU. (It places
            shape arithmetic on the CPU by design; `rtx` leaves nothing there.)
    """

    def __init__(self, path: Path, device: Device, threads: int = 0, *, cache: EngineCache | None = None) -> None:
        ort, provider = onnxruntime(), PROVIDERS[device.kind]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that wait by spinning take the cores from whatever else there is to do: resizing, writing, another graph.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors; its warnings are for those who write graphs
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file is called: it was read as ONNX before
        try:
            session = self._load(path, options, provider.choose(options, device, cache))
        except Exception as e:  # ONNX Runtime's errors share no base class
            raise VesselError(f"{path}: onnxruntime {ort.__version__} cannot load this graph on {device}: {first_line(e)}") from e
        if session.get_providers()[0] != provider.name:
            raise VesselError(
                f"{path}: onnxruntime {ort.__version__} would not run this graph on {device}, only on {session.get_providers()[0]}"
            )
        left = sorted(_operators_on_the_cpu(session) & _HEAVY) if device.kind != "cpu" else []
        if left:
            raise VesselError(f"{path}: onnxruntime {ort.__version__} has no kernel on {device} for {', '.join(left)}; take another device")
        self._path = path
        self._session: Any = session
        self._device, self._memory = device, provider.memory
        self._outputs = tuple(output.name for output in session.get_outputs())

    @property
    def signature(self) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        """Every input and output by name: its dtype as in a TensorSpec, and its shape with None for a dynamic axis."""
        return {
            value.name: (_DTYPES.get(value.type, value.type), tuple(axis if isinstance(axis, int) else None for axis in value.shape))
            for value in (*self._session.get_inputs(), *self._session.get_outputs())
        }

    def _load(self, path: Path, options: Any, providers: Sequence[tuple[str, dict[str, str]]] | None) -> Any:
        """ONNX Runtime's session of the graph at `path`; a subclass may load another graph in its place."""
        return onnxruntime().InferenceSession(str(path), options, providers=providers, enable_fallback=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._session = None

    def run(self, feeds: Mapping[str, Value], *, keep: Collection[str] = (), into: Mapping[str, OrtValue] | None = None) -> dict[str, Any]:
        """Run the graph once.

        Args:
            feeds: every input by name: a C-contiguous array of the input's exact dtype, or a value already on the device.
            keep: outputs to leave on the device (OrtValue, fit to be fed again), rather than brought back as arrays.
            into: outputs to write into given device memory, which may be an input's own (a KV cache grows in place).

        Returns:
            Every output by name, except those of `into`: arrays, or OrtValues for those in `keep`.

        Raises:
            OutOfMemory: the device has no room for these shapes.
            GraphError: the graph fails on the device.
        """
        into = into or {}
        fresh = [name for name in self._outputs if name not in into]
        with self._faults():
            binding = self._session.io_binding()
            for name, value in feeds.items():
                if isinstance(value, np.ndarray):
                    binding.bind_cpu_input(name, value)
                else:
                    binding.bind_ortvalue_input(name, value)
            for name, value in into.items():
                binding.bind_ortvalue_output(name, value)
            for name in fresh:
                if name in keep:
                    binding.bind_output(name, self._memory, self._device.index)
                else:
                    binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            values = binding.get_outputs()[len(into) :]  # in the order of binding
        return {name: value if name in keep else value.numpy() for name, value in zip(fresh, values, strict=True)}

    def zeros(self, shape: Sequence[int], dtype: str) -> OrtValue:
        """Zeros in this session's device memory, of a TensorSpec's `dtype`: memory as it comes may hold NaN, and 0 times NaN is NaN.

        ONNX Runtime fills device memory from host arrays only: one of this shape is made, and gone on return.
        """
        number, like = _ONNX_TYPES[dtype]
        with self._faults():
            value = onnxruntime().OrtValue.ortvalue_from_shape_and_type(shape, number, self._memory, self._device.index)
            value.update_inplace(np.zeros(shape, like))  # takes any type of the same size, and zero is zero in all
        return value

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn what ONNX Runtime raises where a device fails into OutOfMemory, known by its text alone, or GraphError."""
        try:
            yield
        except Exception as e:
            text = f"{self._path.stem} fails on {self._device}: {first_line(e)}"
            if isinstance(e, MemoryError) or _OUT_OF_MEMORY.search(str(e)):
                raise OutOfMemory(text) from e
            if isinstance(e, _run_faults()) or (isinstance(e, RuntimeError) and _OF_THE_DEVICE.search(str(e))):
                raise GraphError(text) from e
            raise


def _operators_on_the_cpu(session: Any) -> set[str]:
    cpu = PROVIDERS["cpu"].name
    return {node.op_type for part in session.get_provider_graph_assignment_info() if part.ep_name == cpu for node in part.get_nodes()}


def _run_faults() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises where a device fails; its errors about wrong feeds are bugs and stay as they are."""
    state = onnxruntime().capi.onnxruntime_pybind11_state
    return state.Fail, state.RuntimeException, state.EPFail

"""A stand-in for a CUDA device: ONNX Runtime's API, with values that lie "on the device", over its CPU provider.

It counts what is copied between host and device, notes which thread ran which graph, and fails on cue with the words of the real library
(onnxruntime-gpu 1.28.0 on benchmarks/stub_cuda.py). So everything but the kernels is tried.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from vessel_rt.device import deployment, device_report, providers, session
from vessel_rt.device.cuda_driver import Gpu
from vessel_rt.errors import VesselError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
GPU = Gpu(0, "NVIDIA GeForce RTX 3090", "sm86", 24 << 30)
RuntimeException = onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException

_CALL = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW, void, onnxruntime::common::Status> "
    "onnxruntime::CudaCall(ERRTYPE, const char*, const char*, SUCCTYPE, const char*, const char*, int) [with ERRTYPE = cudaError] "
)


def cuda_failure(code: int, words: str) -> RuntimeError:
    """What ONNX Runtime raises when a call of CUDA returns `code`."""
    where = "file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_provider_factory.cc ; line=160"
    return RuntimeError(f"{_CALL}CUDA failure {code}: {words} ; GPU=0 ; hostname=cathlab-7 ; {where} ; expr=::cudaGetDeviceCount(&n);")


def out_of_memory(size: int = 3145728) -> Exception:
    """What ONNX Runtime raises when its arena cannot grow."""
    return RuntimeException(
        "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:359 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, "
        f"onnxruntime::Stream*) Failed to allocate memory for requested buffer of size {size}\n"
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a graph: the bytes of each input that came from the host, and of each output that went there."""

    graph: str
    thread: str
    shapes: Mapping[str, tuple[int, ...]]
    to_device: Mapping[str, int]
    to_host: Mapping[str, int]


class StandinGpu:
    """The device, and what it saw: `runs`, `sessions` that are loaded, `values` on the device.

    `fails` gets a graph's name and its inputs' shapes before each run, and returns an error to raise, or None. `load_fault` is raised when
    a graph is loaded, `memory_fault` when a value is allocated, `printed` is what preload_dlls prints. `on_the_cpu` are operators without a
    kernel.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[Run] = []
        self.sessions: weakref.WeakSet[_Session] = weakref.WeakSet()
        self.values: weakref.WeakSet[_Value] = weakref.WeakSet()
        self.copied_in: list[int] = []
        self.fails: Callable[[str, Mapping[str, tuple[int, ...]]], Exception | None] = lambda graph, shapes: None
        self.load_fault: Exception | None = None
        self.memory_fault: Exception | None = None
        self.driver_fault: VesselError | None = None
        self.missing: dict[str, str] = {}
        self.on_the_cpu: frozenset[str] = frozenset()
        self.providers = [CUDA, CPU]
        module = _Module(self)
        for part in (providers, session):
            monkeypatch.setattr(part, "onnxruntime", lambda: module)
        for used in (deployment, device_report, providers):
            monkeypatch.setattr(used, "list_gpus", self._list_gpus)
        monkeypatch.setattr(providers, "ctypes", SimpleNamespace(CDLL=self._open_library))

    def of(self, graph: str) -> list[Run]:
        """The runs of a graph."""
        return [run for run in self.runs if run.graph == graph]

    def _list_gpus(self) -> tuple[Gpu, ...]:
        if self.driver_fault:
            raise self.driver_fault
        return (GPU,)

    def _open_library(self, name: str, *_: Any, **__: Any) -> None:
        if name in self.missing:
            raise OSError(f"{name}: {self.missing[name]}")


class _Module:
    """The module onnxruntime, on a machine with the device."""

    cuda_version = "13.0"

    def __init__(self, gpu: StandinGpu) -> None:
        self._gpu = gpu
        host = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
        self.OrtValue = SimpleNamespace(ortvalue_from_shape_and_type=self._allocate, ortvalue_from_numpy_with_onnx_type=host)

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return self._gpu.providers

    def preload_dlls(self) -> None:
        for name, why in self._gpu.missing.items():
            if "cudnn" not in name:  # ONNX Runtime ignores cuDNN's since 1.28
                print(f"Failed to load {name}: {name}: {why}")

    def InferenceSession(self, path: str, options: Any, providers: Any, enable_fallback: int) -> Any:
        if providers[0][0] == CPU:
            return onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=enable_fallback)
        assert (providers, enable_fallback) == ([(CUDA, {"device_id": "0"})], 0)
        return _Session(self._gpu, Path(path), options)

    def _allocate(self, shape: Any, dtype: Any, memory: str, index: int) -> Any:
        if memory == "cpu":
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype)
        assert (memory, index) == ("cuda", 0)
        if self._gpu.memory_fault:
            raise self._gpu.memory_fault
        return _Value(self._gpu, onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype))


class _Value:
    """An OrtValue on the device. It is the real one's memory, but reading it on the host is a copy."""

    def __init__(self, gpu: StandinGpu, real: Any) -> None:
        self.gpu, self.real = gpu, real
        gpu.values.add(self)

    def update_inplace(self, array: np.ndarray) -> None:
        self.gpu.copied_in.append(array.nbytes)
        self.real.update_inplace(array)


class _Session:
    """An InferenceSession on the device."""

    def __init__(self, gpu: StandinGpu, path: Path, options: Any) -> None:
        if gpu.load_fault:
            raise gpu.load_fault
        self.gpu, self.name = gpu, path.stem
        self.real = onnxruntime.InferenceSession(str(path), options, providers=[CPU])
        gpu.sessions.add(self)

    def get_providers(self) -> list[str]:
        return [CUDA, CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = [node for part in self.real.get_provider_graph_assignment_info() for node in part.get_nodes()]
        left = [node for node in nodes if node.op_type in self.gpu.on_the_cpu]
        there = [node for node in nodes if node.op_type not in self.gpu.on_the_cpu]
        return [SimpleNamespace(ep_name=name, get_nodes=lambda of=of: of) for name, of in ((CUDA, there), (CPU, left))]

    def get_inputs(self) -> Any:
        return self.real.get_inputs()

    def get_outputs(self) -> Any:
        return self.real.get_outputs()

    def io_binding(self) -> _Binding:
        return _Binding(self)

    def run_with_iobinding(self, binding: _Binding) -> None:
        fault = self.gpu.fails(self.name, binding.shapes)
        if fault:
            raise fault
        self.real.run_with_iobinding(binding.real)
        sizes = {
            name: value.numpy().nbytes for (name, on_host), value in zip(binding.bound, binding.real.get_outputs(), strict=True) if on_host
        }
        self.gpu.runs.append(Run(self.name, threading.current_thread().name, binding.shapes, binding.to_device, sizes))


class _Binding:
    """A session's io_binding: inputs from the host are copied to the device, and outputs that are bound to it stay there."""

    def __init__(self, of: _Session) -> None:
        self.gpu, self.real = of.gpu, of.real.io_binding()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.to_device: dict[str, int] = {}
        self.bound: list[tuple[str, bool]] = []  # outputs, and whether they go to the host
        self.given: dict[str, _Value] = {}

    def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
        self.shapes[name], self.to_device[name] = array.shape, array.nbytes
        self.real.bind_cpu_input(name, array)

    def bind_ortvalue_input(self, name: str, value: _Value) -> None:
        assert isinstance(value, _Value), f"{name} is not on the device"
        self.shapes[name] = tuple(value.real.shape())
        self.real.bind_ortvalue_input(name, value.real)

    def bind_ortvalue_output(self, name: str, value: _Value) -> None:
        assert isinstance(value, _Value), f"{name} is not on the device"
        self.bound.append((name, False))
        self.given[name] = value
        self.real.bind_ortvalue_output(name, value.real)

    def bind_output(self, name: str, memory: str, index: int = 0) -> None:
        assert (memory, index) in (("cpu", 0), ("cuda", 0))
        self.bound.append((name, memory == "cpu"))
        self.real.bind_output(name)

    def get_outputs(self) -> list[Any]:
        return [
            value if on_host else self.given.get(name) or _Value(self.gpu, value)
            for (name, on_host), value in zip(self.bound, self.real.get_outputs(), strict=True)
        ]

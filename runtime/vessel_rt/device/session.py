"""One graph, loaded by ONNX Runtime: named arrays in, named arrays out, on any kind of device.

Does not know about images, tokens or bundles.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from vessel_rt.device.providers import PROVIDERS, Device, EngineCache, failure, onnxruntime
from vessel_rt.errors import GraphError, LoadMemoryError, OutOfMemory, PlacementError, VesselError

if TYPE_CHECKING:
    from onnxruntime import OrtValue

__all__ = ["Session", "Value"]

Value: TypeAlias = "npt.NDArray[Any] | OrtValue"

# TensorProto's numbers of types, some of which NumPy lacks, and a NumPy type of the same size.
_ONNX_TYPES = {"float32": (1, np.uint32), "float16": (10, np.uint16), "bfloat16": (16, np.uint16)}

# ONNX Runtime's names of types, and a TensorSpec's.
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16", "tensor(int64)": "int64"}

# Operators that ONNX Runtime places on the CPU by design, for arithmetic of shapes. Other ones are there for want of a kernel: activations
# would be copied to the host and back.
_OF_SHAPES = frozenset(
    (
        "Add", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Mul", "Range", "Reshape", "Shape", "Size", "Slice",
        "Squeeze", "Sub", "Unsqueeze", "Where",
    )
)  # fmt: skip

# What ONNX Runtime's arenas, CUDA and TensorRT say when memory runs out.
_OUT_OF_MEMORY = re.compile(r"allocate memory|out of memory|bad_alloc|ALLOC_FAILED|BFCArena", re.IGNORECASE)

_CPUINFO = Path("/proc/cpuinfo")

# What a plain RuntimeError of ONNX Runtime's bindings says if the device caused it; other ones are bugs.
_OF_THE_DEVICE = re.compile(r"CUDA|CUDNN|CUBLAS|TensorRT", re.IGNORECASE)


class Session:
    """One loaded graph. A context manager: leaving it frees the graph's memory.

    Args:
        path: the .onnx file; its external data or engines are in the same folder.
        device: a device that `open_device` returned in this process.
        threads: CPU threads for one operator; 0 leaves the choice to ONNX Runtime (all physical cores).
        cache: for `tensorrt` and `rtx`; without it, what they compile at run time is not saved.
        prepack: on a CPU, copy the matrices to the layout of its kernels while the graph is loaded. It takes their size in memory.
        arena: on a CPU, keep the memory of activations for later runs and for other sessions, as long as the process lives.

    Raises:
        VesselError: ONNX Runtime cannot load the graph.
        LoadMemoryError: a GPU has no memory for it.
        PlacementError: it leaves all of the graph, or more than arithmetic of shapes, to the CPU. (`rtx` leaves nothing there.)
    """

    def __init__(
        self, path: Path, device: Device, threads: int = 0, *, cache: EngineCache | None = None, prepack: bool = True, arena: bool = True
    ) -> None:
        ort, provider = onnxruntime(), PROVIDERS[device.kind]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin while they wait take the cores from other work: resizing, writing, another graph.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Quantized matrices are multiplied by activations rounded to 8 bits; other levels take 20 to 100 times longer.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        if device.kind == "cpu":
            # A pattern is one allocation for all activations of a shape, which comes on top of what earlier runs have allocated.
            options.enable_mem_pattern = False
            options.enable_cpu_mem_arena = arena
            if arena:
                _share_arena()
                options.add_session_config_entry("session.use_env_allocators", "1")
            options.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
            options.add_session_config_entry("session.x64quantprecision", str(int(_products_overflow())))
        options.log_severity_level = 4  # nothing: its warnings are for authors of graphs, and its errors are raised, too
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file is called: it was checked as ONNX
        try:
            session = self._load(path, options, provider.choose(options, device, cache))
        except Exception as e:  # ONNX Runtime's errors share no base class
            if device.kind != "cpu" and _is_out_of_memory(e):
                raise LoadMemoryError(
                    f"{path}: {device} has no memory for this graph: end other programs on the GPU (nvidia-smi lists them), or export with "
                    "8-bit weights; vessel-rt plan shows what the bundle takes"
                ) from e
            raise VesselError(f"{path}: onnxruntime {ort.__version__} cannot load this graph on {device}: {failure(e)}") from e
        if session.get_providers()[0] != provider.name:
            raise PlacementError(
                f"{path}: onnxruntime {ort.__version__} would not run this graph on {device}, only on {session.get_providers()[0]}"
            )
        self.placement = _placement(session)
        """How many nodes of each operator run on which provider (ONNX Runtime's name), after its optimizations."""
        left = sorted(self.placement.get(PROVIDERS["cpu"].name, {}).keys() - _OF_SHAPES) if device.kind != "cpu" else []
        if left:
            raise PlacementError(
                f"{path}: onnxruntime {ort.__version__} has no kernel on {device} for {', '.join(left)}; take another device"
            )
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
        """ONNX Runtime's session of the graph at `path`. A subclass may load another graph instead."""
        return onnxruntime().InferenceSession(str(path), options, providers=providers, enable_fallback=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._session = None

    def run(self, feeds: Mapping[str, Value], *, keep: Collection[str] = (), into: Mapping[str, OrtValue] | None = None) -> dict[str, Any]:
        """Run the graph once.

        Args:
            feeds: every input by name: a C-contiguous array of the input's exact dtype, or a value already on the device.
            keep: outputs to leave on the device, as OrtValues that can be fed again, instead of copying them to arrays.
            into: outputs to write into given device memory, which may be that of an input (a KV cache grows in place).

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
        """Zeros in this session's device memory, of a TensorSpec's `dtype`: uninitialized memory may hold NaN, and 0 times NaN is NaN.

        On a CPU, the system provides each page when it is first written. ONNX Runtime fills other memory from host arrays only: one of this
        shape is allocated for the call.
        """
        number, like = _ONNX_TYPES[dtype]
        with self._faults():
            if self._device.kind == "cpu":  # not np.zeros, which asks for huge pages
                pages = mmap.mmap(-1, math.prod(shape) * np.dtype(like).itemsize)
                return onnxruntime().OrtValue.ortvalue_from_numpy_with_onnx_type(np.frombuffer(pages, like).reshape(shape), number)
            value = onnxruntime().OrtValue.ortvalue_from_shape_and_type(shape, number, self._memory, self._device.index)
            value.update_inplace(np.zeros(shape, like))  # accepts any type of the same size, and zero bytes are zero in all of them
        return value

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn what ONNX Runtime raises when a device fails into OutOfMemory, which only its text tells, or GraphError."""
        try:
            yield
        except Exception as e:
            text = f"{self._path.stem} fails on {self._device}: {failure(e)}"
            if _is_out_of_memory(e):
                raise OutOfMemory(text) from e
            if isinstance(e, _run_faults()) or (isinstance(e, RuntimeError) and _OF_THE_DEVICE.search(str(e))):
                raise GraphError(text) from e
            raise


@functools.cache
def _share_arena() -> None:
    """One arena for the activations of all sessions of this process on a CPU: stages run in turn, and an arena keeps what it took."""
    ort = onnxruntime()
    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(cpu, ort.OrtArenaCfg({}))


def _products_overflow() -> bool:
    """Whether this processor lacks the VNNI instructions: ONNX Runtime then adds products of 8 bits in 16, which overflow, unless it is
    told to take slower instructions."""
    try:
        return "_vnni" not in _CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return True


def _placement(session: Any) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return found


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def _run_faults() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises when a device fails. Its errors about wrong inputs are bugs and are not caught."""
    state = onnxruntime().capi.onnxruntime_pybind11_state
    return state.Fail, state.RuntimeException, state.EPFail

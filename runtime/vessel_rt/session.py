"""The one seam between the pipeline and ONNX Runtime: named arrays in, named arrays out, on any provider.

Knows nothing of images, tokens or bundles. A new kind of device is a new row of PROVIDERS.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from vessel_rt.errors import ImageError, VesselError, first_line

if TYPE_CHECKING:
    from onnxruntime import OrtValue

__all__ = ["PROVIDERS", "Device", "Provider", "Session", "Value", "onnxruntime", "open_device"]

Value: TypeAlias = "npt.NDArray[Any] | OrtValue"


@dataclasses.dataclass(frozen=True)
class Provider:
    """ONNX Runtime's name for what runs on a kind of device, and the extra of vessel-rt that installs it."""

    name: str
    extra: str


# Best first: `auto` takes the first that works.
PROVIDERS = {
    "cuda": Provider("CUDAExecutionProvider", "gpu"),
    "cpu": Provider("CPUExecutionProvider", "cpu"),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """Where graphs run: a key of PROVIDERS, or `auto` until `open_device` has chosen, and which of several alike."""

    kind: str
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Device:
        """`auto`, `cpu`, `cuda` or `cuda:N` as a Device; ValueError says what would do."""
        match = re.fullmatch(r"([a-z]+)(?::(\d+))?", text)
        if not match or match[1] not in ("auto", *PROVIDERS) or (match[2] and match[1] in ("auto", "cpu")):
            raise ValueError(f"{text!r} is not a device: take auto, cpu, cuda or cuda:N")
        return cls(match[1], int(match[2] or 0))

    def __str__(self) -> str:
        return self.kind if self.kind in ("auto", "cpu") else f"{self.kind}:{self.index}"


def onnxruntime() -> Any:
    """The onnxruntime module, imported on first use: which of its packages is installed is the user's choice.

    Raises:
        VesselError: none is installed.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as e:
        raise VesselError(
            "onnxruntime is not installed: choose one of pip install 'vessel-rt[cpu]', 'vessel-rt[gpu]', 'vessel-rt[rtx]'"
        ) from e
    return onnxruntime


def open_device(wanted: Device) -> Device:
    """The device to run on: `wanted` itself, proven to work, or for `auto` the first of PROVIDERS that does.

    Raises:
        VesselError: a device asked for by name cannot be used; nothing else is taken in its place.
    """
    if wanted.kind == "auto":
        return next(device for device in map(Device, PROVIDERS) if _fault(device) is None)
    fault = _fault(wanted)
    if fault:
        raise VesselError(f"--device {wanted}: {fault}")
    return wanted


def _fault(device: Device) -> str | None:
    """Why `device` cannot be used, or None. A provider that is compiled in may still lack its driver, so it is given a value to hold."""
    ort, provider = onnxruntime(), PROVIDERS[device.kind]
    if provider.name not in ort.get_available_providers():
        return f"this onnxruntime lacks {provider.name}: pip uninstall onnxruntime, then pip install 'vessel-rt[{provider.extra}]'"
    if device.kind == "cuda":
        ort.preload_dlls()  # finds CUDA's libraries where pip puts them
    try:
        ort.OrtValue.ortvalue_from_shape_and_type((1,), np.float32, device.kind, device.index)
    except Exception as e:  # ONNX Runtime's errors share no base class
        return first_line(e)
    return None


class Session:
    """One loaded graph. A context manager: leaving it frees the graph's memory.

    Args:
        path: the .onnx file; its external data are found beside it.
        device: a device that `open_device` returned.
        threads: CPU threads for one operator; 0 leaves the choice to ONNX Runtime (all physical cores).

    Raises:
        VesselError: ONNX Runtime cannot load the graph, or leaves the provider of the device out. (Single nodes without a kernel there may
            still run on the CPU: ONNX Runtime places shape arithmetic so by design.)
    """

    def __init__(self, path: Path, device: Device, threads: int = 0) -> None:
        ort, provider = onnxruntime(), PROVIDERS[device.kind]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; its warnings are for those who write graphs
        choice = (provider.name, {"device_id": str(device.index)}) if device.kind != "cpu" else provider.name
        try:
            session = ort.InferenceSession(str(path), options, providers=[choice], enable_fallback=0)
        except Exception as e:  # ONNX Runtime's errors share no base class
            raise VesselError(f"{path}: onnxruntime {ort.__version__} cannot load this graph on {device}: {first_line(e)}") from e
        if session.get_providers()[0] != provider.name:
            raise VesselError(
                f"{path}: onnxruntime {ort.__version__} would not run this graph on {device}, only on {session.get_providers()[0]}"
            )
        self._path = path
        self._session: Any = session
        self._device = device
        self._outputs = tuple(output.name for output in session.get_outputs())

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
            ImageError: the device fails, as it does without memory; a smaller image may pass.
        """
        binding, into = self._session.io_binding(), into or {}
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name, value in into.items():
            binding.bind_ortvalue_output(name, value)
        fresh = [name for name in self._outputs if name not in into]
        for name in fresh:
            where = self._device if name in keep else Device("cpu")
            binding.bind_output(name, where.kind, where.index)
        try:
            self._session.run_with_iobinding(binding)
        except _run_faults() as e:
            raise ImageError(f"{self._path.stem} fails on {self._device}: {first_line(e)}") from e
        values = binding.get_outputs()[len(into) :]  # in the order of binding
        return {name: value if name in keep else value.numpy() for name, value in zip(fresh, values, strict=True)}

    def to_device(self, array: npt.NDArray[Any]) -> OrtValue:
        """`array` in this session's device memory; on the CPU that is the array's own."""
        return onnxruntime().OrtValue.ortvalue_from_numpy(array, self._device.kind, self._device.index)


def _run_faults() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises where a device fails; its errors about wrong feeds are bugs and stay as they are."""
    state = onnxruntime().capi.onnxruntime_pybind11_state
    return state.Fail, state.RuntimeException, state.EPFail

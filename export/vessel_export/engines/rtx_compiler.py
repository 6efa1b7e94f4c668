"""Compiles one graph to one TensorRT-RTX engine, in a child process that `compile_graph` starts.

The child takes several times the weights' memory, which the system has back as soon as it ends. And the libraries that a stub GPU loads
(stub_gpu.py) must not stay in a process that may use a real GPU. Does not know bundles.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx

from vessel_export.engines.partition import EP_CONTEXT, Context
from vessel_export.engines.stub_gpu import ProviderLibrary
from vessel_rt.device.providers import onnxruntime
from vessel_rt.errors import EngineError, first_line
from vessel_rt.formats.profiles import Profile
from vessel_rt.io.child_process import die_with_parent

__all__ = ["Compiled", "compile_graph"]

_NO_DEVICE = 3  # the exit code
_DRIVER = r"libcuda\.so|libnvidia-ml\.so|nvcuda\.dll|nvml\.dll"  # its libraries, one of which a message reports as missing
_STAMP = r"(?:\d{4}-\d\d-\d\d \d\d:|$)"  # the start of the log's next message
_GRAPH, _COMPILED = "graph.onnx", "compiled.onnx"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled graph: its node, which names the engine's file, and the metadata that the provider checks when it loads the engine."""

    context: Context
    metadata: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Request:
    provider: str
    library: str
    preload: list[str]
    options: dict[str, str]
    weights: str  # the folder that external data are relative to
    folder: str  # has the graph; the compiled model and the engine are written to it


def compile_graph(
    weights: Path,
    architecture: str,
    provider: ProviderLibrary,
    graph: onnx.ModelProto,
    profile: Profile,
    engine: Path,
    tick: Callable[[], object],
) -> Compiled:
    """Compile `graph`, whose external data are in the folder `weights`, into the file `engine`. Calls `tick` about once a second.

    Raises:
        EngineError: there is no GPU, TensorRT-RTX cannot compile the whole graph, or memory or disk space ran out.
    """
    folder = engine.with_name(f".{engine.name}.compiler")  # because ONNX Runtime chooses the name of the engine's file
    folder.mkdir()
    onnx.save(graph, folder / _GRAPH)
    request = _Request(
        provider=provider.name,
        library=str(provider.library),
        preload=[str(path) for path in provider.preload],
        options={
            "nv_target_sm": architecture,
            "nv_use_external_data_initializer": "1",  # halves time and memory
            **profile.options("nv_profile"),
        },
        weights=str(weights.absolute()),
        folder=str(folder.absolute()),
    )
    code, log = _run(request, tick)
    if code == _NO_DEVICE:
        raise EngineError(
            f"TensorRT-RTX finds no GPU that it supports; build on a machine with one, or without one by --describe {architecture}"
        )
    if code:
        raise EngineError(f"{engine.stem}: TensorRT-RTX cannot compile it for {architecture}: {_cause(code, log)}")
    compiled = onnx.load(folder / _COMPILED, load_external_data=False)
    nodes, files = compiled.graph.node, list(folder.glob("*.engine"))
    if [node.op_type for node in nodes] != [EP_CONTEXT] or len(files) != 1:
        raise EngineError(f"{engine.stem}: TensorRT-RTX compiled only a part of it and left {', '.join(node.op_type for node in nodes)}")
    files[0].replace(engine)
    shutil.rmtree(folder)
    attributes = {attribute.name: _plain(onnx.helper.get_attribute_value(attribute)) for attribute in nodes[0].attribute}
    context = Context(tuple(nodes[0].input), tuple(nodes[0].output), attributes | {"ep_cache_context": engine.name})
    return Compiled(context, {entry.key: entry.value for entry in compiled.metadata_props})


def _plain(value: object) -> str | int:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, int):
        return value
    raise TypeError(f"an {EP_CONTEXT} attribute is {value!r}, not text or a whole number")


def _run(request: _Request, tick: Callable[[], object]) -> tuple[int, str]:
    """Run `_compile` in a child process; returns its exit code and its log."""
    command = [sys.executable, "-m", __name__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        sent: str | None = json.dumps(dataclasses.asdict(request))
        while True:
            try:
                _, log = process.communicate(sent, timeout=1)
                return process.returncode, log
            except subprocess.TimeoutExpired:
                sent = None
                tick()
    finally:
        process.kill()
        process.wait()


def _cause(code: int, log: str) -> str:
    """In one line: the log's first error, preferably the parser's, or its last line if none is marked as an error."""
    if code == -signal.SIGKILL:
        return "it was killed, probably for lack of memory; free some, or raise engines.language_model_partitions in the recipe"
    text = re.sub(r"\x1b\[[0-9;]*m", "", log).strip()
    if "engine stream" in text:  # the provider's only message when it cannot write
        return "the engine cannot be written; the disk is probably full"
    found = re.search(rf"ERROR: (.*?){_STAMP}", text, re.DOTALL) or re.search(rf"ERROR\] (.*?){_STAMP}", text, re.DOTALL)
    return " ".join(found[1].split())[:300] if found else text.rpartition("\n")[2] or f"exit code {code}"


def _compile(request: _Request) -> None:
    """The child process. It ends with the fault as its last line, or with the exit code _NO_DEVICE."""
    die_with_parent()  # no compiler survives a killed build
    for library in request.preload:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    ort = onnxruntime()
    try:
        ort.register_execution_provider_library(request.provider, request.library)
    except Exception as e:  # ONNX Runtime's errors share no base class
        sys.exit(_NO_DEVICE if re.search(_DRIVER, str(e)) else first_line(e))
    devices = [device for device in ort.get_ep_devices() if device.ep_name == request.provider]
    if not devices:
        sys.exit(_NO_DEVICE)
    options = ort.SessionOptions()
    options.add_provider_for_devices(devices[:1], request.options)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", request.weights)
    with contextlib.chdir(request.folder):  # the model records the engine's path as given here
        try:
            ort.ModelCompiler(options, Path(_GRAPH).read_bytes(), embed_compiled_data_into_model=False).compile_to_file(_COMPILED)
        except Exception as e:
            sys.exit(first_line(e))


if __name__ == "__main__":
    _compile(_Request(**json.load(sys.stdin)))

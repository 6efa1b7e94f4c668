"""One graph -> one TensorRT-RTX engine, in a process of its own, which `compile_graph` starts.

A process of its own, because its memory is several times the weights and is to be given back at once, and because what a described GPU
loads (described_gpu.py) must not stay in a process that may use a real one.
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
from vessel_export.engines.stub_gpu import Provider
from vessel_rt.device.providers import onnxruntime
from vessel_rt.errors import EngineError, first_line
from vessel_rt.formats.profiles import Profile

__all__ = ["Compiled", "compile_graph"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NO_DEVICE = 3  # the exit code
_DRIVER = r"libcuda\.so|libnvidia-ml\.so|nvcuda\.dll|nvml\.dll"  # its libraries, in the message that one of them is missing
_STAMP = r"(?:\d{4}-\d\d-\d\d \d\d:|$)"  # where the log's next message begins
_GRAPH, _COMPILED = "graph.onnx", "compiled.onnx"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came of one graph: its node, which names the engine's file, and the model's metadata, which the provider checks at loading."""

    context: Context
    metadata: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Request:
    provider: str
    library: str
    preload: list[str]
    options: dict[str, str]
    weights: str  # the folder that external data are relative to
    folder: str  # has the graph, and is given what comes of it


def compile_graph(
    weights: Path, architecture: str, provider: Provider, graph: onnx.ModelProto, profile: Profile, engine: Path, tick: Callable[[], object]
) -> Compiled:
    """Compile `graph`, whose external data lie in the folder `weights`, into the file `engine`; `tick` is called about once a second.

    Raises:
        EngineError: there is no GPU to be seen, TensorRT-RTX cannot compile the graph whole, or memory or disk space ran out.
    """
    folder = engine.with_name(f".{engine.name}.compiler")  # of its own, since ONNX Runtime names the engine's file itself
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
            f"TensorRT-RTX sees no GPU here that it supports: build where one is, or for one elsewhere with --describe {architecture}"
        )
    if code:
        raise EngineError(f"{engine.stem}: TensorRT-RTX cannot compile it for {architecture}: {_cause(code, log)}")
    compiled = onnx.load(folder / _COMPILED, load_external_data=False)
    nodes, files = compiled.graph.node, list(folder.glob("*.engine"))
    if [node.op_type for node in nodes] != [EP_CONTEXT] or len(files) != 1:
        raise EngineError(f"{engine.stem}: TensorRT-RTX did not compile it whole, but left {', '.join(node.op_type for node in nodes)}")
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
    """Run `_compile` in a process of its own; its exit code and what it logged."""
    command = [sys.executable, "-m", __name__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        asked: str | None = json.dumps(dataclasses.asdict(request))
        while True:
            try:
                _, log = process.communicate(asked, timeout=1)
                return process.returncode, log
            except subprocess.TimeoutExpired:
                asked = None
                tick()
    finally:
        process.kill()
        process.wait()


def _cause(code: int, log: str) -> str:
    """In one line: the log's first error, its parser's before others; its last line where none is marked as one."""
    if code == -signal.SIGKILL:
        return "it was killed, most likely for lack of memory; free some, or raise engines.language_model_parts in the recipe"
    text = re.sub(r"\x1b\[[0-9;]*m", "", log).strip()
    if "engine stream" in text:  # all that the provider says when it cannot write on
        return "the engine cannot be written to its end; is the disk full?"
    found = re.search(rf"ERROR: (.*?){_STAMP}", text, re.DOTALL) or re.search(rf"ERROR\] (.*?){_STAMP}", text, re.DOTALL)
    return " ".join(found[1].split())[:300] if found else text.rpartition("\n")[2] or f"exit code {code}"


def _compile(request: _Request) -> None:
    """What the process does. A fault is its last word, or _NO_DEVICE its exit code."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed build leaves no compiler behind
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
    with contextlib.chdir(request.folder):  # the engine's path is written into the model as it is given here
        try:
            ort.ModelCompiler(options, Path(_GRAPH).read_bytes(), embed_compiled_data_into_model=False).compile_to_file(_COMPILED)
        except Exception as e:
            sys.exit(first_line(e))


if __name__ == "__main__":
    _compile(_Request(**json.load(sys.stdin)))

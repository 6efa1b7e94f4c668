"""Compiles one graph to one TensorRT plan with Polygraphy, on this machine's GPU. Not run yet: TensorRT's library is not on PyPI.

Networks are strongly typed, as all are in TensorRT 11: the graph determines the types. Only the shapes are set. Does not know bundles.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx

from vessel_export.engines.partition import Context, weight_files
from vessel_export.engines.rtx_compiler import Compiled
from vessel_rt.device.cuda_driver import list_gpus
from vessel_rt.errors import EngineError
from vessel_rt.formats.profiles import Profile

__all__ = ["compile_plan"]


def compile_plan(
    weights: Path, architecture: str, ampere_plus: bool, graph: onnx.ModelProto, profile: Profile, engine: Path, tick: Callable[[], object]
) -> Compiled:
    """Compile `graph`, whose external data are in the folder `weights`, into the plan `engine`, on the first GPU.

    With `ampere_plus` the plan runs on every GPU of compute capability 8.0 or higher, otherwise on GPUs of `architecture`.

    Raises:
        EngineError: Polygraphy or TensorRT is missing or cannot compile the graph, or the GPU is of another architecture.
        VesselError: there is no GPU.
    """
    try:
        import tensorrt
        from polygraphy.backend.trt import CreateConfig, engine_bytes_from_network, network_from_onnx_path
        from polygraphy.backend.trt import Profile as Shapes
        from polygraphy.exception import PolygraphyException
    except ImportError as e:
        raise EngineError(f"--builder tensorrt: {e.name or e} is missing; pip install 'vessel-rt[tensorrt]'") from e
    gpu = list_gpus()[0]
    if not ampere_plus and gpu.architecture != architecture:
        raise EngineError(f"--builder tensorrt: this GPU is {gpu.architecture}, the recipe is for {architecture}; give another --recipe")
    shapes = Shapes()
    for name in profile.max:
        shapes.add(name, min=profile.min[name], opt=profile.opt[name], max=profile.max[name])
    level = tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS if ampere_plus else None
    folder = engine.with_name(f".{engine.name}.compiler")
    for file in weight_files(graph):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.link(weights / file, folder / file)  # external data must be next to the graph, and not symbolic links
    onnx.save(graph, folder / "graph.onnx")
    try:
        network = network_from_onnx_path(str(folder / "graph.onnx"), strongly_typed=True)
        plan = engine_bytes_from_network(network, config=CreateConfig(profiles=[shapes], hardware_compatibility_level=level))
    except PolygraphyException as e:
        raise EngineError(f"{engine.stem}: TensorRT {tensorrt.__version__} cannot compile it for {gpu.name}; see its log") from e
    engine.write_bytes(plan)
    shutil.rmtree(folder)
    tick()
    attributes: dict[str, str | int] = {  # as ONNX Runtime's TensorRT provider reads them
        "embed_mode": 0,
        "ep_cache_context": engine.name,
        "hardware_architecture": "80+" if ampere_plus else architecture.removeprefix("sm"),
        "main_context": 1,
        "source": "TensorrtExecutionProvider",
    }
    return Compiled(Context(_names(graph.graph.input), _names(graph.graph.output), attributes), {})


def _names(values: object) -> tuple[str, ...]:
    return tuple(value.name for value in values)  # type: ignore[attr-defined]

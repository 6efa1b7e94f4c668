"""What to build, and for which GPU. Does not know graphs and compilers."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
from pathlib import Path

from vessel_export.engines.stub_gpu import ARCHITECTURES
from vessel_rt.device.cuda_driver import list_gpus
from vessel_rt.errors import EngineError, RecipeError, VesselError
from vessel_rt.formats.engine_sidecar import Target, builder_version
from vessel_rt.formats.profiles import engine_recipe
from vessel_rt.formats.recipe import EngineRecipe, Recipe

__all__ = ["BuildRequest", "driver_version", "obstacle_here", "target_of"]


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """What to build.

    `stages` of the bundle; None: all, those of cines included. `stub_gpu`: the architecture of a GPU that this machine does not have; None
    builds on its own GPU. `rebuild`: replace engines that are out of date. `ampere_plus`: build TensorRT engines for any GPU of the RTX 30
    series or newer.
    """

    bundle: Path
    recipe: Recipe
    builder: str = "rtx"
    stub_gpu: str | None = None
    stages: tuple[str, ...] | None = None
    rebuild: bool = False
    ampere_plus: bool = False


def target_of(request: BuildRequest) -> Target:
    """The builder's version and the architecture that `request` is for.

    Raises:
        RecipeError: the recipe has no engines, or the builder does not compile for its GPU.
        EngineError: options that exclude each other, or a builder that is not installed.
    """
    engines = engine_recipe(request.recipe)
    recipe, builder = f"recipe {request.recipe.name}", request.builder
    if builder == "rtx" and engines.architecture not in ARCHITECTURES:
        raise RecipeError(
            f"{recipe}: engines.architecture is {engines.architecture}; TensorRT-RTX compiles for {', '.join(ARCHITECTURES)} only"
        )
    if request.stub_gpu and builder != "rtx":
        raise EngineError(f"--describe: {builder} builds only on the GPU itself; use --builder rtx")
    if request.stub_gpu not in (None, engines.architecture):
        raise EngineError(f"--describe {request.stub_gpu}: {recipe} is for {engines.architecture}; give that, or another --recipe")
    if request.ampere_plus and builder != "tensorrt":
        raise EngineError(f"--ampere-plus: {builder} builds for one architecture; use --builder tensorrt")
    version = builder_version(builder)
    if version is None:
        raise EngineError(f"--builder {builder}: its library is not installed; pip install 'vessel-rt[{builder}]'")
    return Target(builder, "ampere+" if request.ampere_plus else engines.architecture, version)


def obstacle_here(engines: EngineRecipe) -> str | None:
    """Why TensorRT-RTX cannot build for the recipe's GPU on this machine, or None."""
    if builder_version("rtx") is None:
        return "TensorRT-RTX is not installed"
    try:
        gpus = list_gpus()
    except VesselError as e:
        return str(e).partition(":")[0]
    if engines.architecture not in {gpu.architecture for gpu in gpus}:
        return f"no GPU here is of {engines.architecture}"
    return None


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None if there is none."""
    with contextlib.suppress(OSError):
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return text.value.decode("ascii", "replace")
    return None

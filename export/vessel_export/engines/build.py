"""Build: a bundle's graphs and a recipe -> engines for the recipe's GPU, each with a sidecar that says what it was built from.

An engine appears in `bundle/engines/<builder>-<architecture>/` when it is complete, its sidecar last: a build that is killed leaves the
stages that it had finished, and the next one goes on with the rest. `bundle.json` is not touched. Engines are built here and never loaded;
that is vessel_rt's. Knows the compilers by one signature only (`Compiler`).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import importlib.metadata
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Never, TypeAlias

import onnx
from tqdm import tqdm

from vessel_export.engines.partition import chain, cut, layer_cuts, weight_files
from vessel_export.engines.rtx_compiler import Compiled, compile_graph
from vessel_export.engines.stub_gpu import ARCHITECTURES, described_provider, installed_provider
from vessel_rt.device.cuda_driver import list_gpus
from vessel_rt.errors import BundleError, EngineError, RecipeError, VesselError
from vessel_rt.formats.bundle import STAGES, Bundle
from vessel_rt.formats.engine_sidecar import BUILDERS, Engine, Target, builder_version
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.formats.profiles import Profile, Shapes, engine_recipe, shape_text, stage_profile, workload_of
from vessel_rt.formats.recipe import DEFAULT_RECIPE, EngineRecipe, Recipe, load_recipe
from vessel_rt.io.checked_files import check_files, sha256_of
from vessel_rt.io.folder_lock import locked

__all__ = ["Build", "BuildRequest", "Compiler", "add_arguments", "build_after_export", "build_engines", "run"]

# (graph, profile, the engine's file, called about once a second) -> what came of it
Compiler: TypeAlias = "Callable[[onnx.ModelProto, Profile, Path, Callable[[], object]], Compiled]"

_CUT_STAGE = "language_model"  # the one that may be too large to be compiled at once


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """What to build. `describe`: the architecture of a GPU that is not here. `rebuild`: replace engines that do not agree with the rest.
    `ampere_plus`: TensorRT's engines for any GPU of the RTX 30 series or newer."""

    bundle: Path
    recipe: Recipe
    builder: str = "rtx"
    describe: str | None = None
    stages: tuple[str, ...] = STAGES
    rebuild: bool = False
    ampere_plus: bool = False


@dataclasses.dataclass(frozen=True)
class Build:
    """One stage's engine, and the seconds that it took; None for one that was there and was kept."""

    engine: Engine
    seconds: float | None

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(record.bytes for record in self.engine.files.values())


@dataclasses.dataclass(frozen=True)
class _Job:
    """One stage to be compiled: its graph, without weights, and where it is cut; the sidecar as it is to be, but for `files`."""

    graph: onnx.ModelProto
    cuts: tuple[str, ...]
    profile: Profile
    sidecar: Engine

    @property
    def stage(self) -> str:
        return self.sidecar.stage

    @property
    def parts(self) -> int:
        return len(self.cuts) + 1

    @property
    def weight_bytes(self) -> int:
        lengths = (entry.value for tensor in self.graph.graph.initializer for entry in tensor.external_data if entry.key == "length")
        return sum(map(int, lengths))


def build_engines(request: BuildRequest, report: Callable[[Build], object] = lambda build: None) -> list[Build]:
    """Build what is missing of the engines that `request` describes; `report` is told of each as soon as it is in its place.

    Raises:
        VesselError: the recipe does not fit the bundle, there is no builder or no GPU, a file of the bundle is damaged, an engine that is
            there does not agree with bundle, recipe and builder (and `rebuild` is not asked for), a graph does not compile, or memory or
            disk space is short. Stages that were finished stay.
    """
    bundle = Bundle.load(request.bundle)
    workload = workload_of(bundle, request.recipe)
    engines = engine_recipe(request.recipe)
    target = _target(request, engines)
    driver = None if request.describe else _driver_version()
    jobs = [_job(bundle, stage, stage_profile(bundle, bundle.stages[stage], workload), engines, target, driver) for stage in request.stages]
    kept = _kept(bundle, target, jobs, rebuild=request.rebuild)
    builds = [Build(kept[job.stage], None) for job in jobs if job.stage in kept]
    for build in builds:
        report(build)
    missing = [job for job in jobs if job.stage not in kept]
    if not missing:
        return builds
    _check_sources(bundle, missing)
    _check_space(bundle, sum(job.weight_bytes for job in missing))
    folder = target.folder(bundle)
    with (
        _compiler(request, bundle, engines) as compiler,
        _staging(folder) as staging,
        tqdm(total=sum(job.parts for job in missing), unit="engine", disable=None, leave=False) as bar,
    ):
        for job in missing:
            bar.set_description(job.stage)
            start = time.perf_counter()
            engine = _build(job, compiler, staging / job.stage, bar)
            _put_in_place(engine, staging / job.stage, folder)
            builds.append(Build(engine, time.perf_counter() - start))
            report(builds[-1])
    return builds


def _target(request: BuildRequest, engines: EngineRecipe) -> Target:
    recipe, builder = f"recipe {request.recipe.name}", request.builder
    if builder == "rtx" and engines.architecture not in ARCHITECTURES:
        raise RecipeError(f"{recipe}: architecture is {engines.architecture}; TensorRT-RTX compiles for {', '.join(ARCHITECTURES)} only")
    if request.describe and builder != "rtx":
        raise EngineError(f"--describe: {builder} builds only where the GPU is; take --builder rtx")
    if request.describe not in (None, engines.architecture):
        raise EngineError(f"--describe {request.describe}: {recipe} is for {engines.architecture}; describe that, or take another --recipe")
    if request.ampere_plus and builder != "tensorrt":
        raise EngineError(f"--ampere-plus: {builder} builds for one architecture; take --builder tensorrt")
    version = builder_version(builder)
    if version is None:
        raise EngineError(f"--builder {builder}: its library is not installed: pip install 'vessel-rt[{builder}]'")
    return Target(builder, "ampere+" if request.ampere_plus else engines.architecture, version)


def _driver_version() -> str | None:
    """The version of NVIDIA's driver; None where there is none."""
    with contextlib.suppress(OSError):
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return text.value.decode("ascii", "replace")
    return None


def _job(bundle: Bundle, stage: str, profile: Profile, engines: EngineRecipe, target: Target, driver: str | None) -> _Job:
    file = bundle.stages[stage].file
    _check_files(bundle, [file])  # before it is parsed
    graph = onnx.load(bundle.folder / file, load_external_data=False)
    cuts = layer_cuts(bundle.language_model.layers, engines.language_model_parts) if stage == _CUT_STAGE else []
    sidecar = Engine(
        stage=stage,
        builder=target.builder,
        architecture=target.architecture,
        gpu=engines.gpu,
        precision=bundle.precision,
        files={},
        sources={name: bundle.files[name].sha256 if name in bundle.files else "" for name in (file, *weight_files(graph))},
        profile={
            name: ", ".join(shape_text(shapes[name]) for shapes in (profile.least, profile.likeliest, profile.greatest))
            for name in profile.greatest
        },
        versions={target.builder: target.version, "onnxruntime": importlib.metadata.version("onnxruntime"), "driver": driver},
    )
    return _Job(graph, tuple(cuts), profile, sidecar)


def _kept(bundle: Bundle, target: Target, jobs: Sequence[_Job], *, rebuild: bool) -> dict[str, Engine]:
    """The engines that are there and agree with everything; those that do not are an error, unless they are to be replaced."""
    folder = target.folder(bundle)
    kept: dict[str, Engine] = {}
    faults: list[str] = []
    for job in jobs:
        sidecar = folder / f"{job.stage}.json"
        if not sidecar.exists():
            continue
        try:
            engine = Engine.load(sidecar)
        except EngineError as e:
            faults.append(str(e))
            continue
        found = engine.differences(folder, bundle, target) + _other_recipe(engine, job)
        found = found or list(check_files(folder, engine.files)[1])  # gigabytes: read only where nothing else differs
        faults += [f"{job.stage}: {fault}" for fault in found]
        if not found:
            kept[job.stage] = engine
    if faults and not rebuild:
        raise EngineError(f"{folder}: {'; '.join(faults)}; --rebuild builds anew what differs")
    return kept


def _other_recipe(engine: Engine, job: _Job) -> list[str]:
    """What another recipe or another export would have made otherwise, in words."""
    found = []
    if engine.stage != job.stage or engine.sources.keys() != job.sidecar.sources.keys():
        found.append("it was built from other files")
    found += [
        f"its shapes of {name} are {engine.profile.get(name)}, by the recipe {text}"
        for name, text in job.sidecar.profile.items()
        if engine.profile.get(name) != text
    ]
    parts = len(engine.files) - 1
    if parts != job.parts:
        found.append(f"it is in {parts} parts, by the recipe in {job.parts}")
    return found[:2]  # every layer's cache has the same shapes


def _check_sources(bundle: Bundle, jobs: Sequence[_Job]) -> None:
    """An engine's sidecar will say that it was built from these files: they must be what the bundle says they are."""
    names = sorted({name for job in jobs for name in job.sidecar.sources})
    total = sum(bundle.files[name].bytes for name in names if name in bundle.files)
    with tqdm(total=total, desc="checking weights", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        _check_files(bundle, names, bar.update)


def _check_files(bundle: Bundle, names: Sequence[str], progress: Callable[[int], object] | None = None) -> None:
    _, faults = check_files(bundle.folder, {name: bundle.files.get(name) for name in names}, progress)
    if faults:
        raise BundleError(f"{bundle.folder}: damaged bundle: {'; '.join(faults)}; copy or export it again")


def _check_space(bundle: Bundle, weight_bytes: int) -> None:
    need = int(1.05 * weight_bytes) + (64 << 20)  # an engine is its weights and some megabytes of code
    free = shutil.disk_usage(bundle.folder).free
    if free < need:
        raise EngineError(
            f"{bundle.folder}: {free / 1e9:.1f} GB free, its engines take about {need / 1e9:.1f}; free some, or move the bundle"
        )


@contextlib.contextmanager
def _compiler(request: BuildRequest, bundle: Bundle, engines: EngineRecipe) -> Iterator[Compiler]:
    if request.builder == "tensorrt":
        from vessel_export.engines.tensorrt_compiler import compile_plan

        yield functools.partial(compile_plan, bundle.folder, engines.architecture, request.ampere_plus)
        return
    provider = described_provider(request.describe) if request.describe else contextlib.nullcontext(installed_provider())
    with provider as found:
        yield functools.partial(compile_graph, bundle.folder, engines.architecture, found)


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that is gone when the block ends; what a killed build left in it goes first. One build at a time."""
    path = folder.with_name(f".{folder.name}.partial")
    for place in (folder.parent, folder):
        place.mkdir(exist_ok=True)
        _close_to_others(place)
    with locked(folder):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _build(job: _Job, compiler: Compiler, staging: Path, bar: tqdm[Never]) -> Engine:
    """Compile the stage into the new folder `staging`, in parts where it is cut, and describe what came of it."""
    staging.mkdir()
    parts = []
    for i, part in enumerate(cut(job.graph, job.cuts)):
        name = f"{job.stage}.{i}.engine" if job.cuts else f"{job.stage}.engine"
        parts.append(compiler(part, _profile_of(part, job.profile), staging / name, bar.refresh))
        bar.update()
    onnx.save(chain(job.graph, [part.context for part in parts], parts[0].metadata), staging / f"{job.stage}.onnx")
    files = {}
    for path in sorted(staging.iterdir()):
        _close_to_others(path)
        files[path.name] = FileRecord(path.stat().st_size, sha256_of(path))
    return dataclasses.replace(job.sidecar, files=files)


def _profile_of(part: onnx.ModelProto, profile: Profile) -> Profile:
    """The shapes of a part's inputs. A value that the graph was cut at is a residual, of the same shape as the embeddings."""

    def own(shapes: Shapes) -> Shapes:
        return {value.name: shapes.get(value.name, shapes.get("inputs_embeds", ())) for value in part.graph.input}

    return Profile(own(profile.least), own(profile.likeliest), own(profile.greatest))


def _put_in_place(engine: Engine, staging: Path, folder: Path) -> None:
    """Replace the stage's older files; without a sidecar they are no engine, so it goes first and comes last."""
    sidecar = f"{engine.stage}.json"
    (staging / sidecar).write_text(engine.to_json(), encoding="utf-8")
    _close_to_others(staging / sidecar)
    (folder / sidecar).unlink(missing_ok=True)
    for old in folder.glob(f"{engine.stage}.*"):
        old.unlink()
    for name in (*engine.files, sidecar):
        os.replace(staging / name, folder / name)


def _close_to_others(path: Path) -> None:
    """What anyone may write is refused when it is to be loaded."""
    path.chmod(path.stat().st_mode & ~stat.S_IWOTH)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vessel-export build`; `parser`'s namespace then has `run`."""
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="the bundle that is given engines")
    parser.add_argument(
        "--recipe", default=DEFAULT_RECIPE, metavar="NAME|TOML", help=f"for which GPU and shapes (default: {DEFAULT_RECIPE})"
    )
    parser.add_argument("--describe", metavar="ARCH", help="build on a machine without a GPU, for one of this architecture, as sm86")
    parser.add_argument("--builder", choices=BUILDERS, default="rtx", help="TensorRT-RTX (default), or TensorRT proper")
    parser.add_argument(
        "--ampere-plus", action="store_true", help="with --builder tensorrt: for any GPU of RTX 30 or newer, a little slower"
    )
    parser.add_argument("--stage", action="append", choices=STAGES, help="only this stage; may be repeated (default: all)")
    parser.add_argument("--rebuild", action="store_true", help="replace engines that were built from other files, shapes or versions")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """`vessel-export build`: print a line a stage; 0 when all are there.

    Raises:
        VesselError: as build_engines does.
    """
    request = BuildRequest(
        bundle=arguments.bundle,
        recipe=load_recipe(arguments.recipe),
        builder=arguments.builder,
        describe=arguments.describe,
        stages=tuple(stage for stage in STAGES if stage in (arguments.stage or STAGES)),
        rebuild=arguments.rebuild,
        ampere_plus=arguments.ampere_plus,
    )
    build_engines(request, _print)
    return 0


def build_after_export(bundle: Path, recipe: Recipe) -> None:
    """Build the engines that `recipe` asks for, where its GPU is; elsewhere say in a line why there are none, and how to get them.

    Raises:
        VesselError: as build_engines does.
    """
    if recipe.engines is None:
        return
    fault = _fault_here(recipe.engines)
    if fault:
        print(
            f"engines: none built, {fault}; `vessel-export build --bundle {bundle} --describe {recipe.engines.architecture}` needs no GPU"
        )
    else:
        build_engines(BuildRequest(bundle, recipe), _print)


def _fault_here(engines: EngineRecipe) -> str | None:
    """Why TensorRT-RTX cannot build for the recipe's GPU on this machine as it is, or None."""
    if builder_version("rtx") is None:
        return "TensorRT-RTX is not installed"
    try:
        gpus = list_gpus()
    except VesselError as e:
        return str(e).partition(":")[0]
    if engines.architecture not in {gpu.architecture for gpu in gpus}:
        return f"no GPU here is of {engines.architecture}"
    return None


def _print(build: Build) -> None:
    engine = build.engine
    how = "kept" if build.seconds is None else f"{build.seconds:.1f} s"
    parts = f", {len(engine.files) - 1} parts" if len(engine.files) > 2 else ""
    tqdm.write(f"{engine.builder}-{engine.architecture}/{engine.stage}: {how}, {build.bytes / 1e6:.1f} MB{parts}")

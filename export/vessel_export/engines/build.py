"""Builds engines: a bundle's graphs and a recipe -> an engine for each stage, with a sidecar that records what it was built from.

An engine appears in `bundle/engines/<builder>-<architecture>/` when it is complete, its sidecar last. A build that is killed leaves the
stages it has finished, and the next build continues with the rest. `bundle.json` does not change. Engines are not loaded here; vessel_rt
does that. Knows the compilers by their signature only (`Compiler`).
"""

from __future__ import annotations

import contextlib
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

import msgspec
import onnx
from tqdm import tqdm

from vessel_export.engines.partition import chain, layer_cuts, partition, weight_files
from vessel_export.engines.request import BuildRequest, driver_version, target_of
from vessel_export.engines.rtx_compiler import Compiled, compile_graph
from vessel_export.engines.stub_gpu import installed_provider, stub_provider
from vessel_export.engines.up_to_date import Expected, find_up_to_date
from vessel_export.io.files import scratch_folder
from vessel_rt.errors import BundleError, EngineError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.engine_sidecar import SCHEMA, Engine, Target
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.formats.profiles import Profile, Shapes, engine_recipe, stage_profile, workload_of
from vessel_rt.formats.recipe import EngineRecipe
from vessel_rt.io.checked_files import check_files, sha256_of
from vessel_rt.io.folder_lock import locked

__all__ = ["Build", "Compiler", "build_engines"]

# (graph, profile, the engine's file, a callback called about once a second) -> the compiled graph
Compiler: TypeAlias = "Callable[[onnx.ModelProto, Profile, Path, Callable[[], object]], Compiled]"

_PARTITIONED_STAGE = "language_model"  # may be too large to compile at once


@dataclasses.dataclass(frozen=True)
class Build:
    """One stage's engine and the seconds that it took to build; None if it was up to date."""

    engine: Engine
    seconds: float | None

    @property
    def bytes(self) -> int:
        """The size of all its files."""
        return sum(record.bytes for record in self.engine.files.values())


@dataclasses.dataclass(frozen=True)
class _Job:
    """One stage to compile: its graph, without weights, where to cut it, and the sidecar to write, still without `files`."""

    graph: onnx.ModelProto
    cuts: tuple[str, ...]
    profile: Profile
    sidecar: Engine

    @property
    def stage(self) -> str:
        return self.sidecar.stage

    @property
    def partitions(self) -> int:
        return len(self.cuts) + 1

    @property
    def weight_bytes(self) -> int:
        lengths = (entry.value for tensor in self.graph.graph.initializer for entry in tensor.external_data if entry.key == "length")
        return sum(map(int, lengths))


def build_engines(request: BuildRequest, report: Callable[[Build], object] = lambda build: None) -> list[Build]:
    """Build the engines of `request` that are missing. `report` is called with each engine as soon as it is in place.

    Raises:
        VesselError: the recipe does not fit the bundle, there is no builder or no GPU, a file of the bundle is damaged, an existing engine
            is out of date and `rebuild` is not set, a graph does not compile, or memory or disk space runs out. Finished stages stay.
    """
    bundle = Bundle.load(request.bundle)
    workload = workload_of(bundle, request.recipe)
    engines = engine_recipe(request.recipe)
    target = target_of(request)
    driver = None if request.stub_gpu else driver_version()
    stages = bundle.all_stages
    if absent := [stage for stage in request.stages or () if stage not in stages]:
        raise BundleError(f"{bundle.folder}: has no {', '.join(absent)}: an older version exported it; export it again")
    jobs = [
        _job(bundle, stage, stage_profile(bundle, stages[stage], workload), engines, target, driver) for stage in request.stages or stages
    ]
    found = find_up_to_date(bundle, target, [Expected(job.sidecar, job.partitions) for job in jobs], rebuild=request.rebuild)
    builds = [Build(found[job.stage], None) for job in jobs if job.stage in found]
    for build in builds:
        report(build)
    missing = [job for job in jobs if job.stage not in found]
    if not missing:
        return builds
    _check_sources(bundle, missing)
    _check_space(bundle, sum(job.weight_bytes for job in missing))
    folder = target.folder(bundle)
    with (
        _compiler(request, bundle, engines) as compiler,
        _workspace(folder) as scratch,
        tqdm(total=sum(job.partitions for job in missing), unit="engine", disable=None, leave=False) as bar,
    ):
        for job in missing:
            bar.set_description(job.stage)
            start = time.perf_counter()
            engine = _build(job, compiler, scratch / job.stage, bar)
            _move_into_place(engine, scratch / job.stage, folder)
            builds.append(Build(engine, time.perf_counter() - start))
            report(builds[-1])
    return builds


def _job(bundle: Bundle, stage: str, profile: Profile, engines: EngineRecipe, target: Target, driver: str | None) -> _Job:
    file = bundle.all_stages[stage].file
    _check_files(bundle, [file])  # before it is parsed
    graph = onnx.load(bundle.folder / file, load_external_data=False)
    cuts = layer_cuts(bundle.language_model.layers, engines.language_model_partitions) if stage == _PARTITIONED_STAGE else []
    sidecar = Engine(
        schema=SCHEMA,
        stage=stage,
        builder=target.builder,
        architecture=target.architecture,
        gpu=engines.gpu,
        precision=bundle.precision,
        files={},
        sources={name: bundle.files[name].sha256 if name in bundle.files else "" for name in (file, *weight_files(graph))},
        profile=profile.texts(),
        versions={target.builder: target.version, "onnxruntime": importlib.metadata.version("onnxruntime"), "driver": driver},
    )
    return _Job(graph, tuple(cuts), profile, sidecar)


def _check_sources(bundle: Bundle, jobs: Sequence[_Job]) -> None:
    """Check the files that the sidecars will name as sources: they must be those that the bundle records."""
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
    provider = stub_provider(request.stub_gpu) if request.stub_gpu else contextlib.nullcontext(installed_provider())
    with provider as found:
        yield functools.partial(compile_graph, bundle.folder, engines.architecture, found)


@contextlib.contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """A scratch folder next to `folder`, which is made and locked: one build at a time."""
    for place in (folder.parent, folder):
        place.mkdir(exist_ok=True)
        _deny_others(place)
    with locked(folder), scratch_folder(folder) as scratch:
        yield scratch


def _build(job: _Job, compiler: Compiler, scratch: Path, bar: tqdm[Never]) -> Engine:
    """Compile the stage into the new folder `scratch`, one engine for each partition."""
    scratch.mkdir()
    compiled = []
    for i, piece in enumerate(partition(job.graph, job.cuts)):
        name = f"{job.stage}.{i}.engine" if job.cuts else f"{job.stage}.engine"
        compiled.append(compiler(piece, _profile_of(piece, job.profile), scratch / name, bar.refresh))
        bar.update()
    onnx.save(chain(job.graph, [one.context for one in compiled], compiled[0].metadata), scratch / f"{job.stage}.onnx")
    files = {}
    for path in sorted(scratch.iterdir()):
        _deny_others(path)
        files[path.name] = FileRecord(path.stat().st_size, sha256_of(path))
    return msgspec.structs.replace(job.sidecar, files=files)


def _profile_of(piece: onnx.ModelProto, profile: Profile) -> Profile:
    """The shapes of a partition's inputs. A value at a cut is a residual, which has the shape of the embeddings."""

    def own(shapes: Shapes) -> Shapes:
        return {value.name: shapes.get(value.name, shapes.get("inputs_embeds", ())) for value in piece.graph.input}

    return Profile(own(profile.min), own(profile.opt), own(profile.max))


def _move_into_place(engine: Engine, scratch: Path, folder: Path) -> None:
    """Replace the stage's older files. Files without a sidecar are not an engine: the old sidecar goes first, the new one comes last."""
    sidecar = f"{engine.stage}.json"
    (scratch / sidecar).write_text(engine.to_json(), encoding="utf-8")
    _deny_others(scratch / sidecar)
    (folder / sidecar).unlink(missing_ok=True)
    for old in folder.glob(f"{engine.stage}.*"):
        old.unlink()
    for name in (*engine.files, sidecar):
        os.replace(scratch / name, folder / name)


def _deny_others(path: Path) -> None:
    """Take write permission from other users: the runtime refuses to load an engine that anyone can write."""
    path.chmod(path.stat().st_mode & ~stat.S_IWOTH)

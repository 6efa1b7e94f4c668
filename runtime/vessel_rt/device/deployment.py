"""A bundle on a device: which device, which file each stage is loaded from, and whether these files changed. Does not know about images.

Bundles are loaded only through `deploy`. Every file that the bundle, a graph or an engine names lies in the bundle's folder and is hashed
before anything opens it; no other file is opened. `Deployment.guarded` tells whether the files are still what was hashed.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from vessel_rt.device.cuda_driver import list_gpus
from vessel_rt.device.host_memory import require_memory
from vessel_rt.device.memory_plan import make_plan
from vessel_rt.device.providers import Device, EngineCache, device_fault, open_device
from vessel_rt.device.session import Session
from vessel_rt.errors import BundleError, EngineError, VesselError
from vessel_rt.formats.bundle import Bundle, TensorSpec
from vessel_rt.formats.engine_sidecar import EngineSet, Target, builder_version, writable_by_anyone
from vessel_rt.formats.profiles import Workload, stage_profile
from vessel_rt.io.checked_files import CheckedFiles, changes, leases

__all__ = ["AUTO", "Deployment", "check_bundle", "choose_device", "choose_devices", "deploy", "deploy_on", "deployment_fault"]

_CPU_ONLY = "its matrices are quantized in a form for CPUs: take --device cpu, or export it with --recipe rtx3090-int8"
_NO_BF16 = "ONNX Runtime cannot compute bf16 on the CPU: run the bundle on a GPU (--device cuda or rtx), or export it with --precision fp32"

MOST_IMAGES = 8  # in a batch, unless more are requested
_CHOOSER = "from vessel_rt.device.deployment import answer_parent; answer_parent()"
_CHOOSING = 300  # seconds; drivers of many GPUs are slow to start

# Its matrices are multiplied by thousands of rows at once. Packing them at each use takes no measurable time and saves 0.8 GB, in FP32;
# packed integers take 0.2 GB.
_MATRICES_ONCE = ("sam2_image_encoder",)

AUTO = ("rtx", "cuda", "cpu")  # what `auto` tries; not `tensorrt`, which first builds engines for minutes


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A bundle whose files were checked, on a device that works.

    `graphs` has the file of each stage; `batch` images run at once; `files` are all files that were hashed; `arena` is for Session.
    """

    bundle: Bundle
    device: Device
    graphs: dict[str, Path]
    batch: int = 1
    files: CheckedFiles = dataclasses.field(default_factory=dict)
    arena: bool = True

    @property
    def max_batch(self) -> int | None:
        """How many images may run at once: more than `batch` only where nothing is compiled for a range of shapes (None: no limit)."""
        return self.batch if self._compiles else None

    @property
    def _compiles(self) -> bool:
        return self.device.kind in ("tensorrt", "rtx")

    @contextmanager
    def guarded(self) -> Iterator[Callable[[], None]]:
        """Watch the files during a block in which sessions are loaded and run.

        Returns:
            A function that raises BundleError if a file was changed since it was hashed, or is about to be. What was computed before a
            call that raises nothing was computed with the files as they were hashed. A call takes some microseconds.

        Raises:
            BundleError: as that function.
        """

        def verify_unchanged() -> None:
            wanted = [(path, "is about to be changed by another process") for path in in_demand()]
            for path, what in wanted or changes(self.files):
                raise BundleError(
                    f"{self.bundle.folder}: {path.relative_to(self.bundle.folder)} {what} while the bundle is in use; "
                    "copy or export the bundle again, then give the same command again: finished results are kept"
                )

        with leases(self.files) as in_demand:
            verify_unchanged()
            yield verify_unchanged

    def session(self, stage: str, threads: int = 0) -> Session:
        """Load a stage. See Session for `threads` and errors.

        Raises:
            BundleError: the graph's inputs and outputs are not those of the bundle.
            EngineError: compiled code would be saved in a folder that anyone may write to, or the engine of a cine's stage is not built.
        """
        if stage not in self.graphs:
            raise EngineError(f"{self.bundle.folder}: no engine of {stage}; vessel-export build --bundle {self.bundle.folder} makes it")
        spec, path = self.bundle.all_stages[stage], self.graphs[stage]
        cache = self._cache(stage) if self._compiles else None
        quantized = self.bundle.quantization is not None and stage in self.bundle.quantization.matrices
        prepack = quantized or stage not in _MATRICES_ONCE
        session = Session(path, self.device, threads, cache=cache, prepack=prepack, arena=self.arena)
        if session.signature != _signature(spec.inputs) | _signature(spec.outputs):
            raise BundleError(f"{path}: its inputs and outputs are not those of bundle.json; copy or export the bundle again")
        return session

    def sessions(self, threads: int = 0) -> dict[str, Session]:
        """Load the stages of a frame at the same time; if one cannot be loaded, none stays loaded. See `session`."""
        with ThreadPoolExecutor(len(self.bundle.stages)) as pool:
            loading = {stage: pool.submit(self.session, stage, threads) for stage in self.bundle.stages}
        return {stage: future.result() for stage, future in loading.items()}

    def _cache(self, stage: str) -> EngineCache | None:
        """In the user's own folder, since engines are code, and named by the bundle's hash, since ONNX Runtime ignores weights.

        None if that folder cannot be written: then nothing is saved.
        """
        whole = Path.home() / ".cache" / "vessel-rt" / self.bundle.sha256
        folder = whole / stage
        try:
            whole.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            return None
        for path in (whole, folder):
            if writable_by_anyone(path):
                raise EngineError(f"{path}: anyone may write to it, and its content would be run; remove it")
        workload = Workload(max_batch=self.batch, opt_batch=self.batch)
        return EngineCache(folder, stage_profile(self.bundle, self.bundle.all_stages[stage], workload))


def _signature(specs: Sequence[TensorSpec]) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """As Session.signature."""
    return {spec.name: (spec.dtype, tuple(axis if isinstance(axis, int) else None for axis in spec.shape)) for spec in specs}


def deploy(
    bundle: Bundle,
    wanted: Device,
    progress: Callable[[int, int], object] | None = None,
    *,
    batch: int | None = None,
) -> Deployment:
    """Choose the device, and check every file that will be read there. `progress` gets the bytes read each time, and the total.

    `auto` is the first of AUTO that runs this bundle. On `rtx` the engines are read instead of the graphs' own files. `batch` images run at
    once; None leaves it to the device: one on a CPU, which gains nothing from more (docs/performance.md); on a GPU, up to MOST_IMAGES, as
    many as its engines take and `vessel-rt plan` finds room for.

    Raises:
        VesselError: a device that was requested by name cannot be used; no other device is used instead.
        BundleError: a file of the bundle is missing or was changed, or a graph names a file without a hash.
        EngineError: an engine is missing, was changed, or is not for this bundle, GPU, TensorRT-RTX or batch size.
    """
    return deploy_on(bundle, choose_device(bundle, wanted), progress, batch=batch)


def deploy_on(
    bundle: Bundle,
    device: Device,
    progress: Callable[[int, int], object] | None = None,
    *,
    batch: int | None = None,
    streams: int = 1,
    propagate: str | None = None,
    files: CheckedFiles | None = None,
) -> Deployment:
    """As `deploy`, on a device that `choose_device` or `open_device` has returned in this process: it is not probed again.

    `streams` batches will run at the same time, or objects will be tracked through cines as `propagate` says. `files` is the result of
    `check_bundle` in another process for this bundle and device: they are not hashed again.
    """
    engines = _engines_for(bundle, device, batch)
    if files is None:
        if device.kind == "cpu":
            require_memory(bundle, streams, propagate=propagate)
        files = _check(bundle, [engines], progress)
    images = batch or _most_images(bundle, device, engines)
    if engines is None:
        graphs = {name: bundle.folder / stage.file for name, stage in bundle.all_stages.items()}
    else:
        graphs = {name: engines.folder / f"{name}.onnx" for name in engines.engines}
    if not files.keys() >= set(graphs.values()):  # the other process saw other devices
        raise VesselError(f"--device {device}: the files that it loads were not checked; give the command again")
    return Deployment(bundle, device, graphs, images, files)


def check_bundle(
    bundle: Bundle, devices: Sequence[Device], batch: int | None, streams: int = 1, progress: Callable[[int, int], object] | None = None
) -> CheckedFiles:
    """Check every file that will be read on `devices` (already chosen), each file once. `batch`, `streams` and `progress` as in deploy_on.

    Raises:
        BundleError, EngineError: as in deploy.
    """
    if processes := sum(device.kind == "cpu" for device in devices):
        require_memory(bundle, streams, processes)
    sets = {found.folder if found else None: found for device in devices for found in [_engines_for(bundle, device, batch)]}
    return _check(bundle, list(sets.values()), progress)


def _engines_for(bundle: Bundle, device: Device, batch: int | None) -> EngineSet | None:
    """The engines that `device` runs; None if it runs the graphs. Raises what deploy raises before it reads a file."""
    if fault := _lacking_kernels(bundle, device):
        raise BundleError(f"{bundle.folder}: {fault}")
    engines = _engines(bundle, device) if device.kind == "rtx" else None
    if engines and batch and batch > engines.max_batch:
        build = "raise engines.max_batch in the recipe and vessel-export build again"
        raise EngineError(f"{engines.folder}: built for {engines.max_batch} images at once, not {batch}; lower --batch, or {build}")
    return engines


def _check(bundle: Bundle, engines: Sequence[EngineSet | None], progress: Callable[[int, int], object] | None) -> CheckedFiles:
    """Hash the files of the bundle and of the sets of engines; None stands for the graphs themselves."""
    built, graphs = [found for found in engines if found], None in engines
    records = [*bundle.used_files(graphs=graphs).values(), *(record for found in built for record in found.files.values())]
    total = sum(record.bytes for record in records if record)

    def advance(read: int) -> None:
        if progress:
            progress(read, total)

    files = bundle.verify_files(advance, graphs=graphs)
    for found in built:
        files |= found.verify(advance)
    return files


def _most_images(bundle: Bundle, device: Device, engines: EngineSet | None) -> int:
    """How many images run at once by default."""
    if device.kind == "cpu":
        return 1
    if engines:  # their recipe was planned for the card
        return min(engines.max_batch, MOST_IMAGES)
    memory = list_gpus()[device.index].memory
    return max((images for images in range(2, MOST_IMAGES + 1) if make_plan(bundle, images, memory).fits), default=1)


def deployment_fault(bundle: Bundle, device: Device) -> str | None:
    """Why `bundle` cannot run on `device`, and what to do; None if it can. The content of files is not read."""
    fault = device_fault(device)
    if fault is None and device.kind == "rtx":
        try:
            _engines(bundle, device)
        except EngineError as e:
            return str(e)
    return fault or _lacking_kernels(bundle, device)


def _lacking_kernels(bundle: Bundle, device: Device) -> str | None:
    """Why `device` cannot compute what `bundle` needs; None if it can."""
    if device.kind == "cpu":
        return _NO_BF16 if bundle.precision == "bf16" else None
    return _CPU_ONLY if bundle.quantization and bundle.precision == "fp32" else None


def choose_device(bundle: Bundle, wanted: Device) -> Device:
    """The device that `deploy` uses for `wanted`. `gpu` is the first kind of AUTO, except the CPU, that runs this bundle on that GPU.

    Raises:
        VesselError: it cannot be used.
    """
    if wanted.kind == "auto":
        return next((device for device in map(Device, AUTO) if deployment_fault(bundle, device) is None), Device("cpu"))
    if wanted.kind != "gpu":
        return open_device(wanted)
    faults = {kind: deployment_fault(bundle, Device(kind, wanted.index)) for kind in AUTO if kind != "cpu"}
    for kind, fault in faults.items():
        if fault is None:
            return Device(kind, wanted.index)
    raise VesselError(f"GPU {wanted.index} cannot be used: {'; '.join(f'{kind}: {fault}' for kind, fault in faults.items())}")


def choose_devices(bundle: Bundle, wanted: Sequence[Device], *, apart: bool = False) -> tuple[Device, ...]:
    """`choose_device` for each. For several GPUs, and with `apart`, this happens in a separate process: probing a GPU takes memory there
    until the process ends.

    Raises:
        VesselError: one cannot be used, or the driver crashes or hangs.
    """
    if all(device.kind == "cpu" for device in wanted) or (len(wanted) == 1 and not apart):
        return tuple(choose_device(bundle, device) for device in wanted)
    command = [sys.executable, "-P", "-c", _CHOOSER]
    try:
        done = subprocess.run(command, input=pickle.dumps((bundle, wanted)), stdout=subprocess.PIPE, timeout=_CHOOSING)
        found = pickle.loads(done.stdout)
    except subprocess.TimeoutExpired as e:
        raise VesselError(f"the devices do not answer within {_CHOOSING} seconds: nvidia-smi may say why") from e
    except (EOFError, pickle.UnpicklingError) as e:
        raise VesselError(f"the search for devices ended with exit code {done.returncode}: nvidia-smi may say why") from e
    if isinstance(found, str):
        raise VesselError(found)
    return tuple(found)


def answer_parent() -> None:
    """The process of `choose_devices`: a bundle and devices come on standard input, devices or an error's text go out."""
    bundle, wanted = pickle.load(sys.stdin.buffer)
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # libraries print to standard error instead of the pipe
        try:
            found: Sequence[Device] | str = [choose_device(bundle, device) for device in wanted]
        except VesselError as e:
            found = str(e)
        pickle.dump(found, replies)


def _engines(bundle: Bundle, device: Device) -> EngineSet:
    """The bundle's engines for the GPU `device`. Raises EngineError as EngineSet.open does."""
    version = builder_version(device.kind)
    if version is None:
        raise EngineError(f"--device {device}: the version of TensorRT-RTX is unknown; pip install --force-reinstall 'vessel-rt[rtx]'")
    return EngineSet.open(bundle, Target(device.kind, list_gpus()[device.index].architecture, version))

"""A bundle on a device: which device, which file each stage is loaded from there, and the proof that no such file was changed.

Nothing of a bundle is loaded but through `deploy`: what reaches ONNX Runtime has been hashed before, once, and nothing else has been read.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vessel_rt.bundle import BUNDLE_FILE, Bundle, sha256_of
from vessel_rt.engine import EngineSet, Target, builder_version, writable_by_anyone
from vessel_rt.errors import BundleError, EngineError, VesselError
from vessel_rt.gpu import list_gpus
from vessel_rt.plan import make_plan
from vessel_rt.session import Device, EngineCache, Session, device_fault, open_device
from vessel_rt.shapes import Workload, stage_profile

__all__ = ["AUTO", "Deployment", "choose_device", "choose_devices", "deploy", "deployment_fault"]

_NO_BF16 = "ONNX Runtime computes no bf16 on the CPU: run it on a GPU (--device cuda or rtx), or export it with --precision fp32"

MOST_IMAGES = 8  # of a batch, unless more are asked for
_CHOOSER = "from vessel_rt.deployment import answer_parent; answer_parent()"
_CHOOSING = 300  # seconds; drivers of many GPUs take a while to start

AUTO = ("rtx", "cuda", "cpu")  # what `auto` tries; not `tensorrt`, which at first spends minutes on building engines


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A bundle whose files were found unchanged, on a device that works.

    `graphs` has the file of each stage; `batch` images run at once.
    """

    bundle: Bundle
    device: Device
    graphs: dict[str, Path]
    batch: int = 1

    def session(self, stage: str, threads: int = 0) -> Session:
        """Load a stage. See Session for `threads` and errors; EngineError where compiled code would be kept in a folder open to all."""
        compiles = self.device.kind in ("tensorrt", "rtx")
        return Session(self.graphs[stage], self.device, threads, cache=self._cache(stage) if compiles else None)

    def sessions(self, threads: int = 0) -> dict[str, Session]:
        """Load every stage, side by side; if one cannot be loaded, none stays. See `session`."""
        with ThreadPoolExecutor(len(self.graphs)) as pool:
            loading = {stage: pool.submit(self.session, stage, threads) for stage in self.graphs}
        return {stage: future.result() for stage, future in loading.items()}

    def _cache(self, stage: str) -> EngineCache | None:
        """In the user's own folder, since engines are code, and named by the bundle's content, since ONNX Runtime looks at no weights.

        None where there is no such folder to write to: then nothing is kept.
        """
        whole = Path.home() / ".cache" / "vessel-rt" / sha256_of(self.bundle.folder / BUNDLE_FILE)
        folder = whole / stage
        try:
            whole.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            return None
        for path in (whole, folder):
            if writable_by_anyone(path):
                raise EngineError(f"{path}: may be written by anyone; remove it, since what is in it would be run")
        workload = Workload(max_batch=self.batch, opt_batch=self.batch)
        return EngineCache(folder, stage_profile(self.bundle, self.bundle.stages[stage], workload))


def deploy(bundle: Bundle, wanted: Device, progress: Callable[[int, int], object] | None = None, *, batch: int | None = None) -> Deployment:
    """Choose the device, and check every file that will be read there; `progress` is told of each bytes read, and of all there are.

    `auto` is the first of AUTO that runs this bundle. On `rtx` the graphs' own files are not read, the engines built from them are.
    `batch` images run at once; None leaves it to the device: one on a CPU, which gains nothing by more (docs/performance.md), on a GPU as
    many, up to MOST_IMAGES, as its engines take and `vessel-rt plan` finds room for.

    Raises:
        VesselError: a device asked for by name cannot be used; nothing else is taken in its place.
        BundleError: a file of the bundle is missing or was changed.
        EngineError: an engine is missing, was changed, or is not for this bundle, GPU or TensorRT-RTX, or for batches so large.
    """
    device = choose_device(bundle, wanted)
    if _lacks_kernels(bundle, device):
        raise BundleError(f"{bundle.folder}: {_NO_BF16}")
    engines = _engines(bundle, device) if device.kind == "rtx" else None
    if engines and batch and batch > engines.max_batch:
        build = "raise engines.max_batch in the recipe and vessel-export build again"
        raise EngineError(f"{engines.folder}: built for {engines.max_batch} images at once, not {batch}; lower --batch, or {build}")
    records = bundle.used_files(graphs=engines is None)
    total = sum(record.bytes for record in [*records.values(), *(engines.files.values() if engines else ())] if record)

    def advance(read: int) -> None:
        if progress:
            progress(read, total)

    bundle.verify_files(advance, graphs=engines is None)
    images = batch or _most_images(bundle, device, engines)
    if engines is None:
        return Deployment(bundle, device, {name: bundle.folder / stage.file for name, stage in bundle.stages.items()}, images)
    engines.verify(advance)
    return Deployment(bundle, device, {name: engines.folder / f"{name}.onnx" for name in bundle.stages}, images)


def _most_images(bundle: Bundle, device: Device, engines: EngineSet | None) -> int:
    """How many images run at once unless the user says."""
    if device.kind == "cpu":
        return 1
    if engines:  # whose recipe was planned for the card
        return min(engines.max_batch, MOST_IMAGES)
    memory = list_gpus()[device.index].memory
    return max((images for images in range(2, MOST_IMAGES + 1) if make_plan(bundle, images, memory).fits), default=1)


def deployment_fault(bundle: Bundle, device: Device) -> str | None:
    """Why `bundle` cannot run on `device`, and what would mend it; None if it can. The contents of files are not read."""
    fault = device_fault(device)
    if fault is None and device.kind == "rtx":
        try:
            _engines(bundle, device)
        except EngineError as e:
            return str(e)
    return fault or (_NO_BF16 if _lacks_kernels(bundle, device) else None)


def _lacks_kernels(bundle: Bundle, device: Device) -> bool:
    return bundle.precision == "bf16" and device.kind == "cpu"


def choose_device(bundle: Bundle, wanted: Device) -> Device:
    """The device that `deploy` takes for `wanted`. `gpu` is the first kind of AUTO but the CPU that runs this bundle on that GPU.

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
    """`choose_device` of each. Of several GPUs, and with `apart`, a process of its own does it: to find out whether a GPU works takes memory
    on it, until the process ends.

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
        raise VesselError(f"looking for devices ended with exit code {done.returncode}: nvidia-smi may say why") from e
    if isinstance(found, str):
        raise VesselError(found)
    return tuple(found)


def answer_parent() -> None:
    """The process of `choose_devices`: a bundle and devices come on standard input, devices or an error's text go out."""
    bundle, wanted = pickle.load(sys.stdin.buffer)
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # what a library prints is not for the parent
        try:
            found: Sequence[Device] | str = [choose_device(bundle, device) for device in wanted]
        except VesselError as e:
            found = str(e)
        pickle.dump(found, replies)


def _engines(bundle: Bundle, device: Device) -> EngineSet:
    """The bundle's engines for the GPU `device`. Raises EngineError as EngineSet.open does."""
    version = builder_version(device.kind)
    if version is None:
        raise EngineError(f"--device {device}: TensorRT-RTX does not tell its version; pip install --force-reinstall 'vessel-rt[rtx]'")
    return EngineSet.open(bundle, Target(device.kind, list_gpus()[device.index].architecture, version))

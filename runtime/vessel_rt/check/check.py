"""`vessel-rt check`: a bundle proves itself on this machine. All checks in order, as far as they can go, without PyTorch and checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
from tqdm import tqdm

from vessel_rt.check.cine import check_cine
from vessel_rt.check.loading import load
from vessel_rt.check.machine import check_gpu, check_machine
from vessel_rt.check.memory import check_memory
from vessel_rt.check.parity import check_parity, golden_images
from vessel_rt.check.record import Record
from vessel_rt.check.repeat import check_determinism, check_endurance
from vessel_rt.check.report import write_check
from vessel_rt.check.schema import CheckedBundle, CheckFile, CheckLine
from vessel_rt.check.speed import MEASURED_TILES, check_speed, first_run
from vessel_rt.device.cuda_driver import list_gpus
from vessel_rt.device.deployment import Deployment, check_bundle, choose_device, deploy_on, deployment_fault
from vessel_rt.device.host_memory import available_memory, needed_memory, require_memory
from vessel_rt.device.memory_plan import make_plan
from vessel_rt.device.providers import Device, open_device
from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.golden import Golden
from vessel_rt.io.checked_files import CheckedFiles
from vessel_rt.measure.frames import frame_of
from vessel_rt.measure.memory import MemoryWatch, gpu_memory_in_use, size
from vessel_rt.measure.redact import redactor
from vessel_rt.model.segmenter import Segmenter

__all__ = ["CheckOptions", "check"]

_NO_GOLDENS = "the bundle has no goldens: `vessel-export verify --record` writes them, where it was exported"


@dataclasses.dataclass(frozen=True)
class CheckOptions:
    """What to check, where, and where the results go.

    `devices` may hold `auto` and `gpu`. `threads` 0 uses all cores. `minutes` of the soak; 0: none.
    """

    bundle: Path
    output: Path
    devices: tuple[Device, ...]
    threads: int = 0
    minutes: float = 0.0


def check(options: CheckOptions, say: Callable[[CheckLine], object]) -> CheckFile:
    """Make all checks, tell each line, and write check.json and check.html to `options.output`.

    Raises:
        VesselError: the results cannot be written.
    """
    record = Record(redactor(options.bundle), say, lambda found: write_check(options.output, found))
    check_machine(record)
    _Check(options, record).run()
    found = record.file(finished=True)
    write_check(options.output, found)
    return found


@dataclasses.dataclass(frozen=True)
class _Place:
    """A device by name; the device itself if it works, whether the bundle fits there, and a GPU's memory in use before it was tried."""

    name: str
    device: Device | None = None
    fits: bool = False
    in_use: int | None = None


class _Check:
    """The checks of one call. A step that fails makes a line, and what depends on it is skipped."""

    def __init__(self, options: CheckOptions, record: Record) -> None:
        self._options, self._record = options, record
        self._golden: Golden | None = None

    def run(self) -> None:
        bundle, fault = self._read()
        places = [self._place(bundle, wanted) for wanted in dict.fromkeys(self._options.devices)]
        self._record.device = None
        files = self._files(bundle, fault)
        targets = [self._target(bundle, place) for place in places]
        for place, engines in zip(places, targets, strict=True):
            self._record.device = place.name
            if bundle and place.device and place.fits and files is not None and engines is not None:
                with MemoryWatch(place.device, place.in_use) as watch, self._record.attempt("loading", "bundle"):
                    self._run(deploy_on(bundle, place.device, files=files | engines), watch)
            self._record.complete()

    def _read(self) -> tuple[Bundle | None, str]:
        """bundle.json, or what is wrong with it. The devices come before it, and some of them depend on it."""
        try:
            bundle = Bundle.load(self._options.bundle)
        except BundleError as e:
            return None, str(e)
        layers, origin = bundle.language_model.layers, bundle.provenance
        self._record.bundle = CheckedBundle(bundle.sha256, bundle.precision, bundle.weights, origin.checkpoint, layers, cases=0)
        return bundle, ""

    def _place(self, bundle: Bundle | None, wanted: Device) -> _Place:
        """The device that `wanted` stands for, and whether the bundle fits there."""
        self._record.device = str(wanted)
        if bundle is None and wanted.kind in ("auto", "gpu"):
            self._record.skipped("machine", "device", "the first that runs the bundle, which cannot be read")
            return _Place(str(wanted))
        in_use = gpu_memory_in_use(wanted.index) if wanted.kind != "cpu" else None
        with self._record.attempt("machine", "device"):
            device = choose_device(bundle, wanted) if bundle else open_device(wanted)
            self._record.device = str(device)
            self._record.passed("machine", "device", "works")
            check_gpu(self._record, device)
            fits = bundle is not None and self._fits(bundle, device)
            return _Place(str(device), device, fits, in_use if device.kind != "cpu" else None)
        return _Place(str(wanted))

    def _files(self, bundle: Bundle | None, fault: str) -> CheckedFiles | None:
        """bundle.json, the files that it names, and the goldens; returns the files that were hashed."""
        if bundle is None:
            self._record.failed("bundle", "bundle.json", fault)
            return None
        weights = f" with {bundle.weights} weights" if bundle.quantization else ""
        self._record.passed("bundle", "bundle.json", f"{bundle.precision}{weights}, {bundle.language_model.layers} layers")
        files = self._hashed(bundle)
        self._goldens(bundle)
        return files

    def _hashed(self, bundle: Bundle) -> CheckedFiles | None:
        """The files of bundle.json, hashed."""
        with self._record.attempt("bundle", "files"):
            total = sum(record.bytes for record in bundle.used_files().values() if record)
            with tqdm(total=total, desc="hashing", unit="B", unit_scale=True, disable=None, delay=2, leave=False) as bar:
                files = bundle.verify_files(bar.update)
            self._record.passed("bundle", "files", f"{len(files)} files, {size(total)}, as they were exported")
            return files
        return None

    def _goldens(self, bundle: Bundle) -> None:
        """The reference's answers, if the bundle has them."""
        if bundle.golden is None:
            self._record.skipped("bundle", "goldens", _NO_GOLDENS)
            return
        with self._record.attempt("bundle", "goldens"):
            golden = Golden.load(bundle)
            if golden and self._record.bundle:
                self._golden, made = golden, golden.file.reference
                self._record.bundle = msgspec.structs.replace(self._record.bundle, cases=len(golden.cases))
                torch = f"PyTorch {made.versions.get('torch', 'of an unknown version')}"
                cases = f"{len(golden.cases)} cases on {len(golden.frames)} frames{' and a cine' if golden.cine else ''}"
                self._record.passed("bundle", "goldens", f"{cases}, by {torch} in {made.precision}")

    def _fits(self, bundle: Bundle, device: Device) -> bool:
        """Whether the bundle fits in the memory of the device, with one image at once."""
        with self._record.attempt("machine", "memory"):
            if device.kind == "cpu":
                require_memory(bundle)
                needed, free = needed_memory(bundle), available_memory()
                of = "" if free is None else f"; {size(free)} are available"
                self._record.passed("machine", "memory", f"{'an unknown amount' if needed is None else size(needed)} planned{of}")
                return True
            plan = make_plan(bundle, 1, list_gpus()[device.index].memory)
            fault = None if plan.fits else "it does not fit, even with one image at once: `vessel-rt plan` says what to lower"
            figure = f"{size(plan.total)} planned for one image at once, of {size(plan.memory)}"
            self._record.judged("machine", "memory", figure, fault)
            return plan.fits
        return False

    def _target(self, bundle: Bundle | None, place: _Place) -> CheckedFiles | None:
        """The files of the engines that the device runs, hashed; none if it runs the graphs."""
        device, self._record.device = place.device, place.name
        if bundle is None or device is None:
            return None
        with self._record.attempt("bundle", "target"):
            if fault := deployment_fault(bundle, device):
                raise BundleError(fault)
            if device.kind != "rtx":
                self._record.passed("bundle", "target", f"{device.kind} runs the graphs themselves")
                return {}
            files = check_bundle(bundle, [device], None)
            self._record.passed("bundle", "target", f"engines for this GPU and this TensorRT-RTX, {len(files)} files, as they were built")
            return files
        return None

    def _run(self, deployment: Deployment, watch: MemoryWatch) -> None:
        """Load it, and check all that needs it loaded."""
        record, options, bundle, device = self._record, self._options, deployment.bundle, deployment.device
        question = bundle.prompt.default_question
        with load(record, deployment, options.threads, watch) as shared:
            if shared is None:
                return
            with Segmenter(shared) as segmenter:
                first_ms = first_run(record, segmenter, bundle)
                if first_ms is None:
                    return
                if self._golden is None:
                    record.skipped("parity", "goldens", _NO_GOLDENS if bundle.golden is None else "the goldens cannot be used")
                else:
                    with record.attempt("parity", "run"):
                        check_parity(record, shared, self._golden)
                images = [frame_of(tiles, bundle.tiles) for tiles in MEASURED_TILES]
                check_determinism(record, segmenter, images, question)
                check_speed(record, segmenter, shared, first_ms)
                check_memory(record, shared, watch)
                with record.attempt("cines", "run"):
                    check_cine(record, shared, self._golden)
                soaked = [*images, *(golden_images(self._golden) if self._golden else ())]
                check_endurance(record, segmenter, soaked, question, options.minutes, device, watch)

"""`vessel-rt check`: a bundle proves itself on this machine. All checks in order, as far as they can go. Needs no PyTorch and no checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec

from vessel_rt.check.frames import frame_of
from vessel_rt.check.loading import load
from vessel_rt.check.machine import check_gpu, check_machine
from vessel_rt.check.memory import MemoryWatch, check_memory
from vessel_rt.check.parity import check_parity, golden_images
from vessel_rt.check.record import Record
from vessel_rt.check.redact import redactor
from vessel_rt.check.repeat import check_determinism, check_endurance
from vessel_rt.check.report import write_check
from vessel_rt.check.schema import CheckedBundle, CheckFile, CheckLine
from vessel_rt.check.speed import MEASURED_TILES, check_speed, first_run
from vessel_rt.device.cuda_driver import list_gpus
from vessel_rt.device.deployment import Deployment, check_bundle, choose_device, deploy_on, deployment_fault
from vessel_rt.device.host_memory import available_memory, needed_memory, require_memory
from vessel_rt.device.memory_plan import make_plan
from vessel_rt.device.providers import Device
from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.golden import Golden
from vessel_rt.io.checked_files import CheckedFiles
from vessel_rt.model.segmenter import Segmenter

__all__ = ["CheckOptions", "check"]

_GB = 1e9
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


def check(
    options: CheckOptions,
    say: Callable[[CheckLine], object],
    progress: Callable[[int, int], object] | None = None,
) -> CheckFile:
    """Make all checks, tell each line, and write check.json and check.html to `options.output`.

    `progress` gets the bytes hashed each time, and their total.

    Raises:
        VesselError: the results cannot be written.
    """
    record = Record(redactor(options.bundle), say, lambda found: write_check(options.output, found))
    check_machine(record)
    _Check(options, record, progress).run()
    found = record.file(finished=True)
    write_check(options.output, found)
    return found


class _Check:
    """The checks of one call. A step that fails makes a line, and what depends on it is skipped."""

    def __init__(self, options: CheckOptions, record: Record, progress: Callable[[int, int], object] | None) -> None:
        self._options, self._record, self._progress = options, record, progress
        self._golden: Golden | None = None

    def run(self) -> None:
        bundle = self._bundle()
        if bundle is None:
            self._record.complete()
            return
        files = self._files(bundle)
        self._goldens(bundle)
        for wanted in dict.fromkeys(self._options.devices):
            self._record.device = str(wanted)
            device = self._device(bundle, wanted)
            if device:
                self._on_device(bundle, device, files)
            self._record.complete()

    def _bundle(self) -> Bundle | None:
        """bundle.json, read."""
        with self._record.attempt("bundle", "bundle.json"):
            bundle = Bundle.load(self._options.bundle)
            layers = bundle.language_model.layers
            self._record.bundle = CheckedBundle(
                bundle.sha256, bundle.precision, bundle.weights, bundle.provenance.checkpoint, layers, cases=0
            )
            weights = f" with {bundle.weights} weights" if bundle.quantization else ""
            self._record.passed("bundle", "bundle.json", f"{bundle.precision}{weights}, {layers} layers")
            return bundle
        return None

    def _files(self, bundle: Bundle) -> CheckedFiles | None:
        """The files of bundle.json, hashed."""
        with self._record.attempt("bundle", "files"):
            total = sum(record.bytes for record in bundle.used_files().values() if record)
            read = 0

            def advance(more: int) -> None:
                nonlocal read
                read += more
                if self._progress:
                    self._progress(more, total)

            files = bundle.verify_files(advance)
            self._record.passed("bundle", "files", f"{len(files)} files, {total / _GB:.2f} GB, as they were exported")
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
                self._record.passed(
                    "bundle", "goldens", f"{len(golden.cases)} cases on {len(golden.frames)} frames, by {torch} in {made.precision}"
                )

    def _device(self, bundle: Bundle, wanted: Device) -> Device | None:
        """The device that `wanted` stands for, if it works."""
        with self._record.attempt("machine", "device"):
            device = choose_device(bundle, wanted)
            self._record.device = str(device)
            self._record.passed("machine", "device", "works")
            return device
        return None

    def _on_device(self, bundle: Bundle, device: Device, files: CheckedFiles | None) -> None:
        check_gpu(self._record, device)
        fits, engines = self._fits(bundle, device), self._engines(bundle, device)
        if files is not None and engines is not None and fits:
            with MemoryWatch(device) as watch, self._record.attempt("loading", "bundle"):
                self._run(deploy_on(bundle, device, files=files | engines), watch)

    def _fits(self, bundle: Bundle, device: Device) -> bool:
        """Whether the bundle fits in the memory of the device, with one image at once."""
        with self._record.attempt("machine", "memory"):
            if device.kind == "cpu":
                require_memory(bundle)
                free = available_memory()
                of = "" if free is None else f" of {free / _GB:.1f} GB available"
                self._record.passed("machine", "memory", f"the weights take {needed_memory(bundle) / _GB:.2f} GB{of}")
                return True
            plan = make_plan(bundle, 1, list_gpus()[device.index].memory)
            fault = None if plan.fits else "it does not fit, even with one image at once: `vessel-rt plan` says what to lower"
            figure = f"{plan.total / _GB:.2f} GB planned for one image at once, of {plan.memory / _GB:.2f} GB"
            self._record.judged("machine", "memory", figure, fault)
            return plan.fits
        return False

    def _engines(self, bundle: Bundle, device: Device) -> CheckedFiles | None:
        """The files of the engines that the device runs, hashed; none if it runs the graphs."""
        with self._record.attempt("bundle", "target"):
            if fault := deployment_fault(bundle, device):
                raise BundleError(fault)
            if device.kind != "rtx":
                self._record.passed("bundle", "target", f"{device.kind} runs the graphs themselves")
                return {}
            files = check_bundle(bundle, [device], None, lambda read, total: self._progress(read, total) if self._progress else None)
            self._record.passed("bundle", "target", f"engines for this GPU and this TensorRT-RTX, {len(files)} files, as they were built")
            return files
        return None

    def _run(self, deployment: Deployment, watch: MemoryWatch) -> None:
        """Load it, and check all that needs it loaded."""
        record, options, bundle, device = self._record, self._options, deployment.bundle, deployment.device
        question, name = bundle.prompt.default_question, str(device)
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
                        check_parity(record, shared, self._golden, name)
                images = [frame_of(tiles, bundle.tiles) for tiles in MEASURED_TILES]
                check_determinism(record, segmenter, images, question)
                batch = check_speed(record, segmenter, shared, name, first_ms)
                check_memory(record, shared, watch, batch)
                soaked = [*images, *(golden_images(self._golden) if self._golden else ())]
                check_endurance(record, segmenter, soaked, question, options.minutes, device, watch)

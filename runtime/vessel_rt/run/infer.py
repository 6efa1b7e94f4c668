"""A run from its inputs to its output folder: which frames are left, which workers run them, and what is written at the end.

Does not know how a frame is segmented or what is printed after the run.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

import vessel_rt
from vessel_rt.device.deployment import check_bundle, choose_devices
from vessel_rt.device.providers import Device
from vessel_rt.errors import BundleError, VesselError
from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle
from vessel_rt.formats.engine_sidecar import ENGINES
from vessel_rt.inputs.frames import Frame, Naming, Selection, find_frames
from vessel_rt.inputs.input_files import told_kinds
from vessel_rt.inputs.pseudonyms import printable
from vessel_rt.io.folder_lock import FolderLock, locked
from vessel_rt.results.cines import write_cines
from vessel_rt.results.reader import REPORT_FILE, read_run
from vessel_rt.results.report import write_report
from vessel_rt.results.run_file import write_run
from vessel_rt.results.writer import Entry, FrameWriter
from vessel_rt.run.earlier import read_earlier
from vessel_rt.run.journal import Record
from vessel_rt.run.process_pool import ProcessPool
from vessel_rt.run.ray_pool import RayPool
from vessel_rt.run.stop import Stop
from vessel_rt.run.summary import Summary, run_content
from vessel_rt.run.worker import Job, Worker, WorkOptions, cores

__all__ = ["InferOptions", "infer"]

_Workers: TypeAlias = Worker | ProcessPool | RayPool


@dataclasses.dataclass(frozen=True)
class InferOptions:
    """The options of `infer`.

    `inputs` are files, folders and globs; `selection` chooses their frames; every question of `work` is asked about each frame.
    Several `devices` run in a process each, or as actors of the Ray cluster at `ray`. `overwrite` starts again, `prune` removes the
    results of frames that are no longer among the inputs. `fail_fast` ends the run at the first frame that fails. `quiet` prints only
    errors, `verbose` prints a line for each frame.
    """

    inputs: tuple[str, ...]
    output: Path
    naming: Naming
    work: WorkOptions
    selection: Selection = dataclasses.field(default_factory=Selection)
    devices: tuple[Device, ...] = (Device("auto"),)
    ray: str | None = None
    overwrite: bool = False
    prune: bool = False
    fail_fast: bool = False
    quiet: bool = False
    verbose: bool = False

    def content(self) -> dict[str, Any]:
        """The options in run.json, without names of inputs or folders."""
        selection, naming = self.selection, self.naming
        return {
            **dataclasses.asdict(self.work),
            "devices": [str(device) for device in self.devices],
            "frames": [selection.frames.start, selection.frames.stop, selection.frames.step] if selection.frames else None,
            "num_images": selection.num_images,
            "recursive": selection.recursive,
            "series": selection.series,
            "num_shards": selection.shards,
            "shard_id": selection.shard,
            "pseudonymize": naming.pseudonymize,
            "show_names": naming.show_names,
            "key": naming.codes.key_id,
        }


def infer(bundle: Bundle, options: InferOptions) -> Summary:
    """Segment every frame and write the results. A frame that fails becomes a line in results.jsonl, and the others are still processed.

    Results of an earlier run into the same folder, with the same settings and inputs, are kept. The folder is locked from before it is read
    until the run ends.

    Raises:
        VesselError: the run could not start (inputs, output folder, question, device, bundle), a result could not be written, or the bundle
            is gone at the end.
    """
    began = time.perf_counter()
    with locked(options.output, make=True) as lock:
        return _infer(bundle, options, lock, began)


def _infer(bundle: Bundle, options: InferOptions, lock: FolderLock, began: float) -> Summary:
    if options.work.propagate and (len(options.devices) > 1 or options.ray):
        raise VesselError("--propagate uses one device; split the files between several with --num-shards and --shard-id")
    started, stop, say = datetime.datetime.now(datetime.UTC), Stop(), _Console(options)
    earlier = read_earlier(options.output)
    found = find_frames(options.inputs, options.naming, options.selection, earlier.cines(), options.output)
    frames, names = found.frames, found.names
    for place, kinds in found.skipped.items():
        say(f"skipped in {place}: {told_kinds(kinds)}")
    if found.told:
        say(found.told)
    if not frames:
        raise VesselError(
            f"shard {options.selection.shard} of {options.selection.shards}: there are fewer files than shards; lower --num-shards"
        )
    record = Record(lock, earlier, frames, options.overwrite, options.prune)
    devices = _choose(bundle, options)
    settings, sources = _settings(bundle, options, devices[0].kind), _sources(bundle)
    left = record.resume(settings, options.work.questions, cines=options.work.propagate is not None)
    summary = _summary_of(record, frames, len(names), say)
    summary.skipped = found.skipped
    if summary.unread and options.fail_fast:
        left = []
    elif not left and record.is_settled and _is_finished(options):
        return summary
    for warning in earlier.warnings:
        say(f"warning: {warning}")
    if left:
        work, writer = _share(options.work, devices), FrameWriter(options.output, names, settings, cines=options.work.propagate is not None)
        jobs = [Job(bundle, device, work, writer, len(names), options.naming.show_names) for device in devices]
        with _workers(jobs, options.ray, stop, say) as workers:
            _announce(options, devices, bundle)
            summary.load_seconds = time.perf_counter() - began
            with record, stop.on_signals():
                _run(workers, record, left, summary, stop, options, say)
            summary.streams, summary.batch, summary.least_batch = workers.streams, workers.batch, workers.least_batch
        summary.seconds = time.perf_counter() - began - summary.load_seconds
    else:
        with record:
            pass
    summary.stopped = stop.signal
    if summary.images == summary.total:
        _check_sources(bundle, sources, options.output)
        _finish(bundle, options, devices, started, summary)
    return summary


def _summary_of(record: Record, frames: Sequence[Frame], in_all_shards: int, say: _Console) -> Summary:
    """The counts of the kept frames. Inputs that cannot be read now are reported."""
    summary = Summary(total=len(frames), in_all_shards=in_all_shards)
    for entry in record.kept:
        summary.count(entry)
    summary.kept, summary.unread = summary.images, len(record.unread)
    for frame in frames:
        if frame.name in record.unread:
            say(f"error: {frame.shown}: {record.unread[frame.name]}; the results of an earlier run are kept")
    return summary


def _sources(bundle: Bundle) -> list[str]:
    """The bundle's files that exist now."""
    return [name for name in (BUNDLE_FILE, *bundle.used_files()) if (bundle.folder / name).is_file()]


def _check_sources(bundle: Bundle, names: Sequence[str], output: Path) -> None:
    """Make sure that these files still exist: a run is not finished if nobody can inspect its bundle."""
    gone = [name for name in names if not (bundle.folder / name).is_file()]
    if gone:
        others = f" and {len(gone) - 1} other files" if len(gone) > 1 else ""
        raise BundleError(
            f"{bundle.folder}: {gone[0]}{others} disappeared during the run; the results in {output} are kept: "
            "restore the bundle and give the same command again to finish"
        )


def _choose(bundle: Bundle, options: InferOptions) -> Sequence[Device]:
    """The devices of this run. Of the GPUs of a cluster only the kind is known."""
    kind = options.devices[0].kind
    if options.ray and kind == "gpu":
        raise VesselError("--ray uses every GPU of the cluster; give their kind with --device cuda or rtx, not their numbers")
    if options.ray and kind not in ("auto", "cpu"):
        return [Device(kind)] * len(options.devices)
    return choose_devices(bundle, options.devices, apart=options.ray is not None)


def _is_finished(options: InferOptions) -> bool:
    """Whether run.json and the report exist, and name frames as this run would."""
    if not (options.output / REPORT_FILE).exists():
        return False
    try:
        told, naming = read_run(options.output)["options"], options.naming
    except VesselError:  # it is written again
        return False
    return (told["show_names"], told["key"]) == (naming.show_names, naming.codes.key_id)


def _run(
    workers: _Workers, record: Record, left: Sequence[Frame], summary: Summary, stop: Stop, options: InferOptions, say: _Console
) -> None:
    shown = {frame.name: frame.shown for frame in left}
    with tqdm(total=summary.total, initial=summary.kept, unit="frame", disable=True if options.quiet else None, dynamic_ncols=True) as bar:
        for entry in workers.run(left):
            record.add(entry)
            summary.count(entry)
            bar.update()
            if entry.error is not None:
                say(f"error: {shown[entry.name]}: {entry.error}")
                if options.fail_fast:
                    stop.set()
            elif options.verbose:
                say(_told(shown[entry.name], entry))


def _told(shown: str, entry: Entry) -> str:
    masks, ms = sum(len(line["masks"]) for line in entry.lines), sum(entry.timings[0]["ms"].values())
    return f"{shown}: {masks} mask{'s' * (masks != 1)}, {ms:.0f} ms"


@contextmanager
def _workers(jobs: Sequence[Job], ray: str | None, stop: Stop, say: _Console) -> Iterator[_Workers]:
    """One device runs in this process, several in a process each. The bundle is checked once for all; Ray's actors check it themselves."""
    if ray:
        with RayPool(jobs, ray, stop) as actors:
            yield actors
        return
    with tqdm(desc="checking the bundle", unit="B", unit_scale=True, disable=say.hidden, delay=2, leave=False) as bar:

        def advance(read: int, total: int) -> None:
            bar.total = total
            bar.update(read)

        workers: Worker | ProcessPool
        if len(jobs) == 1:
            workers = jobs[0].open(stop, say, advance)
        else:
            first = jobs[0]
            files = check_bundle(first.bundle, [job.device for job in jobs], first.options.batch, first.streams, advance)
            workers = ProcessPool([dataclasses.replace(job, files=files) for job in jobs], stop, say)
    with workers:
        yield workers


class _Console:
    """Standard error, without tearing the progress bar."""

    def __init__(self, options: InferOptions) -> None:
        self._quiet = options.quiet
        self.hidden = True if options.quiet else None  # None: a bar on terminals only

    def __call__(self, text: str) -> None:
        if not self._quiet or text.startswith("error"):
            tqdm.write(f"vessel-rt: {printable(text)}", file=sys.stderr)


def _share(work: WorkOptions, devices: Sequence[Device]) -> WorkOptions:
    """The options for one of several workers, which share the CPU."""
    if len(devices) == 1 or devices[0].kind != "cpu":
        return work
    return dataclasses.replace(work, threads=max(1, (work.threads or cores()) // len(devices)))


def _settings(bundle: Bundle, options: InferOptions, kind: str) -> str:
    """A hash of everything that decides the results. How many frames run at once, and where, does not."""
    decisive = {
        "version": vessel_rt.__version__,
        "bundle": bundle.sha256,
        "kind": kind,
        "questions": options.work.questions,
        "draft": options.work.draft,
        "rescale": dataclasses.asdict(options.work.rescale) if options.work.rescale else None,
        "pseudonymize": options.naming.codes.key_id if options.naming.pseudonymize else None,
    }
    if options.work.propagate:  # a frame depends on the others of its cine
        frames = options.selection.frames
        decisive["propagate"] = [options.work.propagate, repr(frames), options.selection.num_images]
        if options.selection.series:
            decisive["series"] = True
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _announce(options: InferOptions, devices: Sequence[Device], bundle: Bundle) -> None:
    """Print the device: `auto` may have chosen another one than the user expects."""
    device, wanted, note = devices[0], options.devices[0], ""
    if (device.kind, bundle.weights) == ("cpu", "fp16"):
        note = ": slow, and its matrices take twice their size in memory; use a GPU, or export with --recipe cpu-int8"
    elif wanted.kind == "auto" and device.kind != "rtx" and (bundle.folder / ENGINES).is_dir():
        note = f": the bundle's engines are not used (vessel-rt devices --bundle {bundle.folder} says why)"
    if not options.quiet:
        print(f"device {', '.join(map(str, devices))}{note}", file=sys.stderr)


def _finish(bundle: Bundle, options: InferOptions, devices: Sequence[Device], started: datetime.datetime, summary: Summary) -> None:
    """Write what covers all results: cines, run.json, which says that every frame was tried, and then the report."""
    write_cines(options.output)
    write_run(options.output, run_content(bundle, devices, options.content(), started, summary))
    write_report(options.output)

"""`vessel-rt infer`: its options, the run, and what is printed at the end."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vessel_rt.cli import arguments as types

if TYPE_CHECKING:
    from vessel_rt.run.summary import Summary

__all__ = ["add_infer", "run_infer"]

_MAX_STREAMS = 256
_THREADS_PER_CORE = 4

_INFER = """examples:
  vessel-rt infer frames/ --bundle engines/iter_12192-fp16 --prompt 'Please segment catheter in this image.'
  vessel-rt infer cine.dcm --frames 10:60:5               frames 10, 15, ... 55 of each cine; the first is 0
  vessel-rt infer cine.dcm --propagate                    ask about a few frames, track their objects through the others
  vessel-rt infer frames/ --propagate --series            img_0001.png, img_0002.png ... are one cine
  vessel-rt infer frames/ --devices 0,1,2,3               four GPUs; cpu:2 is two processes on the CPU
  vessel-rt infer frames/ --num-shards 4 --shard-id 0     the first of four hosts
  vessel-rt merge-shards shard0 shard1 shard2 shard3 -o all   then combine their results
  vessel-rt infer frames/ --pseudonymize --json | tail -1 study codes instead of names, and a line for programs

A run that was stopped continues when the same command is given again. Exit codes: 0 done, 1 bad input or frames that failed, 2 bad usage,
130 and 143 stopped by SIGINT and SIGTERM; whether anything could be printed does not matter.
"""


def add_infer(commands: Any) -> None:
    infer = commands.add_parser(
        "infer",
        help="segment images: masks, overlays, results.jsonl, report.html",
        epilog=_INFER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    infer.set_defaults(run=run_infer, usage_error=infer.error)
    infer.add_argument("inputs", nargs="+", metavar="IMAGES", help="files, folders or globs (JPG, PNG, TIFF, BMP, WebP, DICOM)")
    infer.add_argument("-o", "--output", type=Path, metavar="DIR", help="the output folder (default: out/<bundle name>)")
    infer.add_argument("--bundle", type=Path, metavar="DIR", help="what to run (default: $VESSEL_BUNDLE, else the newest under ./engines)")
    infer.add_argument(
        "--prompt",
        action="append",
        type=types.unicode_text,
        metavar="TEXT",
        help="the question; repeat it to ask several of every image (default: the bundle's, 'Please segment vessel in this image.')",
    )
    infer.add_argument("--overwrite", action="store_true", help="start again: replace an earlier run's results in DIR; keep other files")
    infer.add_argument("--prune", action="store_true", help="remove an earlier run's results of images that are no longer among IMAGES")
    infer.add_argument("--fail-fast", action="store_true", help="stop at the first image that fails")

    which = infer.add_argument_group("which frames, and how they are read")
    which.add_argument(
        "--frames",
        type=types.frames,
        metavar="A:B:STEP",
        help="of each cine, as in Python: 10:60:5, 0, --frames=-20: (default: all); the pages of a TIFF are frames only with this option",
    )
    which.add_argument(
        "--rescale",
        nargs="?",
        const="",
        type=types.rescale,
        metavar="LOW:HIGH",
        help="also take gray images of more than 8 bits: LOW becomes black, HIGH white (without a value: each file's own range)",
    )
    types.add_propagate(
        which,
        "track the answer's objects through each cine: best-frame (without a value) asks about up to 3 frames with most contrast "
        "and tracks from them in both directions; sa2va asks about the first 5 frames and tracks forward, exactly as Sa2VA does; the pages "
        "of a TIFF are frames, too",
    )
    which.add_argument(
        "--series",
        action="store_true",
        help="with --propagate: files of one folder whose names differ only in their last number are the frames of one cine, in the order "
        "of the numbers; other files stay images",
    )
    which.add_argument("--recursive", action="store_true", help="also search the subfolders of folders; a/b/x.png gives masks/a__b__x.png")
    which.add_argument("--num-images", type=types.positive, metavar="N", help="only the first N frames")
    which.add_argument("--num-shards", type=types.positive, metavar="K", help="split the files between K runs (see vessel-rt merge-shards)")
    which.add_argument("--shard-id", type=types.natural, metavar="I", help="which of the K shards to run, from 0 to K-1")

    where = infer.add_argument_group("where it runs")
    devices = where.add_mutually_exclusive_group()
    devices.add_argument(
        "--device",
        type=types.device,
        metavar="DEVICE",
        help="auto, cpu, cuda, rtx or tensorrt, or cuda:N for GPU number N (default: auto; see vessel-rt devices)",
    )
    devices.add_argument(
        "--devices", type=types.several_devices, metavar="LIST", help="a process for each: 0,1,2,3 or cuda:0,cuda:1 or cpu:2"
    )
    where.add_argument(
        "--ray",
        nargs="?",
        const="local",
        type=types.ray_address,
        metavar="ADDRESS",
        help="on a Ray cluster, one GPU per actor (without ADDRESS: start one on this host)",
    )
    where.add_argument(
        "--threads",
        type=types.positive,
        default=0,
        metavar="N",
        help=f"CPU threads of all streams together, at most {_THREADS_PER_CORE} per core (default: all cores)",
    )
    where.add_argument(
        "--streams",
        type=types.up_to(_MAX_STREAMS),
        metavar="N",
        help="batches that run at the same time (default: up to 4 on a CPU, 1 for a large model or on a GPU)",
    )
    where.add_argument(
        "--batch", type=types.up_to(types.MAX_BATCH), metavar="N", help="images at once (default: 1 on a CPU, as many as fit on a GPU)"
    )
    where.add_argument("--no-draft", action="store_true", help="decode token by token, as the training code does; the answers are the same")

    output = infer.add_argument_group("what is printed, and how files are called")
    types.add_naming(output)
    output.add_argument("--pseudonymize", action="store_true", help="also use study codes in the names of output files")
    output.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    output.add_argument("-v", "--verbose", action="store_true", help="print a line for each frame")
    output.add_argument("--json", action="store_true", help="print a summary for programs as the last line")


def run_infer(arguments: argparse.Namespace) -> int:
    from vessel_rt.device.providers import Device
    from vessel_rt.inputs.frames import Selection
    from vessel_rt.run.infer import InferOptions, infer  # here, so that --help does not wait for the libraries
    from vessel_rt.run.worker import WorkOptions

    _check_bounds(arguments)
    if arguments.series and not arguments.propagate:
        arguments.usage_error("--series needs --propagate: without it, every file is an image of its own")
    if arguments.series and arguments.frames:
        arguments.usage_error("--frames counts the frames of a file: it does not go with --series; give the files to take instead")
    shard, shards = _shard(arguments)
    bundle = types.find_bundle(arguments.bundle, arguments.quiet)
    output = arguments.output or Path("out") / bundle.folder.resolve().name
    options = InferOptions(
        inputs=tuple(arguments.inputs),
        output=output,
        naming=types.naming_of(arguments, output, arguments.pseudonymize),
        work=WorkOptions(
            questions=tuple(dict.fromkeys(arguments.prompt or [bundle.prompt.default_question])),
            threads=arguments.threads,
            streams=arguments.streams,
            batch=arguments.batch,
            draft=not arguments.no_draft,
            rescale=arguments.rescale,
            propagate=arguments.propagate,
        ),
        selection=Selection(
            arguments.frames or (slice(None) if arguments.propagate else None),
            arguments.num_images,
            shards,
            shard,
            arguments.recursive,
            arguments.series,
        ),
        devices=arguments.devices or (arguments.device or Device("auto"),),
        ray=arguments.ray,
        overwrite=arguments.overwrite,
        prune=arguments.prune,
        fail_fast=arguments.fail_fast,
        quiet=arguments.quiet,
        verbose=arguments.verbose,
    )
    summary = infer(bundle, options)
    code = 128 + summary.stopped if summary.stopped else int(summary.failed + summary.unread > 0 or summary.images < summary.total)
    if not arguments.quiet:
        _print_summary(summary, output)
    if summary.images < summary.total:
        print(
            f"vessel-rt: stopped; {summary.images} of {summary.total} frames are done. Give the same command again to continue.",
            file=sys.stderr,
        )
    if arguments.json:
        print(json.dumps(_summary_json(summary, output, code)))
    return code


def _shard(arguments: argparse.Namespace) -> tuple[int, int]:
    """The shard to run and how many there are; a usage error if the options do not agree."""
    shard, shards = arguments.shard_id, arguments.num_shards
    if shards is None and shard is not None:
        arguments.usage_error("--shard-id needs --num-shards: how many shards there are")
    if shard is None and (shards or 1) > 1:
        arguments.usage_error(f"--num-shards {shards} needs --shard-id: the shard that this run takes, from 0 to {shards - 1}")
    if shard is not None and shard >= shards:
        arguments.usage_error(f"--shard-id {shard} is out of range: with --num-shards {shards} it is from 0 to {shards - 1}")
    return shard or 0, shards or 1


def _check_bounds(arguments: argparse.Namespace) -> None:
    """Refuse more threads and processes than this machine can use. The hosts of a cluster elsewhere are not known here."""
    from vessel_rt.run.worker import cores

    if arguments.ray not in (None, "local"):
        return
    processes = len(arguments.devices) if arguments.devices and arguments.devices[0].kind == "cpu" else 1
    if processes > cores():
        arguments.usage_error(
            f"--devices: {processes} processes on the CPU, but this process may use {cores()} cores; at most one per core"
        )
    if arguments.threads > (limit := _THREADS_PER_CORE * cores()):
        arguments.usage_error(
            f"--threads: {arguments.threads} are too many for the {cores()} cores that this process may use; at most {limit}"
        )


def _print_summary(summary: Summary, output: Path) -> None:
    from vessel_rt.inputs.pseudonyms import printable

    kept = f", {summary.kept} of them done before" if summary.kept else ""
    print(f"images: {summary.images}{kept}, failed: {summary.failed}, masks: {summary.masks}, without a mask: {summary.without_mask}")
    if summary.unread:
        print(f"inputs that cannot be read now: {summary.unread}; their results of an earlier run are kept")
    if summary.images > summary.kept:
        print(f"seconds: {summary.seconds:.1f} ({summary.images_per_second:.2f} images/s), after {summary.load_seconds:.1f} of loading")
    if summary.images == summary.total:
        from vessel_rt.results.reader import REPORT_FILE

        print(f"report: {printable(str(output / REPORT_FILE))}")
    print(f"results: {printable(str(output))}")


def _summary_json(summary: Summary, output: Path, code: int) -> dict[str, Any]:
    found = dataclasses.asdict(summary) | {"stopped": summary.stopped.name if summary.stopped else None}
    return {"output": str(output), **found, "exit_code": code}

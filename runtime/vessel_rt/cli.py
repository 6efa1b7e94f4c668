"""`vessel-rt`: argument parsing, and one call a command."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import vessel_rt
from vessel_rt.completion import add_completion
from vessel_rt.errors import VesselError
from vessel_rt.io.folder_lock import locked
from vessel_rt.io.streams import standard_streams

if TYPE_CHECKING:
    from vessel_rt.device.session import Device
    from vessel_rt.formats.bundle import Bundle
    from vessel_rt.inputs.frames import Naming
    from vessel_rt.inputs.images import Rescale
    from vessel_rt.run.summary import Summary

__all__ = ["main"]

T = TypeVar("T")

_ENGINES = Path("engines")
_MOST_BATCH, _MOST_STREAMS = 4096, 256
_THREADS_A_CORE = 4

_EXAMPLES = """examples:
  vessel-rt infer frames/                                 every image of a folder, to out/<bundle>; again: what is left of it
  vessel-rt infer a.png cine.dcm 'more/*.jpg' -o results  files and globs, DICOM among them
  vessel-rt evaluate results --gt frames/annotations.json
  vessel-rt report results
  vessel-rt devices --bundle engines/iter_12192-fp16      where that bundle could run, and what is missing elsewhere
  vessel-rt COMMAND --help                                every option, and more examples
"""

_INFER = """examples:
  vessel-rt infer frames/ --bundle engines/iter_12192-fp16 --prompt 'Please segment catheter in this image.'
  vessel-rt infer cine.dcm --frames 10:60:5               frames 10, 15, ... 55 of each cine; the first is 0
  vessel-rt infer frames/ --devices 0,1,2,3               four GPUs; cpu:2 is two processes on the CPU
  vessel-rt infer frames/ --num-shards 4 --shard-id 0     the first of four hosts
  vessel-rt merge-shards shard0 shard1 shard2 shard3 -o all   then combine their results
  vessel-rt infer frames/ --pseudonymize --json | tail -1 study codes for names, and a line for programs

A run that was stopped goes on where it was when the same command is given again. Exit codes: 0 done, 1 bad input or frames that failed,
2 bad usage, 130 and 143 stopped by SIGINT and SIGTERM; whether anything could be printed does not matter.
"""

_EVALUATE = """examples:
  vessel-rt evaluate out/demo --gt frames/annotations.json
  vessel-rt evaluate out/demo --gt masks/                 a folder of drawn masks: <stem>.png, <stem>_gt.png or <stem>_mask.png
"""

_CHECK_DATA = """examples:
  vessel-rt check-data annotations.json --images frames/
  vessel-rt check-data annotations.json --images frames/ --fix sound.json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vessel-rt`; returns the exit code: 0 done, 1 bad input (nothing was begun, or some images failed), 130 or 143 interrupted.

    Standard output and error may be closed or full: the code tells what became of the work. Where what is printed is all of it (help,
    devices, plan, check-data), the code is 1 if it cannot be printed.

    Bad usage leaves by argparse's SystemExit(2). A bug shows its traceback, without the names of images.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads would wait, spinning, on cores that the graphs need
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does: a name need not be Unicode
    with standard_streams() as out:
        try:
            arguments = _parser().parse_args(argv)
        except SystemExit as e:  # help, the version, or bad usage
            out.flush()
            raise SystemExit(_printed(out, int(e.code or 0))) from None
        code = _run(arguments)
        out.flush()
        return _printed(out, code) if arguments.run in (_devices, _plan, _check_data) else code


def _printed(out: Any, code: int) -> int:
    """`code`, or 1 where it is 0 and not all was printed. A reader that is gone, as `head` is, has seen what it wanted: nothing is said."""
    if out.fault and not isinstance(out.fault, BrokenPipeError):
        print(f"vessel-rt: error: standard output: cannot be written ({out.fault.strerror})", file=sys.stderr)
    return code or int(out.fault is not None)


def _run(arguments: argparse.Namespace) -> int:
    try:
        return int(arguments.run(arguments))
    except VesselError as e:
        from vessel_rt.inputs.pseudonyms import printable

        print(f"vessel-rt: error: {printable(str(e))}", file=sys.stderr)
        if arguments.run is _infer and arguments.json:
            print(json.dumps({"error": str(e), "exit_code": 1}))
        return 1
    except OSError as e:
        from vessel_rt.inputs.pseudonyms import conceal, printable

        print(f"vessel-rt: error: {printable(conceal(str(e.filename or 'a file')))}: {e.strerror or type(e).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vessel-rt: interrupted; what was done before is kept", file=sys.stderr)
        return 130
    except Exception:
        from vessel_rt.inputs.pseudonyms import conceal

        print(conceal(traceback.format_exc()), end="", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vessel-rt",
        description="Segments vessels in X-ray angiograms: a bundle and images in, masks out.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vessel-rt {vessel_rt.__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_infer(commands)
    _add_results_commands(commands)

    devices = commands.add_parser("devices", help="list every kind of device: usable here, or what it lacks")
    devices.add_argument("--bundle", type=Path, metavar="DIR", help="also look whether this bundle runs there: its engines, for rtx")
    devices.add_argument("--json", action="store_true", help="for programs")
    devices.set_defaults(run=_devices)

    plan = commands.add_parser("plan", help="reckon the GPU memory that a bundle takes; fails if it does not fit, and says what to lower")
    plan.add_argument("--bundle", type=Path, metavar="DIR", help="what to plan for (default: as for infer)")
    plan.add_argument("--recipe", metavar="NAME|TOML", help="whose engines.max_batch and engines.memory_gib to plan for")
    plan.add_argument("--batch", type=_up_to(_MOST_BATCH), metavar="N", help="images at once (default: the recipe's, else 1)")
    plan.add_argument("--memory", type=_gibibytes, metavar="GIB", help="the card's memory (default: the recipe's, else the GPU's here)")
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.set_defaults(run=_plan)
    return parser


def _add_infer(commands: Any) -> None:
    infer = commands.add_parser(
        "infer",
        help="segment images: masks, overlays, results.jsonl, report.html",
        epilog=_INFER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    infer.set_defaults(run=_infer, usage_error=infer.error)
    infer.add_argument("inputs", nargs="+", metavar="IMAGES", help="files, folders or globs (JPG, PNG, TIFF, BMP, DICOM)")
    infer.add_argument("-o", "--output", type=Path, metavar="DIR", help="where results go (default: out/<bundle name>)")
    infer.add_argument("--bundle", type=Path, metavar="DIR", help="what to run (default: $VESSEL_BUNDLE, else the newest under ./engines)")
    infer.add_argument(
        "--prompt",
        action="append",
        type=_unicode,
        metavar="TEXT",
        help="the question; again for another, of every image (default: the bundle's, 'Please segment vessel in this image.')",
    )
    infer.add_argument("--overwrite", action="store_true", help="start anew: replace an earlier run's results in DIR; other files are kept")
    infer.add_argument("--prune", action="store_true", help="forget an earlier run's results of images that are not among IMAGES any more")
    infer.add_argument("--fail-fast", action="store_true", help="stop at the first image that fails")

    which = infer.add_argument_group("which frames, and how they are read")
    which.add_argument(
        "--frames",
        type=_frames,
        metavar="A:B:STEP",
        help="of each cine, as in Python: 10:60:5, 0, --frames=-20: (default: all); the pages of a TIFF are frames only if this is given",
    )
    which.add_argument(
        "--rescale",
        nargs="?",
        const="",
        type=_rescale,
        metavar="LOW:HIGH",
        help="take gray images of more than 8 bits, too, and scale LOW to black, HIGH to white (without a value: each file's own range)",
    )
    which.add_argument("--num-images", type=_positive, metavar="N", help="only the first N frames")
    which.add_argument("--num-shards", type=_positive, metavar="K", help="split the files between K runs (see vessel-rt merge-shards)")
    which.add_argument("--shard-id", type=_natural, metavar="I", help="the shard that this run takes, from 0 to K-1")

    where = infer.add_argument_group("where it runs")
    devices = where.add_mutually_exclusive_group()
    devices.add_argument(
        "--device",
        type=_device,
        metavar="DEVICE",
        help="auto, cpu, cuda, rtx or tensorrt, or cuda:N for a GPU's number N (default: auto; see vessel-rt devices)",
    )
    devices.add_argument("--devices", type=_several_devices, metavar="LIST", help="a process for each: 0,1,2,3 or cuda:0,cuda:1 or cpu:2")
    where.add_argument(
        "--ray",
        nargs="?",
        const="local",
        type=_ray_address,
        metavar="ADDRESS",
        help="on a Ray cluster, one GPU an actor (no ADDRESS: one on this host)",
    )
    where.add_argument(
        "--threads",
        type=_positive,
        default=0,
        metavar="N",
        help=f"CPU threads of all streams together, at most {_THREADS_A_CORE} a core (default: all cores)",
    )
    where.add_argument(
        "--streams", type=_up_to(_MOST_STREAMS), metavar="N", help="batches in work at one time (default: up to 4 on a CPU, 1 on a GPU)"
    )
    where.add_argument("--batch", type=_up_to(_MOST_BATCH), metavar="N", help="images at once (default: 1 on a CPU, what fits on a GPU)")
    where.add_argument(
        "--no-draft", action="store_true", help="decode token by token, as training's own code does; the answers are the same"
    )

    told = infer.add_argument_group("what is said, and of whom")
    _add_naming(told)
    told.add_argument("--pseudonymize", action="store_true", help="call the output files by study codes, too")
    told.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    told.add_argument("-v", "--verbose", action="store_true", help="a line for each frame")
    told.add_argument("--json", action="store_true", help="a summary for programs, as the last line")


def _add_naming(group: Any) -> None:
    group.add_argument("--show-names", action="store_true", help="show the names of files, where study codes stand otherwise")
    group.add_argument(
        "--key", type=Path, metavar="FILE", help="the key of study codes (default: $VESSEL_KEY, else in ~/.config/vessel-rt)"
    )


def _add_results_commands(commands: Any) -> None:
    """What is done with results, and with drawn masks."""
    raw = argparse.RawDescriptionHelpFormatter
    evaluate = commands.add_parser(
        "evaluate", help="compare a run's masks with drawn ones: Dice, IoU, clDice, HD95 ...", epilog=_EVALUATE, formatter_class=raw
    )
    evaluate.add_argument("output", type=Path, metavar="OUT", help="the output folder of `vessel-rt infer`")
    evaluate.add_argument(
        "--gt", type=Path, required=True, metavar="PATH", help="annotations in Sa2VA's fine-tuning format, or a folder of masks"
    )
    _add_naming(evaluate)
    evaluate.set_defaults(run=_evaluate)

    check = commands.add_parser("check-data", help="find what is wrong with annotations", epilog=_CHECK_DATA, formatter_class=raw)
    check.add_argument("annotations", type=Path, metavar="JSON", help="in Sa2VA's fine-tuning format")
    check.add_argument("--images", type=Path, required=True, metavar="DIR", help="the folder of the images that it names")
    check.add_argument("--fix", type=Path, metavar="JSON", help="write what is sound there, and what was dropped beside it")
    check.add_argument("--json", action="store_true", help="for programs")
    _add_naming(check)
    check.set_defaults(run=_check_data)

    report = commands.add_parser("report", help="make report.html anew, with what evaluate found")
    report.add_argument("output", type=Path, metavar="OUT", help="the output folder of `vessel-rt infer`")
    report.set_defaults(run=_report)

    merge = commands.add_parser("merge-shards", help="combine the shards of a run")
    merge.add_argument("shards", type=Path, nargs="+", metavar="SHARD", help="output folders of runs with --num-shards and --shard-id")
    merge.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a new folder")
    merge.set_defaults(run=_merge_shards)


def _infer(arguments: argparse.Namespace) -> int:
    from vessel_rt.device.session import Device
    from vessel_rt.inputs.frames import Selection
    from vessel_rt.run.infer import InferOptions, infer  # here, so that --help does not wait for the libraries
    from vessel_rt.run.worker import WorkOptions

    _check_bounds(arguments)
    shard, shards = _shard(arguments)
    bundle = _find_bundle(arguments.bundle, arguments.quiet)
    output = arguments.output or Path("out") / bundle.folder.resolve().name
    options = InferOptions(
        inputs=tuple(arguments.inputs),
        output=output,
        naming=_naming(arguments, output, arguments.pseudonymize),
        work=WorkOptions(
            questions=tuple(dict.fromkeys(arguments.prompt or [bundle.prompt.default_question])),
            threads=arguments.threads,
            streams=arguments.streams,
            batch=arguments.batch,
            draft=not arguments.no_draft,
            rescale=arguments.rescale,
        ),
        selection=Selection(arguments.frames, arguments.num_images, shards, shard),
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
            f"vessel-rt: stopped; {summary.images} of {summary.total} frames are done. The same command goes on from there.",
            file=sys.stderr,
        )
    if arguments.json:
        print(json.dumps(_summary_json(summary, output, code)))
    return code


def _shard(arguments: argparse.Namespace) -> tuple[int, int]:
    """Which shard of how many to run; leaves by argparse's usage error where the options do not agree."""
    shard, shards = arguments.shard_id, arguments.num_shards
    if shards is None and shard is not None:
        arguments.usage_error("--shard-id needs --num-shards: how many shards there are")
    if shard is None and (shards or 1) > 1:
        arguments.usage_error(f"--num-shards {shards} needs --shard-id: the shard that this run takes, from 0 to {shards - 1}")
    if shard is not None and shard >= shards:
        arguments.usage_error(f"--shard-id {shard} is out of range: with --num-shards {shards} it is from 0 to {shards - 1}")
    return shard or 0, shards or 1


def _check_bounds(arguments: argparse.Namespace) -> None:
    """Refuse more threads and processes than this machine can use. Of a cluster elsewhere nothing is known."""
    from vessel_rt.run.worker import cores

    if arguments.ray not in (None, "local"):
        return
    processes = len(arguments.devices) if arguments.devices and arguments.devices[0].kind == "cpu" else 1
    if processes > cores():
        arguments.usage_error(
            f"--devices: {processes} processes on the CPU, of which this process may use {cores()} cores; at most one a core"
        )
    if arguments.threads > _THREADS_A_CORE * cores():
        most = _THREADS_A_CORE * cores()
        arguments.usage_error(
            f"--threads: {arguments.threads} are too many for the {cores()} cores that this process may use; at most {most}"
        )


def _print_summary(summary: Summary, output: Path) -> None:
    from vessel_rt.inputs.pseudonyms import printable

    kept = f", {summary.kept} of them done before" if summary.kept else ""
    print(f"images: {summary.images}{kept}, failed: {summary.failed}, masks: {summary.masks}, without a mask: {summary.without_mask}")
    if summary.unread:
        print(f"inputs that cannot be read now: {summary.unread}; what an earlier run made of them is kept")
    if summary.images > summary.kept:
        print(f"seconds: {summary.seconds:.1f} ({summary.images_per_second:.2f} images/s), after {summary.load_seconds:.1f} of loading")
    if summary.images == summary.total:
        from vessel_rt.results.reader import REPORT_FILE

        print(f"report: {printable(str(output / REPORT_FILE))}")
    print(f"results: {printable(str(output))}")


def _summary_json(summary: Summary, output: Path, code: int) -> dict[str, Any]:
    found = dataclasses.asdict(summary) | {"stopped": summary.stopped.name if summary.stopped else None}
    return {"output": str(output), **found, "exit_code": code}


def _evaluate(arguments: argparse.Namespace) -> int:
    from vessel_rt.evaluation.evaluate import evaluate
    from vessel_rt.results.report import write_report

    naming = _naming(arguments, arguments.output)
    with locked(arguments.output):
        evaluation = evaluate(arguments.output, arguments.gt, codes=naming.codes, show_names=naming.show_names)
        write_report(arguments.output)
    print(evaluation.table())
    return 0


def _check_data(arguments: argparse.Namespace) -> int:
    from vessel_rt.evaluation.check_data import check_data, dropped_path, write_fixed

    if arguments.fix:
        dropped_path(arguments.fix)  # now, not after a long check
    checked = check_data(arguments.annotations, arguments.images, _naming(arguments))
    print(checked.to_json() if arguments.json else checked.table())
    if arguments.fix:
        dropped = write_fixed(checked, arguments.fix)
        print(f"vessel-rt: {len(checked.sound)} items in {arguments.fix}, what was dropped in {dropped}", file=sys.stderr)
    return 1 if checked.faults else 0


def _report(arguments: argparse.Namespace) -> int:
    from vessel_rt.results.report import write_report

    with locked(arguments.output):
        print(f"report: {write_report(arguments.output)}")
    return 0


def _merge_shards(arguments: argparse.Namespace) -> int:
    from vessel_rt.results.merge_shards import merge_shards

    print(f"images: {merge_shards(arguments.shards, arguments.output)}")
    print(f"results: {arguments.output}")
    return 0


def _naming(arguments: argparse.Namespace, output: Path | None = None, pseudonymize: bool = False) -> Naming:
    from vessel_rt.inputs.frames import Naming
    from vessel_rt.inputs.pseudonyms import StudyCodes

    return Naming(StudyCodes.load(arguments.key, outside=output), arguments.show_names, pseudonymize)


def _devices(arguments: argparse.Namespace) -> int:
    from vessel_rt.device.device_report import devices_json, devices_table, list_devices
    from vessel_rt.formats.bundle import Bundle

    reports = list_devices(Bundle.load(arguments.bundle) if arguments.bundle else None)
    print(devices_json(reports) if arguments.json else devices_table(reports))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from vessel_rt.device.cuda_driver import list_gpus
    from vessel_rt.device.memory_plan import make_plan, require_fit
    from vessel_rt.formats.profiles import workload_of
    from vessel_rt.formats.recipe import load_recipe

    bundle, recipe = _find_bundle(arguments.bundle), load_recipe(arguments.recipe) if arguments.recipe else None
    batch = workload_of(bundle, recipe).max_batch if recipe else 1
    memory = arguments.memory or (int(recipe.engines.memory_gib * 2**30) if recipe and recipe.engines else None)
    if memory is None:
        try:
            memory = list_gpus()[0].memory
        except VesselError as e:
            raise VesselError(f"for which card? give --memory or --recipe ({e})") from e
    plan = make_plan(bundle, arguments.batch or batch, memory)
    print(plan.to_json() if arguments.json else plan.table())
    require_fit(bundle, plan)
    return 0


def _find_bundle(folder: Path | None, quiet: bool = False) -> Bundle:
    """The bundle to run: the one asked for, else $VESSEL_BUNDLE's, else the newest complete one under ./engines; named unless asked for."""
    from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle

    if folder:
        return Bundle.load(folder)
    if os.environ.get("VESSEL_BUNDLE"):
        found = Path(os.environ["VESSEL_BUNDLE"])
    else:
        complete = [path for path in _ENGINES.glob(f"*/{BUNDLE_FILE}") if not path.parent.name.startswith(".")]
        if not complete:
            raise VesselError(f"no bundle: name one with --bundle or VESSEL_BUNDLE; none is in ./{_ENGINES} (`make export` puts one there)")
        found = max(complete, key=lambda path: path.stat().st_mtime).parent
    if not quiet:
        print(f"bundle {found}", file=sys.stderr)
    return Bundle.load(found)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _unicode(text: str) -> str:
    """Text that the tokenizer can take: bytes of an argument that are no UTF-8 reach Python as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text") from None
    return text


def _up_to(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if _positive(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is too many; at most {most}")
        return int(text)

    return parse


def _ray_address(text: str) -> str:
    from vessel_rt.run.ray_pool import check_address

    return _parsed(check_address, text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def _gibibytes(text: str) -> int:
    """A number of GiB, in bytes."""
    try:
        size = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of GiB")
    return size


def _device(text: str) -> Device:
    from vessel_rt.device.session import Device

    return _parsed(Device.parse, text)


def _several_devices(text: str) -> tuple[Device, ...]:
    from vessel_rt.device.session import Device

    return _parsed(Device.parse_several, text)


def _frames(text: str) -> slice:
    from vessel_rt.inputs.dicom import parse_frames

    return _parsed(parse_frames, text)


def _rescale(text: str) -> Rescale:
    from vessel_rt.inputs.images import Rescale

    return _parsed(Rescale.parse, text)


def _parsed(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e

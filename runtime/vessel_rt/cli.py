"""`vessel-rt`: argument parsing, and one call a command."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import vessel_rt
from vessel_rt.errors import VesselError

if TYPE_CHECKING:
    from vessel_rt.bundle import Bundle
    from vessel_rt.session import Device

__all__ = ["main"]

_ENGINES = Path("engines")

_EXAMPLES = """examples:
  vessel-rt infer frames/                                 every image of a folder, to out/<bundle>
  vessel-rt infer a.png b.png 'more/*.jpg' -o results     files and globs
  vessel-rt infer frames/ --bundle engines/iter_12192-fp16 --prompt 'Please segment catheter in this image.'
  vessel-rt evaluate out/demo --gt frames/annotations.json
  vessel-rt devices --bundle engines/iter_12192-fp16      where that bundle could run, and what is missing elsewhere
  vessel-rt plan --recipe engines/rtx3090.toml            the GPU memory that it will take
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vessel-rt`; returns the exit code: 0 done, 1 bad input (nothing was begun, or some images failed), 130 interrupted.

    Bad usage leaves by argparse's SystemExit(2).
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads would wait, spinning, on cores that the graphs need
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except VesselError as e:
        print(f"vessel-rt: error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vessel-rt: interrupted; the results that were written are kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vessel-rt",
        description="Segments vessels in X-ray angiograms: a bundle and images in, masks out.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vessel-rt {vessel_rt.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    infer = commands.add_parser("infer", help="segment images: masks, overlays, results.jsonl and run.json")
    infer.add_argument("inputs", nargs="+", metavar="IMAGES", help="files, folders or globs (JPG, PNG, TIFF, BMP)")
    infer.add_argument("-o", "--output", type=Path, metavar="DIR", help="where results go (default: out/<bundle name>)")
    infer.add_argument("--bundle", type=Path, metavar="DIR", help="what to run (default: $VESSEL_BUNDLE, else the newest under ./engines)")
    infer.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the question; again for another, of every image (default: the bundle's, 'Please segment vessel in this image.')",
    )
    infer.add_argument("--num-images", type=_positive, metavar="N", help="only the first N images")
    infer.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda, rtx or tensorrt, or cuda:N for a GPU's number N (default: auto; see vessel-rt devices)",
    )
    infer.add_argument("--threads", type=_positive, default=0, metavar="N", help="CPU threads of all streams together (default: all cores)")
    infer.add_argument("--streams", type=_positive, metavar="N", help="batches in work at one time (default: up to 4 on a CPU, 1 on a GPU)")
    infer.add_argument("--batch", type=_positive, metavar="N", help="images at once (default: 1 on a CPU, what fits on a GPU)")
    infer.add_argument(
        "--no-draft", action="store_true", help="decode token by token, as training's own code does; the answers are the same"
    )
    infer.add_argument("--overwrite", action="store_true", help="replace an earlier run's results in DIR; other files there are kept")
    infer.set_defaults(run=_infer)

    evaluate = commands.add_parser("evaluate", help="compare a run's masks with drawn ones: the mean Dice of each concept")
    evaluate.add_argument("output", type=Path, metavar="OUT", help="the output folder of `vessel-rt infer`")
    evaluate.add_argument("--gt", type=Path, required=True, metavar="JSON", help="annotations in Sa2VA's fine-tuning format")
    evaluate.set_defaults(run=_evaluate)

    devices = commands.add_parser("devices", help="list every kind of device: usable here, or what it lacks")
    devices.add_argument("--bundle", type=Path, metavar="DIR", help="also look whether this bundle runs there: its engines, for rtx")
    devices.add_argument("--json", action="store_true", help="for programs")
    devices.set_defaults(run=_devices)

    plan = commands.add_parser("plan", help="reckon the GPU memory that a bundle takes; fails if it does not fit, and says what to lower")
    plan.add_argument("--bundle", type=Path, metavar="DIR", help="what to plan for (default: as for infer)")
    plan.add_argument("--recipe", type=Path, metavar="TOML", help="whose engines.max_batch and engines.memory_gib to plan for")
    plan.add_argument("--batch", type=_positive, metavar="N", help="images at once (default: the recipe's, else 1)")
    plan.add_argument("--memory", type=_gibibytes, metavar="GIB", help="the card's memory (default: the recipe's, else the GPU's here)")
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.set_defaults(run=_plan)
    return parser


def _infer(arguments: argparse.Namespace) -> int:
    from vessel_rt.folder import InferOptions, infer  # here, so that --help does not wait for the libraries

    warnings.filterwarnings("ignore", module="PIL")  # what matters in a file raises; the rest would tear the progress bar
    bundle = _find_bundle(arguments.bundle)
    options = InferOptions(
        inputs=tuple(arguments.inputs),
        output=arguments.output or Path("out") / bundle.folder.resolve().name,
        questions=tuple(dict.fromkeys(arguments.prompt or [bundle.prompt.default_question])),
        num_images=arguments.num_images,
        device=arguments.device,
        threads=arguments.threads,
        streams=arguments.streams,
        batch=arguments.batch,
        draft=not arguments.no_draft,
        overwrite=arguments.overwrite,
    )
    summary = infer(bundle, options)
    print(f"images: {summary.images}, failed: {summary.failed}, masks: {summary.masks}, without a mask: {summary.without_mask}")
    print(f"seconds: {summary.seconds:.1f} ({summary.images_per_second:.2f} images/s), after {summary.load_seconds:.1f} of loading")
    print(f"results: {options.output}")
    return 1 if summary.failed else 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from vessel_rt.evaluate import evaluate

    scores = evaluate(arguments.output, arguments.gt)
    several = len({score.question for score in scores}) > 1
    for score in scores:
        asked = f", asked {score.question!r}" if several else ""
        print(f"mean Dice {score.concept}: {score.mean:.3f} over {len(score.dice)} images{asked}")
    return 0


def _devices(arguments: argparse.Namespace) -> int:
    from vessel_rt.bundle import Bundle
    from vessel_rt.devices import devices_json, devices_table, list_devices

    reports = list_devices(Bundle.load(arguments.bundle) if arguments.bundle else None)
    print(devices_json(reports) if arguments.json else devices_table(reports))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from vessel_rt.gpu import list_gpus
    from vessel_rt.plan import make_plan, require_fit
    from vessel_rt.recipe import load_recipe
    from vessel_rt.shapes import workload_of

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


def _find_bundle(folder: Path | None) -> Bundle:
    """The bundle to run: the one asked for, else $VESSEL_BUNDLE's, else the newest complete one under ./engines; named unless asked for."""
    from vessel_rt.bundle import BUNDLE_FILE, Bundle

    if folder:
        return Bundle.load(folder)
    if os.environ.get("VESSEL_BUNDLE"):
        found = Path(os.environ["VESSEL_BUNDLE"])
    else:
        complete = [path for path in _ENGINES.glob(f"*/{BUNDLE_FILE}") if not path.parent.name.startswith(".")]
        if not complete:
            raise VesselError(f"no bundle: name one with --bundle or VESSEL_BUNDLE; none is in ./{_ENGINES} (`make export` puts one there)")
        found = max(complete, key=lambda path: path.stat().st_mtime).parent
    print(f"bundle {found}", file=sys.stderr)
    return Bundle.load(found)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
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
    from vessel_rt.session import Device

    try:
        return Device.parse(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e

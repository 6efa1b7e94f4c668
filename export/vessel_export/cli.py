"""`vessel-export`: parses arguments, makes one call per command and prints the result. Commands import their libraries when they run."""

from __future__ import annotations

import argparse
import errno
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import vessel_rt
from vessel_rt.cli.arguments import device, up_to
from vessel_rt.completion import add_completion
from vessel_rt.errors import VesselError
from vessel_rt.formats.bundle import CINE_STAGES, STAGES
from vessel_rt.formats.engine_sidecar import BUILDERS
from vessel_rt.formats.recipe import DEFAULT_RECIPE, PRECISIONS, recipe_names
from vessel_rt.io.streams import standard_streams

if TYPE_CHECKING:
    from vessel_export.engines.build import Build
    from vessel_rt.formats.bundle import Bundle
    from vessel_rt.formats.recipe import Recipe

__all__ = ["main"]

CINE_FRAMES = 30  # of `verify --cine`

_EXAMPLES = """examples:
  vessel-export export --ckpt work_dirs/iter_12192.pth
  vessel-export export --ckpt tiny.pth --base examples/tiny/base --sam2 examples/tiny/sam2_tiny.pt --recipe cpu
  vessel-export inspect work_dirs/sa2va_finetune
  vessel-export build --bundle engines/iter_12192-fp16 --describe sm86
  vessel-export verify --bundle engines/iter_12192-fp16 --ckpt work_dirs/iter_12192.pth --images frames/
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vessel-export`; returns the exit code.

    0: success. 1: bad input, values that FP16 cannot hold, or parity beyond tolerance. 2: bad usage. 130: interrupted.
    """
    with standard_streams() as out:
        arguments = _parser().parse_args(argv)
        code = _run(arguments)
        out.flush()
        if out.fault and not isinstance(out.fault, BrokenPipeError):  # a reader such as `head` may close it
            print(f"vessel-export: error: standard output: cannot be written ({out.fault.strerror})", file=sys.stderr)
        return code or int(out.fault is not None and arguments.run is _inspect)  # its output is its only result


def _run(arguments: argparse.Namespace) -> int:
    try:
        return int(arguments.run(arguments))
    except VesselError as e:
        print(f"vessel-export: error: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST):
            raise
        print(f"vessel-export: error: {e.filename or 'output'}: {e.strerror}; nothing was left behind", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vessel-export: interrupted; nothing was left behind", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vessel-export",
        description="From a fine-tuned Sa2VA checkpoint to a bundle that vessel-rt runs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vessel-export {vessel_rt.__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_export(commands.add_parser("export", help="merge a checkpoint into its base model and write a bundle"))
    _add_inspect(commands.add_parser("inspect", help="show what a checkpoint or a work_dirs folder holds, and what export would do"))
    _add_build(commands.add_parser("build", help="compile a bundle's graphs to engines for one kind of GPU, here or elsewhere"))
    _add_ranges(commands.add_parser("ranges", help="measure which values of an FP16 bundle FP16 can hold, and set its scales"))
    _add_verify(commands.add_parser("verify", help="compare a bundle with the PyTorch reference, stage by stage and end to end"))
    return parser


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="the fine-tuned checkpoint, iter_*.pth")
    parser.add_argument("--base", metavar="DIR|ID", help="InternVL3: a folder or a Hugging Face id (default: OpenGVLab/InternVL3-8B)")
    parser.add_argument("--sam2", metavar="FILE|ID", help="SAM 2.0: a .pt or a Hugging Face id (default: facebook/sam2-hiera-large)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the bundle to make (default: engines/<checkpoint>-<types of the recipe>)")
    parser.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        metavar="NAME|TOML",
        help=f"what to make: {', '.join(recipe_names())}, or a file (default: {DEFAULT_RECIPE})",
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="instead of the recipe's: fp16 or bf16 for GPUs, fp32 for CPUs")
    parser.add_argument("--lora-alpha", type=_positive_number, metavar="A", help="LoRA's alpha (default: the checkpoint's)")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave out a tensor that nothing uses; may be repeated")
    parser.add_argument("--overwrite", action="store_true", help="replace the bundle at --out, once the new one is complete")
    parser.add_argument(
        "--golden",
        action=argparse.BooleanOptionalAction,
        help="write the PyTorch reference's answers for a few drawn frames into the bundle (default: if the reference fits in memory)",
    )
    parser.set_defaults(run=_export)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Reads names, shapes and what training recorded. Does not read values: export and verify check them for damage."
    parser.add_argument("path", type=Path, metavar="PATH", help="an iter_*.pth, or the folder that training wrote them to")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_inspect)


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="the bundle to build engines for")
    parser.add_argument(
        "--recipe", default=DEFAULT_RECIPE, metavar="NAME|TOML", help=f"the GPU and the shapes to build for (default: {DEFAULT_RECIPE})"
    )
    parser.add_argument("--describe", metavar="ARCH", help="build on a machine without a GPU, for one of this architecture, such as sm86")
    parser.add_argument("--builder", choices=BUILDERS, default="rtx", help="rtx (TensorRT-RTX, the default) or tensorrt")
    parser.add_argument(
        "--ampere-plus", action="store_true", help="with --builder tensorrt: for any GPU of RTX 30 or newer, a little slower"
    )
    parser.add_argument(
        "--stage", action="append", choices=(*STAGES, *CINE_STAGES), help="build only this stage; may be repeated (default: all)"
    )
    parser.add_argument("--rebuild", action="store_true", help="replace engines that were built from other files, shapes or versions")
    parser.set_defaults(run=_build)


def _add_ranges(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="the FP16 bundle to measure and to set the scales of")
    _add_images(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="the question (default: the bundle's)")
    parser.set_defaults(run=_ranges)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="the bundle to check")
    parser.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="the checkpoint that it was exported from")
    parser.add_argument("--base", metavar="DIR|ID", help="InternVL3 (default: the one that the bundle records)")
    parser.add_argument("--sam2", metavar="FILE|ID", help="SAM 2.0 (default: the one that the bundle records)")
    _add_images(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a question; may be repeated (default: the bundle's)")
    parser.add_argument("--lora-alpha", type=_positive_number, metavar="A", help="LoRA's alpha (default: the bundle's)")
    parser.add_argument("--device", type=device, default="cpu", metavar="DEVICE", help="where the bundle runs (default: cpu)")
    parser.add_argument("--emulate", action="store_true", help="round as a GPU does, on the CPU (always done for bf16 on the CPU)")
    parser.add_argument(
        "--by-matrix", action="store_true", help="of a quantized bundle: which matrices move the masks, each quantized alone (slow)"
    )
    parser.add_argument(
        "--record", action="store_true", help="use the golden frames and questions, and write the reference's answers into the bundle"
    )
    parser.add_argument(
        "--cine",
        nargs="?",
        const=CINE_FRAMES,
        type=up_to(9999),
        metavar="N",
        help=f"compare a cine of N drawn frames instead, tracked as Sa2VA does (default: {CINE_FRAMES})",
    )
    parser.set_defaults(run=_verify, usage_error=parser.error)


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=Path, nargs="+", default=[], metavar="PATH", help="images or folders (default: three drawn frames)"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads for one operator (default: all cores)")


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def _export(arguments: argparse.Namespace) -> int:
    from vessel_export.bundle.bundle_writer import ExportRequest, export_bundle
    from vessel_export.sources.base_model import DEFAULT_BASE, DEFAULT_SAM2
    from vessel_rt.formats.recipe import load_recipe

    recipe = load_recipe(arguments.recipe)
    if arguments.precision:
        recipe = msgspec.structs.replace(recipe, precision=arguments.precision)
    out = arguments.out or Path("engines") / f"{arguments.ckpt.stem}-{'-'.join(filter(None, (recipe.precision, recipe.weights)))}"
    export = export_bundle(
        ExportRequest(
            checkpoint=arguments.ckpt,
            base=arguments.base or DEFAULT_BASE,
            sam2=arguments.sam2 or DEFAULT_SAM2,
            out=out,
            recipe=recipe,
            lora_alpha=arguments.lora_alpha,
            skip=tuple(arguments.skip),
            overwrite=arguments.overwrite,
        )
    )
    files = export.bundle.files
    size = sum(record.bytes for record in files.values())
    for name in export.reused_files:
        print(f"reused: {name}, {files[name].bytes / 1e6:.1f} MB")
    for name in export.reused_engines:
        print(f"reused: engine {name}")
    print(
        f"{out}: {_types(recipe)} bundle of {arguments.ckpt.name}, {len(files)} files, {size / 1e6:.1f} MB"
        f" ({export.bytes_written / 1e6:.1f} MB written)"
    )
    if arguments.golden is not False:
        _record_after_export(arguments, export.bundle)
    if recipe.precision != "fp32":  # fp32 is for CPUs
        _build_after_export(out, recipe)
    return 0


def _types(recipe: Recipe) -> str:
    return f"{recipe.precision} ({recipe.weights} weights)" if recipe.weights else recipe.precision


def _record_after_export(arguments: argparse.Namespace, bundle: Bundle) -> None:
    """Write goldens into the bundle; without --golden only if the reference fits in memory."""
    from vessel_export.parity.verify import VerifyRequest, record_after_export

    request = VerifyRequest(bundle.folder, arguments.ckpt, arguments.base, arguments.sam2)
    if record_after_export(request, stream=arguments.golden is True):
        print("goldens: recorded; checks of the bundle need neither PyTorch nor the checkpoint")
    else:
        command = f"vessel-export verify --record --bundle {bundle.folder} --ckpt {arguments.ckpt}"
        print(f"goldens: none recorded, the PyTorch model does not fit in memory; `{command}` reads it layer by layer, which takes minutes")


def _build_after_export(bundle: Path, recipe: Recipe) -> None:
    """Build the recipe's engines if its GPU is here; otherwise print why there are none and how to build them."""
    from vessel_export.engines.build import build_engines
    from vessel_export.engines.request import BuildRequest, obstacle_here

    if recipe.engines is None:
        return
    if obstacle := obstacle_here(recipe.engines):
        command = f"vessel-export build --bundle {bundle} --describe {recipe.engines.architecture}"
        print(f"engines: none built, {obstacle}; `{command}` needs no GPU; for a CPU, export with --recipe cpu-int8")
    else:
        build_engines(BuildRequest(bundle, recipe), _print_build)


def _inspect(arguments: argparse.Namespace) -> int:
    from vessel_export.sources.inspection import inspect_checkpoint, inspect_folder
    from vessel_export.sources.inspection_report import print_report, to_json

    report = inspect_folder(arguments.path) if arguments.path.is_dir() else inspect_checkpoint(arguments.path)
    if arguments.json:
        print(to_json(report))
    else:
        print_report(report)
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from vessel_export.engines.build import build_engines
    from vessel_export.engines.request import BuildRequest
    from vessel_rt.formats.recipe import load_recipe

    request = BuildRequest(
        bundle=arguments.bundle,
        recipe=load_recipe(arguments.recipe),
        builder=arguments.builder,
        stub_gpu=arguments.describe,
        stages=tuple(stage for stage in (*STAGES, *CINE_STAGES) if stage in arguments.stage) if arguments.stage else None,
        rebuild=arguments.rebuild,
        ampere_plus=arguments.ampere_plus,
    )
    build_engines(request, _print_build)
    return 0


def _print_build(build: Build) -> None:
    from tqdm import tqdm

    engine = build.engine
    how = "up to date" if build.seconds is None else f"{build.seconds:.1f} s"
    partitions = f", {engine.partitions} partitions" if engine.partitions > 1 else ""
    tqdm.write(f"{engine.builder}-{engine.architecture}/{engine.stage}: {how}, {build.bytes / 1e6:.1f} MB{partitions}")


def _ranges(arguments: argparse.Namespace) -> int:
    from vessel_export.parity.fp16_ranges import RangesRequest, measure_and_apply
    from vessel_export.parity.ranges_report import RANGES_FILE

    bundle = arguments.bundle
    result = measure_and_apply(RangesRequest(bundle, tuple(arguments.images), arguments.prompt, arguments.threads))
    ranges = result.ranges
    print(ranges.table())
    print(f"{bundle / RANGES_FILE}: peaks over {ranges.images} images; exponents changed in: {', '.join(result.changed) or 'no graph'}")
    if result.removed_engines:
        print(f"{result.removed_engines} engines of the old graphs were removed; vessel-export build --bundle {bundle} builds them again")
    beyond = {f"{stage} {name}": peak for stage, measured in ranges.stages.items() for name, peak in measured.beyond.items()}
    if not beyond:
        return 0
    shown = "; ".join(f"{name} {peak:.4g}" for name, peak in list(beyond.items())[:8]) + ("; ..." if len(beyond) > 8 else "")
    print(f"vessel-export: {bundle}: too close to FP16's 65504: {shown}; export it with --precision bf16", file=sys.stderr)
    return 1


def _verify(arguments: argparse.Namespace) -> int:
    from vessel_export.parity.verify import VerifyRequest, sensitivity_of, verify_bundle
    from vessel_export.parity.verify_cine import verify_cine

    request = VerifyRequest(
        bundle=arguments.bundle,
        checkpoint=arguments.ckpt,
        base=arguments.base,
        sam2=arguments.sam2,
        images=tuple(arguments.images),
        questions=tuple(arguments.prompt),
        lora_alpha=arguments.lora_alpha,
        device=arguments.device,
        emulate=arguments.emulate,
        threads=arguments.threads,
        record=arguments.record,
    )
    if arguments.record and (arguments.images or arguments.prompt or arguments.by_matrix):
        arguments.usage_error("--record has frames and questions of its own: leave out --images, --prompt and --by-matrix")
    if arguments.cine and (arguments.images or arguments.record or arguments.by_matrix):
        arguments.usage_error("--cine has frames of its own: leave out --images, --record and --by-matrix")
    if arguments.by_matrix:
        print(sensitivity_of(request))
        return 0
    report = verify_cine(request, arguments.cine) if arguments.cine else verify_bundle(request)
    print(report.table())
    if arguments.record:
        print(f"{arguments.bundle}: goldens recorded")
    if not report.passed:
        print(f"vessel-export: {arguments.bundle}: beyond tolerance", file=sys.stderr)
    return 0 if report.passed else 1

"""`vessel-export`: argument parsing, and one call a command."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import sys
from collections.abc import Sequence
from pathlib import Path

import vessel_rt
from vessel_export.engines.build import add_arguments as add_build_arguments
from vessel_export.engines.build import build_after_export
from vessel_export.parity.fp16_ranges import add_arguments as add_ranges_arguments
from vessel_export.parity.verify import add_arguments as add_verify_arguments
from vessel_export.sources.mmengine_config import positive_number
from vessel_rt.completion import add_completion
from vessel_rt.errors import VesselError
from vessel_rt.formats.recipe import DEFAULT_RECIPE, PRECISIONS, recipe_names
from vessel_rt.io.streams import standard_streams

__all__ = ["main"]

_EXAMPLES = """examples:
  vessel-export export --ckpt work_dirs/iter_12192.pth
  vessel-export export --ckpt tiny.pth --base examples/tiny/base --sam2 examples/tiny/sam2_tiny.pt --recipe cpu
  vessel-export inspect work_dirs/sa2va_finetune
  vessel-export build --bundle engines/iter_12192-fp16 --describe sm86
  vessel-export verify --bundle engines/iter_12192-fp16 --ckpt work_dirs/iter_12192.pth --images frames/
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vessel-export`; returns the exit code: 0 done, 1 bad input or parity beyond tolerance, 2 bad usage, 130 interrupted."""
    with standard_streams() as out:
        arguments = _parser().parse_args(argv)
        code = _run(arguments)
        out.flush()
        if out.fault and not isinstance(out.fault, BrokenPipeError):  # whoever read may go, as `head` does
            print(f"vessel-export: error: standard output: cannot be written ({out.fault.strerror})", file=sys.stderr)
        return code or int(out.fault is not None and arguments.run is _inspect)  # whose work is what it prints


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

    export = commands.add_parser("export", help="merge the checkpoint into its base model and write a bundle")
    export.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="the fine-tuned checkpoint, iter_*.pth")
    export.add_argument("--base", metavar="DIR|ID", help="InternVL3: a folder or a Hugging Face id (default: OpenGVLab/InternVL3-8B)")
    export.add_argument("--sam2", metavar="FILE|ID", help="SAM 2.0: a .pt or a Hugging Face id (default: facebook/sam2-hiera-large)")
    export.add_argument("--out", type=Path, metavar="DIR", help="the bundle to make (default: engines/<checkpoint>-<precision>)")
    export.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        metavar="NAME|TOML",
        help=f"what to make: {', '.join(recipe_names())}, or a file (default: {DEFAULT_RECIPE})",
    )
    export.add_argument("--precision", choices=PRECISIONS, help="instead of the recipe's: fp16 or bf16 for GPUs, fp32 for CPUs")
    export.add_argument("--lora-alpha", type=positive_number, metavar="A", help="LoRA's alpha, where the checkpoint does not tell")
    export.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave out a tensor that nothing uses; may be repeated")
    export.add_argument("--overwrite", action="store_true", help="replace the bundle at --out, once the new one is complete")
    export.set_defaults(run=_export)

    inspect = commands.add_parser(
        "inspect",
        help="show what a checkpoint or a work_dirs folder holds, and what export would do with it",
        description="Reads names, shapes and what training recorded. Values are not read: export and verify check those for damage.",
    )
    inspect.add_argument("path", type=Path, metavar="PATH", help="an iter_*.pth, or the folder that training wrote them to")
    form = inspect.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs")
    form.add_argument("--markdown", action="store_true", help="for a report")
    inspect.set_defaults(run=_inspect)

    build = commands.add_parser("build", help="compile a bundle's graphs to engines for one kind of GPU, here or elsewhere")
    add_build_arguments(build)

    ranges = commands.add_parser("ranges", help="measure what of a bundle FP16 can hold, and set its scales by that")
    add_ranges_arguments(ranges)

    verify = commands.add_parser("verify", help="compare a bundle with the PyTorch reference, stage by stage and end to end")
    add_verify_arguments(verify)
    return parser


def _export(arguments: argparse.Namespace) -> int:
    from vessel_export.bundle.bundle_writer import ExportRequest, export_bundle
    from vessel_export.sources.base_model import DEFAULT_BASE, DEFAULT_SAM2
    from vessel_rt.formats.recipe import load_recipe

    recipe = load_recipe(arguments.recipe)
    if arguments.precision:
        recipe = dataclasses.replace(recipe, precision=arguments.precision)
    out = arguments.out or Path("engines") / f"{arguments.ckpt.stem}-{recipe.precision}"
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
        f"{out}: {recipe.precision} bundle of {arguments.ckpt.name}, {len(files)} files, {size / 1e6:.1f} MB"
        f" ({export.bytes_written / 1e6:.1f} MB written)"
    )
    if recipe.precision != "fp32":  # which is for CPUs
        build_after_export(out, recipe)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from vessel_export.sources.inspection import inspect_checkpoint, inspect_folder, markdown, show, to_json

    report = inspect_folder(arguments.path) if arguments.path.is_dir() else inspect_checkpoint(arguments.path)
    if arguments.json or arguments.markdown:
        print(to_json(report) if arguments.json else markdown(report), end="" if arguments.markdown else "\n")
    else:
        show(report)
    return 0

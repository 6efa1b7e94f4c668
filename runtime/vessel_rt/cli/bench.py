"""`vessel-rt bench`: its options, and what is printed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vessel_rt.cli import arguments as types

if TYPE_CHECKING:
    from vessel_rt.bench.schema import BenchFile

__all__ = ["add_bench"]

_MOST_ROUNDS = 100
_BENCH = """examples:
  vessel-rt bench                                         the newest bundle under ./engines, on its own golden frames
  vessel-rt bench frames/ --bundle engines/a-fp32 --bundle engines/a-fp16 --device cpu --device cuda --batch 1 2 4
  vessel-rt bench frames/ --gt annotations.json           with the mean Dice
  vessel-rt bench --compare here.json there.json          one table of several machines

Each bundle runs on each device in a process of its own, in turn, --rounds times. What cannot run has a line that says why, and the others
go on. Exit codes: 0 done, 1 bad input or nothing could be measured, 2 bad usage, 130 stopped by Ctrl-C; what was measured is kept.
"""


def add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure bundles, devices and batch sizes: images per second, time by step, memory, Dice, agreement with FP32",
        epilog=_BENCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("inputs", nargs="*", metavar="IMAGES", help="as for infer (default: the drawn frames in a bundle's goldens)")
    bench.add_argument("--bundle", type=Path, action="append", metavar="DIR", help="what to measure; repeat it (default: as for infer)")
    bench.add_argument("--device", type=types.device, action="append", metavar="DEVICE", help="as for infer; repeat it (default: auto)")
    bench.add_argument("--batch", type=types.up_to(types.MAX_BATCH), nargs="+", metavar="N", help="images at once (default: 1)")
    bench.add_argument("--gt", type=Path, metavar="PATH", help="ground truth of IMAGES, as for evaluate: adds the mean Dice")
    bench.add_argument("--prompt", type=types.unicode_text, metavar="TEXT", help="the question (default: the first bundle's)")
    bench.add_argument("--num-images", type=types.positive, metavar="N", help="only the first N frames")
    bench.add_argument("--rounds", type=types.up_to(_MOST_ROUNDS), metavar="N", help="how often each is loaded and measured (default: 2)")
    bench.add_argument("--threads", type=types.positive, metavar="N", help="CPU threads (default: all cores)")
    bench.add_argument(
        "--compare", type=Path, nargs="+", metavar="JSON", help="measure nothing: merge the bench.json files of several machines"
    )
    bench.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder of bench.json and bench.html (default: out/bench)")
    types.add_naming(bench)
    types.add_json(bench)
    bench.set_defaults(run=_bench, usage_error=bench.error)


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.compare:
        return _compare(arguments)
    from vessel_rt.bench.bench import BenchOptions, bench
    from vessel_rt.bench.report import write_bench
    from vessel_rt.device.providers import Device
    from vessel_rt.inputs.pseudonyms import printable

    if arguments.gt and not arguments.inputs:
        arguments.usage_error("--gt needs IMAGES: the drawn frames of goldens have no ground truth")
    output = arguments.output or Path("out") / "bench"
    options = BenchOptions(
        bundles=tuple(dict.fromkeys(arguments.bundle or [types.find_bundle_folder(None, quiet=arguments.json)])),
        devices=tuple(dict.fromkeys(arguments.device or [Device("auto")])),
        batches=tuple(sorted(set(arguments.batch or [1]))),
        inputs=tuple(arguments.inputs),
        naming=types.naming_of(arguments, output),
        num_images=arguments.num_images,
        truth=arguments.gt,
        question=arguments.prompt,
        rounds=arguments.rounds or 2,
        threads=arguments.threads or 0,
    )
    found = bench(
        options,
        lambda found: write_bench(output, found),
        lambda text: print(f"vessel-rt: warning: {printable(text)}", file=sys.stderr),
    )
    write_bench(output, found)
    _print(found, output, arguments.json)
    return int(not any(row.fault == "" for run in found.runs for row in run.rows))


def _compare(arguments: argparse.Namespace) -> int:
    from vessel_rt.bench.compare import merge, read_bench
    from vessel_rt.bench.report import write_bench

    given = [
        name
        for name in ("inputs", "bundle", "device", "batch", "gt", "prompt", "num_images", "rounds", "threads")
        if getattr(arguments, name)
    ]
    if given:
        arguments.usage_error(f"--compare measures nothing, so it goes only with -o and --json, not with {given[0].replace('_', '-')}")
    found = merge([read_bench(path) for path in arguments.compare])
    if arguments.output:
        write_bench(arguments.output, found)
    _print(found, arguments.output, arguments.json)
    return 0


def _print(found: BenchFile, output: Path | None, as_json: bool) -> None:
    from vessel_rt.bench.report import BENCH_PAGE
    from vessel_rt.bench.table import table
    from vessel_rt.formats.schema import to_json
    from vessel_rt.inputs.pseudonyms import printable

    if as_json:
        print(to_json(found), end="")
        return
    for line in table(found).splitlines():
        print(printable(line))
    if output:
        print(f"report: {printable(str(output / BENCH_PAGE))}")

"""`vessel-rt evaluate`, `check-data`, `report` and `merge-shards`: what is done with results and with annotations. Runs no graph."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vessel_rt.cli.arguments import add_json, add_naming, naming_of
from vessel_rt.io.folder_lock import locked

__all__ = ["add_results_commands"]

_EVALUATE = """examples:
  vessel-rt evaluate out/demo --gt frames/annotations.json
  vessel-rt evaluate out/cines --gt masks/ --flow
  vessel-rt evaluate out/demo --gt masks/                 a folder of ground-truth masks: <stem>.png, <stem>_gt.png or <stem>_mask.png
"""

_CHECK_DATA = """examples:
  vessel-rt check-data annotations.json --images frames/
  vessel-rt check-data annotations.json --images frames/ --fix fixed.json
"""


def add_results_commands(commands: Any) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    evaluate = commands.add_parser(
        "evaluate", help="compare a run's masks with the ground truth: Dice, IoU, clDice, HD95 ...", epilog=_EVALUATE, formatter_class=raw
    )
    evaluate.add_argument("output", type=Path, metavar="OUT", help="the output folder of `vessel-rt infer`")
    evaluate.add_argument(
        "--gt", type=Path, required=True, metavar="PATH", help="annotations in Sa2VA's fine-tuning format, or a folder of masks"
    )
    evaluate.add_argument(
        "--flow",
        action="store_true",
        help="of cines: also the stability of masks that optical flow moves to the next frame (0.2 s a frame)",
    )
    add_naming(evaluate)
    evaluate.set_defaults(run=_evaluate)

    check = commands.add_parser("check-data", help="find what is wrong with annotations", epilog=_CHECK_DATA, formatter_class=raw)
    check.add_argument("annotations", type=Path, metavar="JSON", help="in Sa2VA's fine-tuning format")
    check.add_argument("--images", type=Path, required=True, metavar="DIR", help="the folder of the images that it names")
    check.add_argument(
        "--fix", type=Path, metavar="JSON", help="write the items without errors to this file, and the dropped ones next to it"
    )
    add_json(check)
    add_naming(check)
    check.set_defaults(run=_check_data, only_prints=True)

    report = commands.add_parser("report", help="write report.html again, with the results of evaluate")
    report.add_argument("output", type=Path, metavar="OUT", help="the output folder of `vessel-rt infer`")
    report.set_defaults(run=_report)

    merge = commands.add_parser("merge-shards", help="combine the shards of a run")
    merge.add_argument("shards", type=Path, nargs="+", metavar="SHARD", help="output folders of runs with --num-shards and --shard-id")
    merge.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a new folder")
    merge.set_defaults(run=_merge_shards)


def _evaluate(arguments: argparse.Namespace) -> int:
    from vessel_rt.evaluation.evaluate import evaluate
    from vessel_rt.results.report import write_report

    naming = naming_of(arguments, arguments.output)
    with locked(arguments.output):
        evaluation = evaluate(arguments.output, arguments.gt, codes=naming.codes, show_names=naming.show_names, flow=arguments.flow)
        write_report(arguments.output)
    print(evaluation.table())
    return 0


def _check_data(arguments: argparse.Namespace) -> int:
    from vessel_rt.evaluation.check_data import check_data, dropped_path, write_fixed

    if arguments.fix:
        dropped_path(arguments.fix)  # now, not after a long check
    checked = check_data(arguments.annotations, arguments.images, naming_of(arguments))
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

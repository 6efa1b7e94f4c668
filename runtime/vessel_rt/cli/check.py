"""`vessel-rt check`: its options, and what is printed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vessel_rt.cli import arguments as types

if TYPE_CHECKING:
    from vessel_rt.check.schema import CheckLine

__all__ = ["add_check"]

_CHECK = """examples:
  vessel-rt check                                         the newest bundle under ./engines, on the first device that runs it
  vessel-rt check --bundle engines/iter_12192-fp16 --device cuda
  vessel-rt check --devices 0,1,2,3 --minutes 10          four GPUs, each for ten minutes more

Exit codes: 0 nothing failed, 1 a check failed, 2 bad usage. docs/first-run-on-a-gpu.md says what each failure means.
"""


def add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="prove that a bundle works on this machine: hashes, devices, parity with the reference, speed, memory",
        epilog=_CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("--bundle", type=Path, metavar="DIR", help="what to check (default: as for infer)")
    devices = check.add_mutually_exclusive_group()
    devices.add_argument("--device", type=types.device, metavar="DEVICE", help="as for infer (default: auto)")
    devices.add_argument("--devices", type=types.several_devices, metavar="LIST", help="several, one after the other: 0,1 or cuda:0,cuda:1")
    check.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder of check.json and check.html (default: out/check-BUNDLE)")
    check.add_argument("--minutes", type=types.minutes, default=0.0, metavar="N", help="at the end, run images for N minutes (default: 0)")
    check.add_argument("--threads", type=types.positive, default=0, metavar="N", help="CPU threads (default: all cores)")
    types.add_json(check)
    check.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from vessel_rt.check.check import CheckOptions, check
    from vessel_rt.check.report import CHECK_PAGE
    from vessel_rt.device.providers import Device
    from vessel_rt.formats.schema import to_json
    from vessel_rt.inputs.pseudonyms import printable

    folder = types.find_bundle_folder(arguments.bundle, quiet=arguments.json)
    output = arguments.output or Path("out") / f"check-{Path(os.path.abspath(folder)).name}"
    devices = arguments.devices or (arguments.device or Device("auto"),)
    options = CheckOptions(folder, output, devices, arguments.threads, arguments.minutes)
    found = check(options, (lambda line: None) if arguments.json else _say(len(devices) > 1))
    if arguments.json:
        print(to_json(found), end="")
    else:
        print(f"{printable(found.verdict)}\nreport: {printable(str(output / CHECK_PAGE))}")
    return int(not found.passed)


def _say(several: bool) -> Callable[[CheckLine], None]:
    """A function that prints a line, with the grade's name before the first of its lines; of several devices, with the device."""
    from vessel_rt.inputs.pseudonyms import printable

    last: list[str] = []

    def say(line: CheckLine) -> None:
        grade = f"{line.grade}, {line.device}" if several and line.device else line.grade
        if last != [grade]:
            last[:] = [grade]
            print(grade)
        outcome = line.outcome.upper() if line.outcome == "fail" else line.outcome
        told = ": ".join(filter(None, (line.figure, line.reason))) if line.outcome != "skip" else line.reason
        print(printable(f"  {outcome:5} {line.name:20} {told}"), flush=True)

    return say

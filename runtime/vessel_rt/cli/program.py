"""`vessel-rt` itself: parse the arguments, call the command, and turn what it raises into a message and an exit code."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import vessel_rt
from vessel_rt.cli.bench import add_bench
from vessel_rt.cli.check import add_check
from vessel_rt.cli.devices import add_devices_commands
from vessel_rt.cli.infer import add_infer, run_infer
from vessel_rt.cli.results import add_results_commands
from vessel_rt.completion import add_completion
from vessel_rt.errors import VesselError
from vessel_rt.io.streams import standard_streams

__all__ = ["main"]

_EXAMPLES = """examples:
  vessel-rt infer frames/                                 every image of a folder, to out/<bundle>; again: only what is left of it
  vessel-rt infer a.png cine.dcm 'more/*.jpg' -o results  files and globs, DICOM included
  vessel-rt evaluate results --gt frames/annotations.json
  vessel-rt report results
  vessel-rt devices --bundle engines/iter_12192-fp16      where that bundle can run, and what is missing elsewhere
  vessel-rt check --bundle engines/iter_12192-fp16        prove that it works on this machine
  vessel-rt bench frames/ --batch 1 2 4                   how fast it is here, and how much memory it takes
  vessel-rt COMMAND --help                                every option, and more examples
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vessel-rt` and return the exit code: 0 done, 1 bad input (nothing was started, or some images failed), 130 or 143 interrupted.

    Standard output and error may be closed or full: the exit code is about the work, not about what was printed. Commands that only print
    (help, devices, plan, check-data) return 1 if they could not.

    Bad usage ends in argparse's SystemExit(2). A bug prints its traceback, without the names of images.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads would spin on cores that the graphs need
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does: a file name need not be Unicode
    with standard_streams() as out:
        try:
            arguments = _parser().parse_args(argv)
        except SystemExit as e:  # help, the version, or bad usage
            out.flush()
            raise SystemExit(_printed(out, int(e.code or 0))) from None
        code = _run(arguments)
        out.flush()
        return _printed(out, code) if arguments.only_prints else code


def _printed(out: Any, code: int) -> int:
    """`code`, or 1 if it is 0 and not everything was printed. A closed pipe, as after `| head`, is no reason for a message."""
    if out.fault and not isinstance(out.fault, BrokenPipeError):
        print(f"vessel-rt: error: standard output: cannot be written ({out.fault.strerror})", file=sys.stderr)
    return code or int(out.fault is not None)


def _run(arguments: argparse.Namespace) -> int:
    try:
        return int(arguments.run(arguments))
    except VesselError as e:
        from vessel_rt.inputs.pseudonyms import printable

        print(f"vessel-rt: error: {printable(str(e))}", file=sys.stderr)
        if arguments.run is run_infer and arguments.json:
            print(json.dumps({"error": str(e), "exit_code": 1}))
        return 1
    except OSError as e:
        from vessel_rt.inputs.pseudonyms import conceal, printable

        print(f"vessel-rt: error: {printable(conceal(str(e.filename or 'a file')))}: {e.strerror or type(e).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vessel-rt: interrupted; results that were finished before are kept", file=sys.stderr)
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
    parser.set_defaults(only_prints=False)
    parser.add_argument("--version", action="version", version=f"vessel-rt {vessel_rt.__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_infer(commands)
    add_results_commands(commands)
    add_devices_commands(commands)
    add_check(commands)
    add_bench(commands)
    return parser

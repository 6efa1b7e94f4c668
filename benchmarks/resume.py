"""Compares a run that is killed repeatedly with an uninterrupted one: `vessel-rt infer` with two processes, ended by SIGKILL and resumed.

    python -m benchmarks.resume [--bundle DIR] [--images N] [--kills N] [--seed S]

Each kill happens at a random moment: while the run loads, checks finished frames, works, or ends. The final output must be byte-identical
to that of the uninterrupted run, except for files with times (run.json, timings.jsonl and report.html). The uninterrupted run also
counts how often, and how long, it waits until files are on the disk. The last line is JSON. The exit code is 1 if a file differs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.measure import publish, square_frames

_SCRIPT = Path(sys.executable).with_name("vessel-rt")
_SIDE = 512  # pixels: one tile
# vessel-rt, with the count and the seconds of its syncs written to the file that the first argument names. Worker processes do not sync.
_COUNTING = """
import json, os, sys, time
from vessel_rt.cli.program import main
fsync, seconds = os.fsync, []
def timed(descriptor):
    began = time.perf_counter()
    fsync(descriptor)
    seconds.append(time.perf_counter() - began)
os.fsync = timed
code = main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump({"count": len(seconds), "seconds": sum(seconds)}, file)
sys.exit(code)
"""
_WITH_TIMES = {"run.json", "timings.jsonl", "report.html"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=Path("engines/tiny-fp32"), metavar="DIR")
    parser.add_argument("--frames", type=Path, default=Path("examples/tiny/frames"), metavar="DIR")
    parser.add_argument("--images", type=int, default=2000, metavar="N")
    parser.add_argument("--devices", default="cpu:2", metavar="LIST")
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the moments; the progress at a moment depends on the machine"
    )
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        square_frames(arguments.frames, folder / "frames", _SIDE, arguments.images)
        command = ["infer", folder / "frames", "--bundle", arguments.bundle, "--devices", arguments.devices, "-q", "-o"]
        clean, killed = [[str(part) for part in [*command, folder / out]] for out in ("clean", "killed")]
        clean, killed = [sys.executable, "-c", _COUNTING, str(folder / "syncs.json"), *clean], [str(_SCRIPT), *killed]
        began = time.perf_counter()
        subprocess.run(clean, check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - began
        syncs = json.loads((folder / "syncs.json").read_text(encoding="utf-8"))
        report_bytes = (folder / "clean" / "report.html").stat().st_size
        took = json.loads((folder / "clean" / "run.json").read_text(encoding="utf-8"))["seconds"]
        done = [0]
        for left in tqdm(range(arguments.kills, 0, -1), desc="killed", unit="time", disable=None):
            rest = took["images"] * (1 - done[-1] / arguments.images)  # leave most of the work for the other kills
            done.append(_kill(killed, folder / "killed", chance.uniform(0, took["load"] + 1.5 * rest / (left + 1))))
        began = time.perf_counter()
        subprocess.run(killed, check=True, stdout=sys.stderr)
        last = time.perf_counter() - began
        differing = _differing(folder / "clean", folder / "killed")
        files = len(_files(folder / "clean"))
    result: dict[str, Any] = {
        "bundle": arguments.bundle.resolve().name,
        "devices": arguments.devices,
        "images": arguments.images,
        "kills": arguments.kills,
        "done_after_each": done[1:],
        "seconds_uninterrupted": round(seconds, 1),
        "seconds_after_last_kill": round(last, 1),
        "syncs": syncs["count"],
        "syncs_share_of_time": round(syncs["seconds"] / seconds, 5),
        "report_bytes": report_bytes,
        "files_compared": files,
        "files_that_differ": differing,
    }
    publish("resume", result)
    return int(bool(differing))


def _kill(command: list[str], output: Path, seconds: float) -> int:
    """Run `command` for `seconds`, kill it, and return the number of frames that are done."""
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        process.wait(timeout=seconds)
        raise SystemExit("the run ended before all kills: give more --images or fewer --kills")
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return _done(output)


def _done(output: Path) -> int:
    journal, results = output / "journal.jsonl", output / "results.jsonl"
    if journal.exists():
        return journal.read_bytes().count(b"\n") - 1
    return results.read_bytes().count(b"\n") if results.exists() else 0


def _files(output: Path) -> dict[str, Path]:
    found = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if name not in _WITH_TIMES}


def _differing(one: Path, other: Path) -> int:
    """The number of files that only one folder has or that differ. Files with times need only exist in `other`."""
    ours, theirs = _files(one), _files(other)
    absent = len(ours.keys() ^ theirs.keys()) + sum(not (other / name).exists() for name in _WITH_TIMES)
    return absent + sum(ours[name].read_bytes() != theirs[name].read_bytes() for name in ours.keys() & theirs.keys())


if __name__ == "__main__":
    raise SystemExit(main())

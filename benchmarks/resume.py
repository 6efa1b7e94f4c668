"""A run that is killed again and again, against one in peace: `vessel-rt infer` over two processes, ended by SIGKILL and begun again.

    python -m benchmarks.resume [--bundle DIR] [--images N] [--kills N] [--seed S]

Each time the run is killed at a random moment: while it loads, checks what is done, works, or ends. What it leaves at last has to be what
the run in peace leaves, byte for byte, but for what tells of times (run.json, timings.jsonl, and report.html, which shows them).
The last line is JSON; exit code 1 where a byte differs.
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
_OF_TIMES = {"run.json", "timings.jsonl", "report.html"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=Path("engines/tiny-fp32"), metavar="DIR")
    parser.add_argument("--frames", type=Path, default=Path("examples/tiny/frames"), metavar="DIR")
    parser.add_argument("--images", type=int, default=2000, metavar="N")
    parser.add_argument("--devices", default="cpu:2", metavar="LIST")
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments; what is done by then depends on the machine")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        square_frames(arguments.frames, folder / "frames", _SIDE, arguments.images)
        command = [_SCRIPT, "infer", folder / "frames", "--bundle", arguments.bundle, "--devices", arguments.devices, "-q", "-o"]
        clean, killed = [[str(part) for part in [*command, folder / out]] for out in ("clean", "killed")]
        began = time.perf_counter()
        subprocess.run(clean, check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - began
        took = json.loads((folder / "clean" / "run.json").read_text(encoding="utf-8"))["seconds"]
        done = [0]
        for left in tqdm(range(arguments.kills, 0, -1), desc="killed", unit="time", disable=None):
            rest = took["images"] * (1 - done[-1] / arguments.images)  # most of it has to be left for the other kills
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
        "seconds_in_peace": round(seconds, 1),
        "seconds_of_the_last": round(last, 1),
        "files_compared": files,
        "files_that_differ": differing,
    }
    publish("resume", result)
    return int(bool(differing))


def _kill(command: list[str], output: Path, seconds: float) -> int:
    """Run `command` for `seconds`, kill it, and say how many frames are done by then."""
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        process.wait(timeout=seconds)
        raise SystemExit("the run ended before it was killed often enough: more images, or fewer kills")
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
    return {name: path for name, path in found.items() if name not in _OF_TIMES}


def _differing(one: Path, other: Path) -> int:
    """Files that only one of two folders has, or that are not equal; `other` has those of times, too."""
    ours, theirs = _files(one), _files(other)
    absent = len(ours.keys() ^ theirs.keys()) + sum(not (other / name).exists() for name in _OF_TIMES)
    return absent + sum(ours[name].read_bytes() != theirs[name].read_bytes() for name in ours.keys() & theirs.keys())


if __name__ == "__main__":
    raise SystemExit(main())

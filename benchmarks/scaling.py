"""`vessel-rt infer` by folder size, CPU threads and batch: time per image and peak memory, which must not grow with the folder.

    python -m benchmarks.scaling [--bundle DIR] [--sizes 12 100 500 2000] [--threads 1 0] [--batches 1 2 4]

The frames are those of the example, resized to one tile and repeated as hard links. Sizes run with the default options; threads and
batches vary one at a time, on the largest folder of at most 100 images. Times and peaks come from run.json; no time includes loading.
A peak is the highest of many readings, and so is higher in a longer run even if nothing grows. So the resident memory is read during the
run, too: its growth is the median of the last quarter of the run over that of the second. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import process_field, publish, square_frames
from vessel_rt.errors import VesselError

_SCRIPT = Path(sys.executable).with_name("vessel-rt")
_SIDE = 512  # pixels; a square of any side is one tile
_FRAMES = 14  # distinct ones, which the folders link to
_CROSSED = 100  # images of the folder for the runs with other threads and batches
_MEMORY_BOUND = 1.05  # peak memory of the largest folder over that of the crossed one; also growth during the largest run
_INTERVAL = 0.1  # seconds between two readings of the resident memory


@dataclasses.dataclass(frozen=True)
class _Row:
    """One run. `threads` 0 is vessel-rt's default, all cores. `streams` and `batch` are those in run.json."""

    images: int
    threads: int
    streams: int
    batch: int
    images_per_second: float
    ms_per_image: float
    load_seconds: float
    peak_resident_mib: float
    resident_growth: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=Path("engines/tiny-fp32"), metavar="DIR")
    parser.add_argument("--frames", type=Path, default=Path("examples/tiny/frames"), metavar="DIR")
    parser.add_argument("--sizes", type=int, nargs="+", default=[12, 100, 500, 2000], metavar="N", help="images in a folder")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 0], metavar="N", help="0: all cores")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4], metavar="N")
    arguments = parser.parse_args()
    sizes = sorted(set(arguments.sizes))
    crossed = max((size for size in sizes if size <= _CROSSED), default=sizes[0])
    with tempfile.TemporaryDirectory() as folder:
        try:
            runs = _Runs(arguments.bundle, arguments.frames, Path(folder))
            by_size = [runs.row(size) for size in sizes]
            by_threads = [runs.row(crossed, threads=threads) for threads in arguments.threads]
            by_batch = [runs.row(crossed, batch=batch) for batch in arguments.batches]
        except VesselError as e:
            print(e, file=sys.stderr)
            return 1
        except subprocess.CalledProcessError:  # vessel-rt has printed the reason
            return 1
    smallest, largest, base = by_size[0], by_size[-1], by_size[sizes.index(crossed)]
    publish(
        "scaling",
        {
            **runs.setting,
            "by_size": [dataclasses.asdict(row) for row in by_size],
            "time_ratio": {
                "images": [largest.images, smallest.images],
                "measured": round(largest.ms_per_image / smallest.ms_per_image, 3),
            },
            "memory_ratio": {
                "images": [largest.images, base.images],
                "measured": round(largest.peak_resident_mib / base.peak_resident_mib, 3),
                "bound": _MEMORY_BOUND,
            },
            "resident_growth": {"images": largest.images, "measured": largest.resident_growth, "bound": _MEMORY_BOUND},
            "by_threads": [dataclasses.asdict(row) for row in by_threads],
            "by_batch": [dataclasses.asdict(row) for row in by_batch],
        },
    )
    return 0


class _Runs:
    """Runs of one bundle on folders made in `folder`. Equal runs are not repeated."""

    def __init__(self, bundle: Path, frames: Path, folder: Path) -> None:
        self._bundle, self._folder = bundle, folder
        square_frames(frames, folder / "frames", _SIDE, _FRAMES)
        self._frames = sorted((folder / "frames").iterdir())
        self._rows: list[_Row] = []
        self.setting: dict[str, Any] = {}

    def row(self, images: int, *, threads: int = 0, batch: int | None = None) -> _Row:
        """The run on `images` images. `batch` None is vessel-rt's default."""
        for row in self._rows:
            if (row.images, row.threads) == (images, threads) and batch in (None, row.batch):
                return row
        print(f"{images} images, threads {threads or 'all'}, batch {batch or 'default'}", file=sys.stderr)
        row = self._run(images, threads, batch)
        print(f"{row.ms_per_image} ms per image, peak {row.peak_resident_mib} MiB", file=sys.stderr)
        self._rows.append(row)
        return row

    def _run(self, images: int, threads: int, batch: int | None) -> _Row:
        """Run `vessel-rt infer`, which shows its own progress."""
        options = [*(["--threads", str(threads)] if threads else []), *(["--batch", str(batch)] if batch else [])]
        with tempfile.TemporaryDirectory(dir=self._folder) as output:
            command = [_SCRIPT, "infer", self._input(images), "--bundle", self._bundle, "-o", Path(output), *options]
            resident = _resident_while([str(part) for part in command])
            run = json.loads((Path(output) / "run.json").read_text(encoding="utf-8"))
        self.setting = {"bundle": run["bundle"]["name"], "precision": run["bundle"]["precision"], "device": run["device"]}
        return _Row(
            images=run["counts"]["ok"],
            threads=threads,
            streams=run["batch"]["streams"],
            batch=run["batch"]["at_first"],
            images_per_second=round(run["images_per_second"], 3),
            ms_per_image=round(run["seconds"]["images"] / images * 1e3, 1),
            load_seconds=run["seconds"]["load"],
            peak_resident_mib=round(run["peak_memory_bytes"] / 2**20, 1),
            resident_growth=round(_growth(resident), 3),
        )

    def _input(self, images: int) -> Path:
        """A folder with `images` images, made at first use."""
        folder = self._folder / f"{images}-images"
        if not folder.exists():
            folder.mkdir()
            for number in range(images):
                os.link(self._frames[number % len(self._frames)], folder / f"study-{number + 1:04}.png")
        return folder


def _resident_while(command: list[str]) -> list[int]:
    """Run `command`, and read its resident memory, KiB, from the first moment to the last. Linux only.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    readings = []
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        while process.poll() is None:
            readings.append(process_field(process.pid, "status", "VmRSS:"))
            time.sleep(_INTERVAL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return readings


def _growth(readings: list[int]) -> float:
    """The median of the last quarter over that of the second: the first one loads."""
    quarter = max(len(readings) // 4, 1)
    return statistics.median(readings[-quarter:]) / statistics.median(readings[quarter : 2 * quarter] or readings)


if __name__ == "__main__":
    raise SystemExit(main())

"""`vessel-rt merge-shards`: combines the output folders of the shards of a run into the folder that a single run would have written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from vessel_rt.errors import VesselError
from vessel_rt.io.files import open_regular, writing
from vessel_rt.io.folder_lock import locked
from vessel_rt.results.cines import write_cines
from vessel_rt.results.reader import RESULTS_FILE, RUN_FILE, TIMINGS_FILE, iter_frames, iter_timings, read_run
from vessel_rt.results.report import write_report
from vessel_rt.results.run_file import write_run
from vessel_rt.results.schema import ResultLine, RunCounts, RunFile, TimingLine
from vessel_rt.results.writer import is_blank

__all__ = ["merge_shards"]

_STAGING = ".merging-"
_OF_A_SHARD: tuple[Literal["device", "counts", "started", "seconds", "images_per_second"], ...] = (
    "device",
    "counts",
    "started",
    "seconds",
    "images_per_second",
)

_Line = TypeVar("_Line", ResultLine, TimingLine)


def merge_shards(shards: Sequence[Path], output: Path) -> int:
    """Copy the results of all shards into a new folder `output`, and return the number of frames.

    The files are made in a temporary subfolder and moved at the end, so a command that fails leaves `output` unchanged.

    Raises:
        VesselError: a shard is missing, unfinished, locked by another command, given twice or from another run; a file of it was changed;
            `output` is not empty or cannot be written.
    """
    if output.resolve() in [shard.resolve() for shard in shards]:
        raise VesselError(f"{output}: one of the shards, and not empty; choose another output folder with -o")
    with contextlib.ExitStack() as stack:
        for shard in shards:
            stack.enter_context(locked(shard, shared=True))
        runs = [read_run(shard) for shard in shards]
        total = _check_shards(shards, runs)
        lines = _in_order(shards, iter_frames, total)
        timings = _in_order(shards, iter_timings, total)
        summary = _merged(runs)
        stack.enter_context(locked(output, make=True))
        with writing(output), _staging(output) as staging:
            _copy_files(lines, staging)
            for name, ordered in ((RESULTS_FILE, lines), (TIMINGS_FILE, timings)):
                (staging / name).write_text("".join(json.dumps(line) + "\n" for _, line in ordered), encoding="ascii")
            write_cines(staging)
            write_run(staging, summary)
            write_report(staging)
    return total


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A temporary folder in `output`, which is locked and empty. At the end its content is moved to `output`, run.json last."""
    for path in list(output.glob(f"{_STAGING}*")):  # left by a command that was killed
        shutil.rmtree(path)
    if not is_blank(output):
        raise VesselError(f"{output}: not empty; choose another output folder with -o")
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=output) as name:
        yield Path(name)
        moved: list[Path] = []
        try:
            for path in sorted(Path(name).iterdir(), key=lambda path: path.name == RUN_FILE):
                os.replace(path, output / path.name)
                moved.append(path)
        except BaseException:
            for path in moved:
                os.replace(output / path.name, path)
            raise


def _check_shards(shards: Sequence[Path], runs: Sequence[RunFile]) -> int:
    """The number of frames in all shards together."""
    found: dict[int, Path] = {}
    for shard, run in zip(shards, runs, strict=True):
        options = run["options"]
        if options["key"] != runs[0]["options"]["key"]:
            raise VesselError(f"{shard}: its study codes have another key than those of {shards[0]}; run that shard again with --key")
        if options["num_shards"] != len(shards):
            raise VesselError(f"{shard}: one of {options['num_shards']} shards, but {len(shards)} were given")
        other = found.setdefault(options["shard_id"], shard)
        if other is not shard:
            raise VesselError(f"{shard}: shard {options['shard_id']}, and so is {other}; give each shard once")
    return int(runs[0]["counts"]["in_all_shards"])


def _in_order(shards: Sequence[Path], read: Callable[[Path], Iterable[list[_Line]]], total: int) -> list[tuple[Path, _Line]]:
    """The lines of all shards, each with its folder, in the order of a single run."""
    found = [(shard, line) for shard in shards for lines in read(shard) for line in lines]
    if len({line.get("settings") for _, line in found}) > 1:
        raise VesselError(f"{shards[0]}: the other shards have another bundle, device, question or version; run all in the same way")
    found.sort(key=lambda item: item[1]["index"])
    indices = {line["index"] for _, line in found}
    if len(indices) != total or max(indices, default=-1) != total - 1 or len({line["code"] for _, line in found}) != total:
        raise VesselError(f"{shards[0]}: the other shards have other inputs; give all shards the same inputs")
    return found


def _copy_files(lines: Sequence[tuple[Path, ResultLine]], output: Path) -> None:
    files: dict[str, tuple[Path, str, str]] = {}
    for shard, line in lines:
        for file, sha256 in line["files"].items():
            if files.setdefault(file, (shard, sha256, line["code"])) != (shard, sha256, line["code"]):
                raise VesselError(
                    f"{shard}: a file of {line['code']} has the name of one of {files[file][2]}; give all shards the same inputs"
                )
    for file, (shard, sha256, code) in tqdm(files.items(), desc="merging", unit="file", disable=None, delay=2, leave=False):
        folder = file.partition("/")[0]
        try:
            with open_regular(shard / file) as source:
                content = source.read()
        except OSError as e:
            raise VesselError(f"{shard}: a file of {code} cannot be read ({e.strerror})") from e
        if hashlib.sha256(content).hexdigest() != sha256:
            raise VesselError(f"{shard}: a file of {code} in {folder}/ was changed after it was written; run that shard again")
        (output / folder).mkdir(exist_ok=True)
        (output / file).write_bytes(content)


def _merged(runs: Sequence[RunFile]) -> RunFile:
    """The content of run.json: the sums of the counts, the longest times, and what each shard reported."""
    counts: Any = {key: sum(run["counts"].get(key, 0) for run in runs) for key in RunCounts.__annotations__ if key in runs[0]["counts"]}
    seconds = {key: max(run["seconds"].get(key, 0) for run in runs) for key in runs[0]["seconds"]}
    return {
        **runs[0],
        "device": "; ".join(run["device"] for run in runs),
        "options": {**runs[0]["options"], "num_shards": 1, "shard_id": 0},
        "counts": counts | {"in_all_shards": counts["images"]},
        "started": min(run["started"] for run in runs),
        "seconds": seconds,
        "images_per_second": round(sum(run["images_per_second"] for run in runs), 4),
        "peak_memory_bytes": max((run["peak_memory_bytes"] or 0 for run in runs), default=0) or None,
        "shards": [{key: run[key] for key in _OF_A_SHARD} for run in runs],
    }

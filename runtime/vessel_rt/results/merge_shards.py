"""The parts of a run, made on hosts that share nothing, as one output folder: what one run would have left."""

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
from typing import Any

from tqdm import tqdm

from vessel_rt.errors import VesselError
from vessel_rt.io.files import open_regular, writing
from vessel_rt.io.folder_lock import locked
from vessel_rt.results.cines import write_cines
from vessel_rt.results.reader import RESULTS_FILE, RUN_FILE, TIMINGS_FILE, Lines, iter_frames, iter_timings, read_run
from vessel_rt.results.report import write_report
from vessel_rt.results.writer import is_blank

__all__ = ["merge"]

_STAGING = ".merging-"

_Placed = list[tuple[Path, dict[str, Any]]]  # lines, each with the folder of its part


def merge(parts: Sequence[Path], output: Path) -> int:
    """Copy the results of all parts into a new folder `output`; returns the number of frames.

    All of it is made in a folder within, and moved to its place at the end: a merge that fails leaves `output` as it was.

    Raises:
        VesselError: a part is missing, not finished, given twice, of another run, or worked on; a file of it was changed; `output` is not
            empty, or cannot be written.
    """
    if output.resolve() in [part.resolve() for part in parts]:
        raise VesselError(f"{output}: one of the parts, and not empty; choose another output folder with -o")
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(locked(part, shared=True))
        runs = [read_run(part) for part in parts]
        total = _check_parts(parts, runs)
        lines = _in_order(parts, iter_frames, total)
        timings = _in_order(parts, iter_timings, total)
        summary = _merged(runs)
        stack.enter_context(locked(output, make=True))
        with writing(output), _staging(output) as staging:
            _copy_files(lines, staging)
            for name, ordered in ((RESULTS_FILE, lines), (TIMINGS_FILE, timings)):
                (staging / name).write_text("".join(json.dumps(line) + "\n" for _, line in ordered), encoding="ascii")
            write_cines(staging)
            (staging / RUN_FILE).write_text(json.dumps(summary, indent=1) + "\n", encoding="ascii")
            write_report(staging)
    return total


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder in `output`, which is locked and empty. What the block leaves in it is moved to `output`, run.json last."""
    for path in list(output.glob(f"{_STAGING}*")):  # of a merge that was killed
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


def _check_parts(parts: Sequence[Path], runs: Sequence[dict[str, Any]]) -> int:
    """How many frames all parts have together."""
    found: dict[int, Path] = {}
    for part, run in zip(parts, runs, strict=True):
        options = run["options"]
        if options["key"] != runs[0]["options"]["key"]:
            raise VesselError(f"{part}: its study codes were made with another key than those of {parts[0]}; run it again with that --key")
        if options["num_parts"] != len(parts):
            raise VesselError(f"{part}: one of {options['num_parts']} parts; {len(parts)} were given")
        other = found.setdefault(options["part_id"], part)
        if other is not part:
            raise VesselError(f"{part}: part {options['part_id']}, as {other} is")
    return int(runs[0]["counts"]["in_all_parts"])


def _in_order(parts: Sequence[Path], read: Callable[[Path], Iterable[Lines]], total: int) -> _Placed:
    """The lines of all parts, each with its folder, as one run would have them."""
    found = [(part, line) for part in parts for lines in read(part) for line in lines]
    if len({line["settings"] for _, line in found if "settings" in line}) > 1:
        raise VesselError(f"{parts[0]}: another bundle, device, question or version made the other parts; run them alike")
    found.sort(key=lambda item: item[1]["index"])
    indices = {line["index"] for _, line in found}
    if len(indices) != total or max(indices, default=-1) != total - 1 or len({line["code"] for _, line in found}) != total:
        raise VesselError(f"{parts[0]}: its inputs were not those of the other parts; give all parts the same ones")
    return found


def _copy_files(lines: _Placed, output: Path) -> None:
    files: dict[str, tuple[Path, str, str]] = {}
    for part, line in lines:
        for file, sha256 in line["files"].items():
            if files.setdefault(file, (part, sha256, line["code"])) != (part, sha256, line["code"]):
                raise VesselError(f"{part}: a file of {line['code']} is called as one of {files[file][2]}; give all parts the same inputs")
    for file, (part, sha256, code) in tqdm(files.items(), desc="merging", unit="file", disable=None, delay=2, leave=False):
        folder = file.partition("/")[0]
        try:
            with open_regular(part / file) as source:
                content = source.read()
        except OSError as e:
            raise VesselError(f"{part}: a file of {code} cannot be read ({e.strerror})") from e
        if hashlib.sha256(content).hexdigest() != sha256:
            raise VesselError(f"{part}: a file of {code} in {folder}/ was changed since it was written; run that part again")
        (output / folder).mkdir(exist_ok=True)
        (output / file).write_bytes(content)


def _merged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of run.json: counts of all, the longest time, and the parts' own accounts."""
    counts = {key: sum(run["counts"].get(key, 0) for run in runs) for key in runs[0]["counts"]}
    seconds = {key: max(run["seconds"].get(key, 0) for run in runs) for key in runs[0]["seconds"]}
    return {
        **runs[0],
        "device": "; ".join(run["device"] for run in runs),
        "options": runs[0]["options"] | {"num_parts": 1, "part_id": 0},
        "counts": counts | {"in_all_parts": counts["images"]},
        "started": min(run["started"] for run in runs),
        "seconds": seconds,
        "images_per_second": round(sum(run["images_per_second"] for run in runs), 4),
        "peak_memory_bytes": max((run["peak_memory_bytes"] or 0 for run in runs), default=0) or None,
        "parts": [{key: run[key] for key in ("device", "counts", "started", "seconds", "images_per_second")} for run in runs],
    }

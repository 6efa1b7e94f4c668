"""The parts of a run, made on hosts that share nothing, as one output folder: what one run would have left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vessel_rt.cines import write_cines
from vessel_rt.errors import VesselError
from vessel_rt.outputs import is_result_file, replacing, writing
from vessel_rt.report import write_report
from vessel_rt.results import RESULTS_FILE, RUN_FILE, TIMINGS_FILE, read_results, read_run, read_timings

__all__ = ["merge"]


def merge(parts: Sequence[Path], output: Path) -> int:
    """Copy the results of all parts into a new folder `output`; returns the number of frames.

    Raises:
        VesselError: a part is missing, not finished, given twice, or of another run; a file of it was changed; `output` is not empty.
    """
    runs = [read_run(part) for part in parts]
    try:
        total = _check_parts(parts, runs)
        lines = _in_order(parts, read_results, total)
        timings = _in_order(parts, read_timings, total)
    except (KeyError, TypeError, ValueError) as e:
        raise VesselError(f"{parts[0]} or another part: not written by this version of vessel-rt ({type(e).__name__}: {e})") from e
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise VesselError(f"{output}: not empty; choose another output folder with -o")
    with writing(output):
        _copy_files(lines, output)
        for name, ordered in ((RESULTS_FILE, lines), (TIMINGS_FILE, timings)):
            with replacing(output / name) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for _, line in ordered), encoding="utf-8")
        write_cines(output)
        with replacing(output / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(_merged(runs), indent=1) + "\n", encoding="ascii")
    write_report(output)
    return total


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


def _in_order(parts: Sequence[Path], read: Callable[[Path], list[dict[str, Any]]], total: int) -> list[tuple[Path, dict[str, Any]]]:
    """The lines of all parts, each with its folder, as one run would have them."""
    found = [(part, line) for part in parts for line in read(part)]
    if len({line["settings"] for _, line in found if "settings" in line}) > 1:
        raise VesselError(f"{parts[0]}: another bundle, device, question or version made the other parts; run them alike")
    found.sort(key=lambda item: item[1]["index"])
    if {line["index"] for _, line in found} != set(range(total)) or len({line["code"] for _, line in found}) != total:
        raise VesselError(f"{parts[0]}: its inputs were not those of the other parts; give all parts the same ones")
    return found


def _copy_files(lines: Sequence[tuple[Path, dict[str, Any]]], output: Path) -> None:
    files: dict[str, tuple[Path, str, str]] = {}
    for part, line in lines:
        for file, sha256 in line["files"].items():
            if files.setdefault(file, (part, sha256, line["code"])) != (part, sha256, line["code"]):
                raise VesselError(f"{part}: a file of {line['code']} is called as one of {files[file][2]}; give all parts the same inputs")
    for file, (part, sha256, code) in tqdm(files.items(), desc="merging", unit="file", disable=None, delay=2, leave=False):
        folder = file.partition("/")[0]
        if not is_result_file(file):
            raise VesselError(f"{part / RESULTS_FILE}: lists a file that is not among results")
        try:
            content = (part / file).read_bytes()
        except OSError as e:
            raise VesselError(f"{part}: a file of {code} cannot be read ({e.strerror})") from e
        if hashlib.sha256(content).hexdigest() != sha256:
            raise VesselError(f"{part}: a file of {code} in {folder}/ was changed since it was written; run that part again")
        (output / folder).mkdir(parents=True, exist_ok=True)
        with replacing(output / file) as temporary:
            temporary.write_bytes(content)


def _merged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of run.json: counts of all, the longest time, and the parts' own accounts."""
    counts = {key: sum(run["counts"][key] for run in runs) for key in runs[0]["counts"]}
    seconds = {key: max(run["seconds"][key] for run in runs) for key in runs[0]["seconds"]}
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

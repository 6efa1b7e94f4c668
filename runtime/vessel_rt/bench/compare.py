"""`vessel-rt bench --compare`: merges the measurements of several machines. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vessel_rt.bench.schema import SCHEMA, BenchFile, BenchRun
from vessel_rt.errors import VesselError
from vessel_rt.formats.schema import decode, parse_json, read_small

__all__ = ["merge", "read_bench"]


def read_bench(path: Path) -> BenchFile:
    """The content of a bench.json; what a newer minor version added is left out.

    Raises:
        VesselError: it cannot be read, is not a bench.json, is damaged, or is of a newer schema.
    """
    try:
        found = decode(parse_json(read_small(path)), BenchFile, SCHEMA)
    except OSError as e:
        raise VesselError(f"{path}: cannot be read ({e.strerror or type(e).__name__})") from e
    except ValueError as e:
        raise VesselError(f"{path}: not a bench.json of `vessel-rt bench` ({e})") from e
    if not found.runs:
        raise VesselError(f"{path}: has no measurements")
    for run in found.runs:
        if any(row.bundle >= len(run.bundles) for row in run.rows):
            raise VesselError(f"{path}: not a bench.json of `vessel-rt bench` (a row names a bundle that is not there)")
    return found


def merge(files: Sequence[BenchFile]) -> BenchFile:
    """The runs of all files, each once, in order."""
    runs: list[BenchRun] = []
    for run in (run for file in files for run in file.runs):
        if run not in runs:
            runs.append(run)
    return BenchFile(runs=tuple(runs))

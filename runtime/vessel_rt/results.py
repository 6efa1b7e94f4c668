"""The files of a run's output folder, as they are read: results.jsonl, timings.jsonl, run.json and evaluation.json.

Knows nothing of how they come about (record.py, evaluate.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vessel_rt.errors import VesselError
from vessel_rt.files import read_regular

__all__ = [
    "EVALUATION_FILE",
    "MEANS_FILE",
    "METRICS_FILE",
    "REPORT_FILE",
    "RESULTS_FILE",
    "RUN_FILE",
    "TIMINGS_FILE",
    "iter_lines",
    "json_lines",
    "read_json",
    "read_results",
    "read_run",
    "read_timings",
]

RESULTS_FILE = "results.jsonl"
TIMINGS_FILE = "timings.jsonl"
RUN_FILE = "run.json"
EVALUATION_FILE = "evaluation.json"
METRICS_FILE = "metrics.csv"
MEANS_FILE = "metrics_mean.csv"
REPORT_FILE = "report.html"

_LARGEST = 2**30  # bytes of a JSON file; what is made of it takes several times as much memory
_OF_A_RUN = (RESULTS_FILE, TIMINGS_FILE, RUN_FILE)


def read_results(output: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl, one an image and question, in the order of the inputs. Raises VesselError."""
    lines: list[dict[str, Any]] = _read(output / RESULTS_FILE, json_lines)
    return lines


def iter_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON Lines file, one after the other. Raises VesselError."""
    with _faults(path), path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def read_timings(output: Path) -> list[dict[str, Any]]:
    """The lines of timings.jsonl, in the same order. Raises VesselError."""
    lines: list[dict[str, Any]] = _read(output / TIMINGS_FILE, json_lines)
    return lines


def read_run(output: Path) -> dict[str, Any]:
    """run.json. Raises VesselError."""
    found: dict[str, Any] = read_json(output / RUN_FILE)
    return found


def read_json(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A JSON file in UTF-8, with or without a byte order mark, of at most 1 GiB; `pairs` makes what stands for an object.

    Raises:
        VesselError: it is missing, not a regular file, too large, not UTF-8, not JSON, nested too deeply, or has a number of thousands of
            digits.
    """
    with _faults(path):
        return json.loads(read_regular(path, _LARGEST).decode("utf-8-sig"), object_pairs_hook=pairs)


def json_lines(text: str) -> list[Any]:
    """The lines of a JSON Lines file. Not str.splitlines: that breaks at characters that JSON has inside its strings."""
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")] if text else []


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    with _faults(path):
        return parse(path.read_text(encoding="utf-8"))


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        hint = "a run that was finished leaves it in its output folder" if path.name in _OF_A_RUN else "no such file"
        raise VesselError(f"{path}: missing; {hint}") from None
    except (OSError, ValueError, RecursionError, MemoryError) as e:
        raise VesselError(f"{path}: cannot be read ({_reason(e)})") from e


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8; save it as UTF-8"
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return "not JSON that can be taken: a number of thousands of digits"  # the one thing else that json objects to
    if isinstance(error, RecursionError):
        return "its lists are nested too deeply"
    if isinstance(error, MemoryError):
        return "it does not fit into the memory"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)

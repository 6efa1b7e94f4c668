"""Readers of an output folder: results.jsonl, timings.jsonl, run.json and evaluation.json, checked against their types.

Does not know how the files are made.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

import vessel_rt
from vessel_rt.errors import VesselError
from vessel_rt.formats.schema import NewerSchemaError
from vessel_rt.inputs.frames import cine_of
from vessel_rt.io.files import open_regular, read_regular
from vessel_rt.results.rle import decode_rle
from vessel_rt.results.schema import (
    EvaluationFile,
    ResultLine,
    Rle,
    RunFile,
    TimingLine,
    check_evaluation,
    check_result,
    check_run,
    check_timing,
)

__all__ = [
    "CINE_METRICS_FILE",
    "EVALUATION_FILE",
    "JOURNAL_FILE",
    "MEANS_FILE",
    "METRICS_FILE",
    "REPORT_FILE",
    "RESULTS_FILE",
    "RUN_FILE",
    "TIMINGS_FILE",
    "CinePlace",
    "FormError",
    "cine_place",
    "file_in",
    "iter_frames",
    "iter_lines",
    "iter_timings",
    "mask_of",
    "read_evaluation",
    "read_json",
    "read_picture",
    "read_results",
    "read_run",
]

RESULTS_FILE = "results.jsonl"
TIMINGS_FILE = "timings.jsonl"
JOURNAL_FILE = "journal.jsonl"
RUN_FILE = "run.json"
EVALUATION_FILE = "evaluation.json"
METRICS_FILE = "metrics.csv"
MEANS_FILE = "metrics_mean.csv"
CINE_METRICS_FILE = "metrics_cines.csv"
REPORT_FILE = "report.html"

_LARGEST = 2**30  # bytes of a JSON file; what is made of it takes several times as much memory
_OF_A_RUN = (RESULTS_FILE, TIMINGS_FILE, RUN_FILE)

_Line = TypeVar("_Line", ResultLine, TimingLine)
_T = TypeVar("_T")


class FormError(VesselError):
    """A file of an output folder was edited or damaged, or another version wrote it."""


class CinePlace(NamedTuple):
    """Where in a cine a frame is: the name of the cine's outputs, its study code, what it is called if names are shown, and the frame's
    number."""

    name: str
    code: str
    image: str
    number: int


def cine_place(line: ResultLine) -> CinePlace | None:
    """The place of a frame of a multi-frame file or a series; None for an image of its own."""
    if series := line.get("series"):
        return CinePlace(series["name"], series["code"], series["name"], series["number"])
    number = line["frame"]
    return None if number is None else CinePlace(cine_of(line["name"], number), cine_of(line["code"], number), line["image"], number)


def read_results(output: Path) -> list[ResultLine]:
    """The lines of results.jsonl, one per frame and question, in the order of the inputs. Raises VesselError."""
    return [line for lines in iter_frames(output) for line in lines]


def iter_frames(output: Path) -> Iterator[list[ResultLine]]:
    """The lines of results.jsonl, grouped by frame: one per question, the same questions for all frames. Raises VesselError."""
    names: set[str] = set()
    questions: list[str] = []
    for number, lines in _by_index(output / RESULTS_FILE, check_result):
        questions = questions or [line["question"] for line in lines]
        if [line["question"] for line in lines] != questions:
            _refuse(output / RESULTS_FILE, number, ValueError("a frame has other questions than the first"))
        if len({line["name"] for line in lines}) > 1 or lines[0]["name"] in names:
            _refuse(output / RESULTS_FILE, number, ValueError("two frames have one 'name', or one has two"))
        names.add(lines[0]["name"])
        yield lines


def iter_timings(output: Path) -> Iterator[list[TimingLine]]:
    """The lines of timings.jsonl, grouped in the same way. Raises VesselError."""
    return (lines for _, lines in _by_index(output / TIMINGS_FILE, check_timing))


def iter_lines(path: Path, *checks: Callable[[Any], Any], cut_short: bool = False) -> Iterator[Any]:
    """The lines of a JSON Lines file, one after another. The first check is for the first line, and so on; the last is for all others.

    A byte order mark and empty lines are ignored, because editors add them. With `cut_short` the file ends before a line that has no end or
    contains a zero byte.

    Raises:
        FormError: a line is not JSON or does not pass its check; the message has its number.
        VesselError: the file is missing or cannot be read.
    """
    return (value for _, value in _numbered(path, checks, cut_short))


def read_run(output: Path) -> RunFile:
    """run.json. Raises VesselError."""
    return _checked(output / RUN_FILE, check_run)


def read_evaluation(output: Path) -> EvaluationFile:
    """evaluation.json. Raises VesselError."""
    return _checked(output / EVALUATION_FILE, check_evaluation)


def mask_of(path: Path, line: ResultLine, rle: Rle) -> npt.NDArray[np.bool_]:
    """The mask [height, width] that `rle`, read from the file `path`, encodes for the frame of `line`. Raises FormError."""
    try:
        mask = decode_rle(rle)
        if mask.shape != (line["height"], line["width"]):
            raise ValueError("not of its frame's size")
    except ValueError as e:
        _refuse(path, None, ValueError(f"a mask of {line['code']}: {e}"))
    return mask


def file_in(line: ResultLine, folder: str) -> str | None:
    """The frame's file in `folder` of the output folder, such as its preview, if it has one."""
    return next((file for file in line["files"] if file.startswith(f"{folder}/")), None)


def read_picture(output: Path, name: str, kind: str, problem: str) -> Image.Image:
    """The picture in the file `name` of an output folder, of Pillow's format `kind`. Raises VesselError with `problem`."""
    try:
        with open_regular(output / name) as file, Image.open(file, formats=(kind,)) as picture:
            return picture.copy()
    except Exception as e:  # a decoder may raise anything if the file was changed
        raise VesselError(f"{output}: {problem}; repeat the command of the run") from e


def read_json(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark, of at most 1 GiB; `pairs` is json's object_pairs_hook.

    Raises:
        VesselError: it is missing, not a regular file, too large, not UTF-8, not JSON, nested too deeply, or has a number of thousands of
            digits.
    """
    with _faults(path):
        return json.loads(read_regular(path, _LARGEST).decode("utf-8-sig"), object_pairs_hook=pairs)


def _by_index(path: Path, check: Callable[[Any], _Line]) -> Iterator[tuple[int, list[_Line]]]:
    """The lines of each frame, and the number of the last of them."""
    last = 0
    lines: list[_Line] = []
    for number, line in _numbered(path, [check]):
        if lines and line["index"] < lines[0]["index"]:
            _refuse(path, number, ValueError("'index' is less than that of the line before"))
        if lines and line["index"] != lines[0]["index"]:
            yield last, lines
            lines = []
        lines.append(line)
        last = number
    if lines:
        yield last, lines


def _numbered(path: Path, checks: Sequence[Callable[[Any], Any]], cut_short: bool = False) -> Iterator[tuple[int, Any]]:
    """See iter_lines."""
    with _faults(path), open_regular(path) as file:
        left = deque(checks)
        for number, text in enumerate(file, start=1):
            if cut_short and (not text.endswith(b"\n") or b"\0" in text):  # zeros: of blocks that a power failure left unwritten
                return
            if text.strip():
                try:
                    value = _value(text)
                    if left:
                        (left.popleft() if len(left) > 1 else left[0])(value)
                except (ValueError, RecursionError) as e:
                    _refuse(path, number, e)
                yield number, value


def _checked(path: Path, check: Callable[[Any], _T]) -> _T:
    value = read_json(path)
    try:
        return check(value)
    except ValueError as e:
        _refuse(path, None, e)


def _value(text: bytes) -> Any:
    """A JSON value; `NaN` and `Infinity` are refused. Raises ValueError or RecursionError."""
    return json.loads(text.decode("utf-8-sig"), parse_constant=_no_number)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _said(error: Exception) -> str:
    """The text of an error without the content of the file, which may be a name."""
    match error:
        case json.JSONDecodeError():
            return f"not JSON: {error.msg} at column {error.colno}"
        case UnicodeDecodeError():
            return "not UTF-8"
        case RecursionError():
            return "nested too deeply"
    return str(error)


def _refuse(path: Path, number: int | None, error: Exception) -> NoReturn:
    """Say what is wrong with a file or a line of it, and what to do."""
    place, what = "" if number is None else f"line {number}: ", _said(error)
    if isinstance(error, NewerSchemaError):
        raise FormError(f"{path}: {place}{what}")
    wrote = None if path.name == RUN_FILE else _version(path.parent)
    if wrote not in (None, vessel_rt.__version__):
        mend = f"written by vessel-rt {wrote}, this is {vessel_rt.__version__}: use that version for this folder"
    else:
        mend = "not in the format of this version, or edited: restore the file"
    raise FormError(f"{path}: {place}{what}; {mend}, or choose another output folder for a new run")


def _version(output: Path) -> str | None:
    """The version of vessel-rt in run.json."""
    try:
        found = read_json(output / RUN_FILE)["versions"]["vessel-rt"]
    except (VesselError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        hint = "a finished run writes it to its output folder" if path.name in _OF_A_RUN else "no such file"
        if path.name in _OF_A_RUN and path.with_name(JOURNAL_FILE).exists():
            hint = "the run here was stopped or is still running; repeat its command to finish it"
        raise VesselError(f"{path}: missing; {hint}") from None
    except (OSError, ValueError, RecursionError, MemoryError) as e:
        mend = "; change its permissions" if isinstance(e, PermissionError) else ""
        raise VesselError(f"{path}: cannot be read ({_reason(e)}){mend}") from e


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8; save it as UTF-8"
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return "a number has thousands of digits"  # json's only other ValueError
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it does not fit in memory"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)

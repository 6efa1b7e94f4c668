"""What the files of an output folder hold, and whether a value that was read from one is that.

They lie where people work, so they are edited, damaged and made by other versions. What passes here has every field that a reader looks
for, of its kind and within its bounds, and names nothing outside its folder. Fields that are not known are let through.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from vessel_rt.inputs.images import MAX_SIDE

__all__ = [
    "CINES",
    "MASKS",
    "OVERLAYS",
    "PREVIEWS",
    "check_entry",
    "check_evaluation",
    "check_planned",
    "check_result",
    "check_run",
    "check_timing",
    "is_result_file",
]

MASKS, OVERLAYS, PREVIEWS, CINES = "masks", "overlays", "previews", "cines"

_MOST = 2**53  # beyond, JSON's numbers are not the same everywhere


def is_result_file(name: str) -> bool:
    """Whether a line may list a file of this name: one right inside one of the folders of results."""
    folder, _, file = name.partition("/")
    return folder in (MASKS, OVERLAYS, PREVIEWS) and _is_component(file)


def check_result(value: Any) -> None:
    """A line of results.jsonl. Raises ValueError, which names the field."""
    _require(value, _RESULT)
    for number, mask in enumerate(value["masks"], start=1):
        _require(mask, _MASK, f"mask {number}: ")
        if mask["file"] not in value["files"]:
            raise ValueError(f"mask {number}: its file is not among 'files'")
    if value["status"] == "ok" and None in (value["width"], value["height"], value["input"], value["answer"]):
        raise ValueError("a frame that is done lacks 'width', 'height', 'input' or 'answer'")
    if (value["status"] == "ok") != (value["error"] is None):
        raise ValueError("'status' and 'error' do not agree")


def check_timing(value: Any) -> None:
    """A line of timings.jsonl. Raises ValueError, which names the field."""
    _require(value, _TIMING)


def check_planned(value: Any) -> None:
    """The first line of the journal. Raises ValueError, which names the field."""
    _require(value, {"planned": _list_of(_is_component)})


def check_entry(value: Any) -> None:
    """Any other line of the journal: a frame's name, and its lines of results.jsonl and timings.jsonl. Raises ValueError."""
    _require(value, {"name": _is_component, "lines": _list_of(_is_table), "timings": _list_of(_is_table)})
    if value.keys() - {"name", "lines", "timings"}:
        raise ValueError("it has fields that are not known")
    if not value["lines"] or len(value["lines"]) != len(value["timings"]):
        raise ValueError("'lines' and 'timings' do not agree")
    for line, timing in zip(value["lines"], value["timings"], strict=True):
        check_result(line)
        check_timing(timing)
        if line["name"] != value["name"]:
            raise ValueError("'name' is not that of its lines")


def check_run(value: Any) -> None:
    """run.json. Raises ValueError, which names the field."""
    _require(value, _RUN)


def check_evaluation(value: Any) -> None:
    """evaluation.json. Raises ValueError, which names the field."""
    _require(value, _EVALUATION)
    metrics = dict.fromkeys(value["metrics"], _maybe(_is_number))
    for number, image in enumerate(value["images"], start=1):
        _require(image, _IMAGE | metrics, f"image {number}: ")
    for number, score in enumerate(value["summary"], start=1):
        _require(score, _SCORE, f"score {number}: ")
        if not all(score[of].keys() >= metrics.keys() for of in ("mean", "ci95", "left_out")):
            raise ValueError(f"score {number}: a metric is missing")


def _require(value: Any, fields: Mapping[str, Callable[[Any], bool]], where: str = "") -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}not an object")
    for key, fits in fields.items():
        if key not in value:
            raise ValueError(f"{where}{key!r} is missing")
        if not fits(value[key]):
            raise ValueError(f"{where}{key!r} is not what it has to be")


def _maybe(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _list_of(fits: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(fits, value))


def _table_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_SIDE


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _MOST and math.isfinite(value)


def _is_component(value: Any) -> bool:
    """Whether it can be the name of a file, and of nothing but one in its folder. On POSIX a backslash is a letter like others."""
    try:
        return isinstance(value, str) and value not in ("", "..") and PurePath(value).name == value and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a pair of UTF-16, which is no letter
        return False


def _is_rle(value: Any) -> bool:
    """By its form; whether the counts are those of a mask, `decode_rle` tells."""
    return isinstance(value, dict) and _list_of(_is_side, 2)(value.get("size")) and isinstance(value.get("counts"), str)


def _lists_files(value: Any) -> bool:
    return isinstance(value, dict) and all(is_result_file(name) and isinstance(sha256, str) for name, sha256 in value.items())


_RESULT = {
    "index": _is_count,
    "image": _is_text,
    "frame": _maybe(_is_count),
    "name": _is_component,
    "code": _is_text,
    "question": _is_text,
    "status": lambda value: value in ("ok", "error"),
    "error": _maybe(_is_text),
    "width": _maybe(_is_side),
    "height": _maybe(_is_side),
    "answer": _maybe(_is_text),
    "masks": _list_of(_is_table),
    "files": _lists_files,
    "input": _maybe(_is_text),
    "settings": _is_text,
}
_MASK = {
    "file": lambda value: isinstance(value, str) and value.startswith(f"{MASKS}/"),
    "iou": _is_number,
    "object_score": _is_number,
    "area": _is_count,
    "box": _maybe(_list_of(_is_count, 4)),
    "rle": _is_rle,
}
_TIMING = {
    "index": _is_count,
    "code": _is_text,
    "question": _is_text,
    "drafted": _maybe(_is_count),
    "accepted": _maybe(_is_count),
    "decode_steps": _maybe(_is_count),
    "batch": _maybe(_is_count),
    "ms": _table_of(_is_number),
}


def _has(**fields: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(key in value and fits(value[key]) for key, fits in fields.items())


_RUN = {
    "versions": _table_of(_is_text),
    "bundle": _has(name=_is_text, precision=_is_text, checkpoint=_is_text),
    "device": _is_text,
    "options": _has(num_shards=_is_count, shard_id=_is_count, show_names=_is_bool, key=_is_text),
    "counts": lambda value: _table_of(_is_count)(value) and {"in_all_shards", "images"} <= value.keys(),
    "started": _is_text,
    "seconds": _table_of(_is_number),
    "images_per_second": _is_number,
    "peak_memory_bytes": _maybe(_is_count),
}
_EVALUATION = {
    "truth": _is_text,
    "metrics": _list_of(_is_text),
    "images": _list_of(_is_table),
    "summary": _list_of(_is_table),
    "failed": _is_count,
    "without_truth": _is_count,
}
_IMAGE = {
    "index": _is_count,
    "question": _is_text,
    "concept": _is_text,
    "mask": _maybe(_is_count),
    "predicted_area": _is_count,
    "true_area": _is_count,
    "truth_rle": _is_rle,
}
_SCORE = {
    "question": _is_text,
    "concept": _is_text,
    "images": _is_count,
    "mean": _table_of(_maybe(_is_number)),
    "ci95": _table_of(_maybe(_list_of(_maybe(_is_number), 2))),
    "left_out": _table_of(_is_count),
}

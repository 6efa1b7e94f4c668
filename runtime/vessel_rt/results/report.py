"""report.html: a run to look at, in one file that needs nothing else.

Made of the output folder's files alone: the same files give the same bytes. The page is report.html beside this module; here it gets its
data, as scripts that are no code: one of the `run`, and two for each frame, `facts`, which the page reads when it opens, and `shapes`,
its picture and masks, which the page reads when it shows them.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image

from vessel_rt.errors import VesselError
from vessel_rt.io.files import open_regular, replacing, writing
from vessel_rt.results.reader import (
    EVALUATION_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    RUN_FILE,
    TIMINGS_FILE,
    FormError,
    iter_frames,
    iter_timings,
    mask_of,
    read_evaluation,
    read_run,
)
from vessel_rt.results.schema import PREVIEWS

__all__ = ["write_report"]

_MARK = "<!-- DATA -->"
# Bytes of all pictures together, a third more in base64: with the masks of a question, 2,000 frames stay under 60 MB, opened at once.
_PICTURES = 30_000_000
_SMALLER = ((512, 65), (384, 65), (320, 60), (256, 55), (192, 50))  # longer side and JPEG quality, tried in turn


def write_report(output: Path) -> Path:
    """Write report.html into a run's folder, finished or stopped, evaluated or not, and return its path.

    Frames are shown by their study codes, by their names only where run.json has `show_names`. Previews are taken as they are; one that
    takes more than its share of 30 MB is made smaller.

    Raises:
        VesselError: a file of the run is missing or not in the form that this version writes, or the report cannot be written.
    """
    before, after = importlib.resources.files("vessel_rt.results").joinpath("report.html").read_text(encoding="utf-8").split(_MARK)
    run = read_run(output) if (output / RUN_FILE).exists() else None
    evaluation = read_evaluation(output) if (output / EVALUATION_FILE).exists() else None
    path, count = output / REPORT_FILE, _count(output)
    show_names = run is not None and run["options"]["show_names"]
    truths = defaultdict(list)
    for truth in evaluation["images"] if evaluation is not None else ():
        truths[truth["index"]].append(truth)
    with writing(path), replacing(path, sync=True) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as page:
        page.write(before)
        _write_data(page, "run", {"run": run, "evaluation": _summary(evaluation) if evaluation is not None else None})
        for lines, timings in zip(iter_frames(output), iter_timings(output), strict=True):
            drawn = truths[lines[0]["index"]]
            _write_data(page, "facts", _facts(lines, timings, drawn, show_names))
            _write_data(page, "shapes", _shapes(output, lines, drawn, _PICTURES // count))
        page.write(after)
    return path


def _count(output: Path) -> int:
    """How many frames there are. Raises VesselError where results and timings are not of the same."""
    results, timings = ([len(lines) for lines in found] for found in (iter_frames(output), iter_timings(output)))
    if results != timings:
        raise FormError(f"{output / TIMINGS_FILE}: not of the same frames as {RESULTS_FILE}; give the run's command again to make it anew")
    return len(results)


def _summary(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {key: evaluation[key] for key in ("truth", "metrics", "summary")}


def _facts(
    lines: Sequence[dict[str, Any]], timings: Sequence[dict[str, Any]], drawn: Sequence[dict[str, Any]], show_names: bool
) -> dict[str, Any]:
    """What is told of a frame. Only here may a name come in."""
    first = lines[0]
    named = first["image"] if first["frame"] is None else f"{first['image']}, frame {first['frame']}"
    mask_keys = ("iou", "object_score", "area", *(["file"] if show_names else []))
    return {
        "index": first["index"],
        "label": named if show_names else first["code"],
        "error": first["error"],
        "width": first["width"],
        "height": first["height"],
        "ms": _times(timings),
        "answers": [
            {
                "question": line["question"],
                "answer": line["answer"],
                "masks": [{key: mask[key] for key in mask_keys} for mask in line["masks"]],
            }
            for line in lines
        ],
        "truths": [{key: value for key, value in truth.items() if key not in ("index", "truth_rle")} for truth in drawn],
    }


def _times(timings: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of each step: those of all questions are in every line, but for the last step, which each question has of its own."""
    times: dict[str, float] = dict(timings[0]["ms"])
    if "upsample" in times:
        times["upsample"] = round(sum(timing["ms"].get("upsample", 0) for timing in timings), 3)
    return times


def _shapes(output: Path, lines: Sequence[dict[str, Any]], drawn: Sequence[dict[str, Any]], share: int) -> dict[str, Any]:
    """What is drawn of a frame: its picture, JPEG in base64, and masks as run lengths, in the order of the facts."""
    for mask in [mask for line in lines for mask in line["masks"]]:
        mask_of(output / RESULTS_FILE, lines[0], mask["rle"])
    for truth in drawn:
        mask_of(output / EVALUATION_FILE, lines[0], truth["truth_rle"])
    return {
        "picture": base64.b64encode(_picture(output, lines[0], share)).decode("ascii"),
        "masks": [[mask["rle"] for mask in line["masks"]] for line in lines],
        "truths": [truth["truth_rle"] for truth in drawn],
    }


def _picture(output: Path, line: dict[str, Any], share: int) -> bytes:
    """A frame's preview, made smaller until it takes no more than `share` bytes; empty where there is none, as of a frame that failed."""
    path = output / PREVIEWS / f"{line['name']}.jpg"
    if not path.is_file():
        return b""
    try:
        with open_regular(path) as file:
            content = file.read()
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as preview:
            for side, quality in _SMALLER:
                if len(content) <= share:
                    break
                preview.thumbnail((side, side), Image.Resampling.BILINEAR)
                buffer = io.BytesIO()
                preview.save(buffer, "JPEG", quality=quality)
                content = buffer.getvalue()
    except Exception as e:  # a decoder given a file that somebody has changed may raise anything
        raise VesselError(f"{output / PREVIEWS}: the picture of {line['code']} cannot be read; run it again") from e
    return content


def _write_data(page: IO[str], kind: str, content: dict[str, Any]) -> None:
    """As a script that is no code; `<` is escaped, so that no text in it can end the script."""
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    page.write(f'<script type="application/json" data-of="{kind}">{text}</script>\n')

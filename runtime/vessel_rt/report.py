"""report.html: a run to look at, in one file that needs nothing else.

Made of the output folder's files alone: the same files give the same bytes. The page is report.html beside this module; here it gets its
data, as scripts that are no code: one of the `run`, and two for each frame, `facts`, which the page reads when it opens, and `shapes`,
its picture and masks, which the page reads when it shows them.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image

from vessel_rt.errors import VesselError
from vessel_rt.outputs import PREVIEWS, replacing, writing
from vessel_rt.results import EVALUATION_FILE, REPORT_FILE, RESULTS_FILE, RUN_FILE, TIMINGS_FILE, iter_lines, read_json

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
    before, after = importlib.resources.files("vessel_rt").joinpath("report.html").read_text(encoding="utf-8").split(_MARK)
    run = _read_if_there(output / RUN_FILE)
    evaluation = _read_if_there(output / EVALUATION_FILE)
    path = output / REPORT_FILE
    try:
        count = sum(1 for _ in _by_frame(output / RESULTS_FILE))
        show_names = run is not None and run["options"]["show_names"]
        truths = defaultdict(list)
        for truth in evaluation["images"] if evaluation is not None else ():
            truths[truth["index"]].append(truth)
        with writing(path), replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as page:
            page.write(before)
            _write_data(page, "run", {"run": run, "evaluation": _summary(evaluation) if evaluation is not None else None})
            for lines, timings in zip(_by_frame(output / RESULTS_FILE), _by_frame(output / TIMINGS_FILE), strict=True):
                drawn = truths[lines[0]["index"]]
                _write_data(page, "facts", _facts(lines, timings, drawn, show_names))
                _write_data(page, "shapes", _shapes(output, lines, drawn, _PICTURES // count))
            page.write(after)
    except (KeyError, TypeError, ValueError) as e:
        raise VesselError(f"{output}: its files are not in the form of this version ({type(e).__name__}: {e}); run it again") from e
    return path


def _read_if_there(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _by_frame(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The lines of each frame, one a question."""
    return (list(group) for _, group in itertools.groupby(iter_lines(path), key=lambda line: line["index"]))


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
        times["upsample"] = round(sum(timing["ms"]["upsample"] for timing in timings), 3)
    return times


def _shapes(output: Path, lines: Sequence[dict[str, Any]], drawn: Sequence[dict[str, Any]], share: int) -> dict[str, Any]:
    """What is drawn of a frame: its picture, JPEG in base64, and masks as run lengths, in the order of the facts."""
    return {
        "picture": base64.b64encode(_picture(output, lines[0], share)).decode("ascii"),
        "masks": [[mask["rle"] for mask in line["masks"]] for line in lines],
        "truths": [truth["truth_rle"] for truth in drawn],
    }


def _picture(output: Path, line: dict[str, Any], share: int) -> bytes:
    """A frame's preview, made smaller until it takes no more than `share` bytes; empty where there is none, as of a frame that failed."""
    path = output / PREVIEWS / f"{line['name']}.jpg"
    if path.parent != output / PREVIEWS or not path.is_file():  # a name that was tampered with, or previews that were removed
        return b""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as preview:
            for side, quality in _SMALLER:
                if len(content) <= share:
                    break
                preview.thumbnail((side, side), Image.Resampling.BILINEAR)
                buffer = io.BytesIO()
                preview.save(buffer, "JPEG", quality=quality)
                content = buffer.getvalue()
    except OSError as e:
        raise VesselError(f"{output / PREVIEWS}: the picture of {line['code']} cannot be read; run it again") from e
    return content


def _write_data(page: IO[str], kind: str, content: dict[str, Any]) -> None:
    """As a script that is no code; `<` is escaped, so that no text in it can end the script."""
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    page.write(f'<script type="application/json" data-of="{kind}">{text}</script>\n')

"""report.html: a page that shows a run and loads nothing from the network.

It is made from the files of the output folder alone, so the same files give the same bytes. The page itself is report.html next to this
module. Here it gets its data as JSON scripts: one for the `run`, and two for each frame: `facts`, which the page reads when it opens, and
`shapes`, the picture and masks, which it reads when it shows them. At most EMBEDDED pictures are in the page; the page loads the others
from previews/ when it shows them. Tracked cines have one more each, `cine`, with the animation of its overlays.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from PIL import Image

from vessel_rt.errors import VesselError
from vessel_rt.io.files import open_regular, read_regular, replacing, writing
from vessel_rt.results.cines import animation_file
from vessel_rt.results.reader import (
    EVALUATION_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    RUN_FILE,
    TIMINGS_FILE,
    FormError,
    cine_place,
    iter_frames,
    iter_timings,
    mask_of,
    read_evaluation,
    read_run,
)
from vessel_rt.results.schema import PREVIEWS, ComparedMask, EvaluationFile, MaskRecord, ResultLine, TimingLine
from vessel_rt.results.writer import preview_file

__all__ = ["EMBEDDED", "chosen", "write_report"]

EMBEDDED = 300  # pictures in the page, at most

_MARK = "<!-- DATA -->"
_PICTURES = 30_000_000  # bytes of all pictures in the page together, at most; a third more in base64
_ANIMATIONS = 30_000_000  # bytes of all animations in the page together, at most; the first cines have theirs
_MOST_ANIMATION = 4_000_000  # bytes of one
_SMALLER = ((512, 65), (384, 65), (320, 60), (256, 55), (192, 50))  # longer side and JPEG quality, tried in turn


def write_report(output: Path) -> Path:
    """Write report.html into a run's folder, finished or stopped, evaluated or not, and return its path.

    Frames are shown by their study codes, and by their names only if run.json has `show_names`. A picture in the page that exceeds its
    share of 30 MB is made smaller.

    Raises:
        VesselError: a file of the run is missing or not in the form that this version writes, or the report cannot be written.
    """
    before, after = importlib.resources.files("vessel_rt.results").joinpath("report.html").read_text(encoding="utf-8").split(_MARK)
    run = read_run(output) if (output / RUN_FILE).exists() else None
    evaluation = read_evaluation(output) if (output / EVALUATION_FILE).exists() else None
    path, show_names = output / REPORT_FILE, run is not None and run["options"]["show_names"]
    truths = defaultdict(list)
    for truth in evaluation["images"] if evaluation is not None else ():
        truths[truth["index"]].append(truth)
    scores = _scores(output, truths if evaluation is not None else None)
    embedded = chosen(scores)
    share = _PICTURES // max(1, len(embedded))
    cines: dict[str, tuple[str, str]] = {}  # name and image of each tracked cine, by study code
    with writing(path), replacing(path, sync=True) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as page:
        page.write(before)
        _write_data(page, "run", {"run": run, "evaluation": _summary(evaluation) if evaluation is not None else None})
        for place, (lines, timings) in enumerate(zip(iter_frames(output), iter_timings(output), strict=True)):
            of_frame = truths[lines[0]["index"]]
            picture = _picture(output, lines[0], share) if place in embedded else _link(output, lines[0])
            _write_data(page, "facts", _facts(lines, timings, of_frame, show_names) | {"linked": "file" in picture})
            _write_data(page, "shapes", picture | _masks(output, lines, of_frame))
            if (at := cine_place(lines[0])) and "propagated_from" in lines[0]:
                cines.setdefault(at.code, (at.name, at.image))
        room = _ANIMATIONS
        for code, (cine, image) in cines.items():
            animation = _animation(output, cine, code)
            if len(animation) > room:
                animation = b""
            room -= len(animation)
            shown = {"cine": code, "label": image if show_names else code, "animation": base64.b64encode(animation).decode("ascii")}
            _write_data(page, "cine", shown)
        page.write(after)
    return path


def chosen(scores: Mapping[int, float]) -> frozenset[int]:
    """The places of the frames whose pictures are in the page. `scores` has those of all frames with a picture, in order.

    If these are too many, a third is for the lowest scores, a third for those around the median, and the rest is evenly spread.
    """
    if len(scores) <= EMBEDDED:
        return frozenset(scores)
    ranked, third = sorted(scores, key=lambda place: (scores[place], place)), EMBEDDED // 3
    middle = max(0, sum(map(math.isfinite, scores.values())) - third) // 2
    found = {*ranked[:third], *ranked[middle : middle + third]}
    others, wanted = [place for place in scores if place not in found], EMBEDDED - len(found)
    return frozenset(found | {others[number * len(others) // wanted] for number in range(wanted)})


def _scores(output: Path, truths: Mapping[int, Sequence[ComparedMask]] | None) -> dict[int, float]:
    """The score of each frame that did not fail, by its place: its lowest Dice, or, without an evaluation, its smallest mask area.

    A frame without a mask has the lowest area, and one without a Dice the highest. Raises VesselError if results and timings are not of the
    same frames.
    """
    scores, counts = {}, []
    for place, lines in enumerate(iter_frames(output)):
        counts.append(len(lines))
        if lines[0]["error"] is None:
            scores[place] = min(map(_area, lines)) if truths is None else _dice(truths.get(lines[0]["index"], ()))
    if counts != [len(timings) for timings in iter_timings(output)]:
        raise FormError(f"{output / TIMINGS_FILE}: not of the same frames as {RESULTS_FILE}; repeat the run's command to write both again")
    return scores


def _area(line: ResultLine) -> float:
    """The share of the image that the largest mask has, by which the page sorts."""
    largest = max((mask["area"] for mask in line["masks"]), default=0)
    return largest / ((line["width"] or 1) * (line["height"] or 1))


def _dice(truths: Sequence[ComparedMask]) -> float:
    values = [value for truth in truths if isinstance(value := truth.get("dice"), float | int)]
    return min(values, default=math.inf)


def _summary(evaluation: EvaluationFile) -> dict[str, Any]:
    return {"truth": evaluation["truth"], "metrics": evaluation["metrics"], "summary": evaluation["summary"]}


def _facts(lines: Sequence[ResultLine], timings: Sequence[TimingLine], truths: Sequence[ComparedMask], show_names: bool) -> dict[str, Any]:
    """What the page says about a frame. Names may appear only here."""
    first = lines[0]
    named = first["image"] if first["frame"] is None else f"{first['image']}, frame {first['frame']}"
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
                "masks": [_mask_facts(mask, show_names) for mask in line["masks"]],
            }
            for line in lines
        ],
        "truths": [{key: value for key, value in truth.items() if key not in ("index", "truth_rle")} for truth in truths],
        **_moment(first),
    }


def _moment(line: ResultLine) -> dict[str, Any]:
    """Where in a tracked cine a frame is, and whether the model was asked about it; nothing for other frames."""
    at = cine_place(line)
    if at is None or "propagated_from" not in line:
        return {}
    return {"cine": at.code, "number": at.number, "time": line.get("time_ms"), "asked": line["propagated_from"] is None}


def _animation(output: Path, cine: str, code: str) -> bytes:
    """The animation of a cine; nothing if it has none, as when only one of its frames is done."""
    path = output / animation_file(cine)
    if not path.exists():
        return b""
    try:
        return read_regular(path, _MOST_ANIMATION)
    except (OSError, VesselError) as e:
        raise VesselError(f"{output}: the animation of {code} cannot be read; repeat the run's command") from e


def _mask_facts(mask: MaskRecord, show_names: bool) -> dict[str, Any]:
    facts = {"iou": mask["iou"], "object_score": mask["object_score"], "area": mask["area"]}
    return facts | {"file": _address(mask["file"])} if show_names else facts


def _address(file: str) -> str:
    """The address of a file in the output folder, for a link. Names may be any bytes."""
    return quote(os.fsencode(file))


def _times(timings: Sequence[TimingLine]) -> dict[str, float]:
    """Milliseconds of each step. Every line has the steps that the questions share; only `upsample` is separate for each question."""
    times: dict[str, float] = dict(timings[0]["ms"])
    if "upsample" in times:
        times["upsample"] = round(sum(timing["ms"].get("upsample", 0) for timing in timings), 3)
    return times


def _masks(output: Path, lines: Sequence[ResultLine], truths: Sequence[ComparedMask]) -> dict[str, Any]:
    """The masks of a frame as run lengths, in the order of the facts."""
    for mask in [mask for line in lines for mask in line["masks"]]:
        mask_of(output / RESULTS_FILE, lines[0], mask["rle"])
    for truth in truths:
        mask_of(output / EVALUATION_FILE, lines[0], truth["truth_rle"])
    return {"masks": [[mask["rle"] for mask in line["masks"]] for line in lines], "truths": [truth["truth_rle"] for truth in truths]}


def _preview(output: Path, line: ResultLine) -> str | None:
    """The file of a frame's preview, if it has one. Folders that were written before previews had study codes have names here."""
    file = next((file for file in line["files"] if file.startswith(f"{PREVIEWS}/")), None)
    return file if file and (output / file).is_file() else None


def _link(output: Path, line: ResultLine) -> dict[str, Any]:
    """The address of a frame's preview, for the page to load; only by its study code."""
    file = _preview(output, line)
    return {"picture": "", "file": _address(file)} if file and file == preview_file(line["code"]) else {"picture": ""}


def _picture(output: Path, line: ResultLine, share: int) -> dict[str, Any]:
    """A frame's preview, JPEG in base64, made smaller until it takes at most `share` bytes; empty if it has none."""
    name = _preview(output, line)
    if name is None:
        return {"picture": ""}
    try:
        with open_regular(output / name) as file:
            content = file.read()
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as preview:
            for side, quality in _SMALLER:
                if len(content) <= share:
                    break
                preview.thumbnail((side, side), Image.Resampling.BILINEAR)
                buffer = io.BytesIO()
                preview.save(buffer, "JPEG", quality=quality)
                content = buffer.getvalue()
    except Exception as e:  # a decoder may raise anything if the file was changed
        raise VesselError(f"{output / PREVIEWS}: the picture of {line['code']} cannot be read; run it again") from e
    return {"picture": base64.b64encode(content).decode("ascii")}


def _write_data(page: IO[str], kind: str, content: dict[str, Any]) -> None:
    """Write a JSON script; `<` is escaped, so that no text in it can end the script."""
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    page.write(f'<script type="application/json" data-of="{kind}">{text}</script>\n')

"""report.html: a page that shows a run and loads nothing from the network.

It is made from the files of the output folder alone, so the same files give the same bytes. The page itself is report.html next to this
module. Here it gets its data as JSON scripts: one for the `run`, and two for each frame: `facts`, which the page reads when it opens, and
`shapes`, the picture and masks, which it reads when it shows them. At most EMBEDDED pictures are in the page; the page loads the others
from previews/ when it shows them. Tracked cines have one more each, `cine`, with its name.
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
from typing import IO, Any, TypeAlias
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.errors import VesselError
from vessel_rt.io.files import open_regular, replacing, writing
from vessel_rt.results.reader import (
    EVALUATION_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    RUN_FILE,
    TIMINGS_FILE,
    CinePlace,
    FormError,
    cine_place,
    file_in,
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
Mask: TypeAlias = npt.NDArray[np.bool_]  # [height, width]

_PICTURES = 30_000_000  # bytes of all pictures in the page together, at most; a third more in base64
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
    cines: dict[str, str] = {}  # the image of each tracked cine, by study code
    steadiness = _Steadiness()
    with writing(path), replacing(path, sync=True) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as page:
        page.write(before)
        _write_data(page, "run", {"run": run, "evaluation": _summary(evaluation) if evaluation is not None else None})
        for place, (lines, timings) in enumerate(zip(iter_frames(output), iter_timings(output), strict=True)):
            of_frame = truths[lines[0]["index"]]
            masks = [[mask_of(output / RESULTS_FILE, lines[0], mask["rle"]) for mask in line["masks"]] for line in lines]
            picture = _picture(output, lines[0], share) if place in embedded else _link(output, lines[0])
            facts = _facts(lines, timings, of_frame, steadiness.of_frame(lines[0], masks), show_names)
            _write_data(page, "facts", facts | {"linked": "file" in picture})
            _write_data(page, "shapes", picture | _shapes(output, lines, of_frame))
            if at := _tracked(lines[0]):
                cines.setdefault(at.code, at.image)
        for code, image in cines.items():
            _write_data(page, "cine", {"cine": code, "label": image if show_names else code})
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


def _facts(
    lines: Sequence[ResultLine],
    timings: Sequence[TimingLine],
    truths: Sequence[ComparedMask],
    stability: Sequence[Sequence[float | None]],
    show_names: bool,
) -> dict[str, Any]:
    """What the page says about a frame. Names may appear only here. `stability` has a value for each mask of each line."""
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
                "masks": [_mask_facts(mask, value, show_names) for mask, value in zip(line["masks"], values, strict=True)],
            }
            for line, values in zip(lines, stability, strict=True)
        ],
        "truths": [{key: value for key, value in truth.items() if key not in ("index", "truth_rle")} for truth in truths],
        **_moment(first),
    }


def _tracked(line: ResultLine) -> CinePlace | None:
    """Where in a tracked cine a frame is; None for other frames."""
    return cine_place(line) if "propagated_from" in line else None


def _moment(line: ResultLine) -> dict[str, Any]:
    """Where in a tracked cine a frame is, and whether the model was asked about it; nothing for other frames."""
    if (at := _tracked(line)) is None:
        return {}
    return {"cine": at.code, "number": at.number, "time": line.get("time_ms"), "asked": line["propagated_from"] is None}


class _Steadiness:
    """Compares the masks of each frame of a tracked cine with those of the frame before it."""

    def __init__(self) -> None:
        self._cine: str | None = None
        self._before: dict[tuple[int, int], Mask] = {}

    def of_frame(self, line: ResultLine, masks: Sequence[Sequence[Mask]]) -> list[list[float | None]]:
        """The IoU of each mask with the same mask of the frame before; None if there is none, or if both are empty."""
        cine = at.code if (at := _tracked(line)) else None
        before = self._before if cine is not None and cine == self._cine else {}
        self._cine = cine
        self._before = {(question, number): mask for question, answer in enumerate(masks) for number, mask in enumerate(answer)}
        return [[_iou(mask, before.get((question, number))) for number, mask in enumerate(answer)] for question, answer in enumerate(masks)]


def _iou(mask: Mask, other: Mask | None) -> float | None:
    if other is None or mask.shape != other.shape or not (union := np.count_nonzero(mask | other)):
        return None
    return round(np.count_nonzero(mask & other) / union, 4)


def _mask_facts(mask: MaskRecord, stability: float | None, show_names: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"iou": mask["iou"], "object_score": mask["object_score"], "area": mask["area"]}
    if stability is not None:
        facts["stability"] = stability
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


def _shapes(output: Path, lines: Sequence[ResultLine], truths: Sequence[ComparedMask]) -> dict[str, Any]:
    """The masks of a frame as run lengths, in the order of the facts."""
    for truth in truths:
        mask_of(output / EVALUATION_FILE, lines[0], truth["truth_rle"])
    return {"masks": [[mask["rle"] for mask in line["masks"]] for line in lines], "truths": [truth["truth_rle"] for truth in truths]}


def _preview(output: Path, line: ResultLine) -> str | None:
    """The file of a frame's preview, if it has one. Folders that were written before previews had study codes have names here."""
    file = file_in(line, PREVIEWS)
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

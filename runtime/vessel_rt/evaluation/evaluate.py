"""How well the masks of a run agree with the ground truth: metrics of each image, their means and confidence intervals.

Does not know about devices, bundles or how masks were made.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from vessel_rt.errors import VesselError
from vessel_rt.evaluation.cines import CineScore, CineScores, mean_score
from vessel_rt.evaluation.flow import Shown, load_warp
from vessel_rt.evaluation.ground_truth import GroundTruth, check_concepts, matched, read_truth
from vessel_rt.evaluation.metrics import METRICS, Mask, bootstrap_interval
from vessel_rt.inputs.pseudonyms import StudyCodes
from vessel_rt.io.files import replacing, writing
from vessel_rt.results.reader import (
    CINE_METRICS_FILE,
    EVALUATION_FILE,
    MEANS_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    RUN_FILE,
    cine_place,
    file_in,
    mask_of,
    read_picture,
    read_results,
)
from vessel_rt.results.rle import encode_rle
from vessel_rt.results.schema import PREVIEWS, SCHEMA, CineRecord, ComparedMask, EvaluationFile, ResultLine, Rle, ScoreRecord

__all__ = ["Comparison", "Evaluation", "Score", "evaluate"]

_ALL = "all masks"  # the concept of masks in a folder, which have no names
_TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "cldice": "clDice (Zhang)",
    "hd95": "HD95, pixels",
}
_CINE_METRICS = ("j", "f", "jf", "stability", "true_stability", "warped_stability", "true_warped_stability")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One mask of an answer and its ground truth. `mask` is its number in the answer, None for all together; `values` may be NaN."""

    index: int
    code: str
    image: str
    question: str
    concept: str
    mask: int | None
    predicted_area: int
    true_area: int
    values: dict[str, float]
    truth_rle: Rle


@dataclasses.dataclass(frozen=True)
class Score:
    """The means over the images of one question and concept, their 95 % intervals, and the number of images without a defined value."""

    question: str
    concept: str
    images: int
    mean: dict[str, float]
    ci95: dict[str, tuple[float, float] | None]
    left_out: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All comparisons and scores; `cines` has one for each object of a cine.

    `failed` images have no answer, `without_truth` no ground truth; `stopped`: the run is not finished.
    """

    truth: str
    comparisons: tuple[Comparison, ...]
    scores: tuple[Score, ...]
    cines: tuple[CineScore, ...]
    failed: int
    without_truth: int
    stopped: bool

    def table(self) -> str:
        """For a terminal; the last lines are the mean Dice of each concept."""
        several = len({score.question for score in self.scores}) > 1
        lines = [f"{'':14} {'mean':>8}  95 % interval"]
        for score in self.scores:
            asked = f", asked {score.question!r}" if several else ""
            lines.append(f"{score.concept}, {score.images} images{asked}")
            lines += [self._row(score, name) for name in METRICS]
        if self.cines:
            lines += self._cine_rows()
        lines.append(f"images that failed: {self.failed}, without ground truth: {self.without_truth}; they are not counted")
        if self.stopped:
            lines.append("the run was stopped before its end: only finished images are included")
        for score in self.scores:
            asked = f", asked {score.question!r}" if several else ""
            lines.append(f"mean Dice {score.concept}: {score.mean['dice']:.3f} over {score.images} images{asked}")
        return "\n".join(lines)

    def _cine_rows(self) -> list[str]:
        by_flow = any(not math.isnan(score.warped_stability) for score in self.cines)
        title = "stability (of the ground truth)" + ", by optical flow" * by_flow
        lines = [f"{'cines':28} {'frames':>6} {'J':>7} {'F':>7} {'J&F':>7}  {title}"]
        for question in dict.fromkeys(score.question for score in self.cines):
            asked = [score for score in self.cines if score.question == question]
            mean = dataclasses.replace(mean_score(asked), code="mean", concept=f"{len(asked)} objects")
            for score in (*asked, mean):
                name = f"{score.code} {score.concept}"
                values = f"{score.j:7.3f} {score.f:7.3f} {score.jf:7.3f}  {score.stability:.3f} ({score.true_stability:.3f})"
                values += f", {score.warped_stability:.3f} ({score.true_warped_stability:.3f})" if by_flow else ""
                lines.append(f"{name:28} {score.frames:6} {values}")
        return lines

    @staticmethod
    def _row(score: Score, name: str) -> str:
        digits = 2 if name == "hd95" else 3
        interval = score.ci95[name]
        between = f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}" if interval else "none"
        left_out = f"  ({score.left_out[name]} images left out: not defined)" if score.left_out[name] else ""
        return f"{_TITLES[name]:14} {score.mean[name]:8.{digits}f}  {between}{left_out}"


def evaluate(output: Path, truth: Path, *, codes: StudyCodes | None = None, show_names: bool = False, flow: bool = False) -> Evaluation:
    """Score the run in `output` against `truth` (see read_truth), and write metrics.csv, metrics_mean.csv, evaluation.json
    and, for cines, metrics_cines.csv there.

    The concepts are those that a question names, in its order: the first mask of an answer belongs to the first concept, and so on. A mask
    that an answer lacks counts as empty. Masks in a folder have no concept: all masks of an answer together are compared with them.
    With `flow`, the masks of cines are also moved by the optical flow between frames, which is estimated from their previews.

    Raises:
        VesselError: a file is missing or malformed, run and ground truth share no image or no concept, or `flow` needs a package.
    """
    cines = CineScores(load_warp() if flow else None)
    drawn, lines = read_truth(truth, codes), read_results(output)
    questions = list(dict.fromkeys(line["question"] for line in lines))
    good = [line for line in lines if line["status"] == "ok"]
    comparisons = tuple(_comparisons(output, good, drawn, cines, flow))
    if not any(drawn.concepts(question) for question in questions):
        raise VesselError(f"{truth}: annotates no concept that the run's questions name ({', '.join(map(repr, questions))})")
    for question in questions:
        check_concepts(truth, drawn, question, [len(line["masks"]) for line in good if line["question"] == question])
    if not comparisons:
        raise VesselError(f"{truth}: has no ground truth for any image of {output}; images are matched by file name")
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.question, comparison.concept), []).append(comparison)
    compared = {comparison.index for comparison in comparisons}
    evaluation = Evaluation(
        truth=truth.name if show_names else "a folder of masks" if truth.is_dir() else "annotations",
        stopped=not (output / RUN_FILE).exists(),
        comparisons=comparisons,
        scores=tuple(_score(question, concept, group) for (question, concept), group in groups.items()),
        cines=cines.scores(),
        failed=len({line["index"] for line in lines if line["status"] != "ok"}),
        without_truth=len({line["index"] for line in good} - compared),
    )
    _write(evaluation, output, show_names)
    return evaluation


def _comparisons(output: Path, lines: Sequence[ResultLine], drawn: GroundTruth, cines: CineScores, flow: bool) -> Iterator[Comparison]:
    """A comparison for each line and concept with a ground truth; those of cines are added to `cines`, too, for `flow` with the frame."""
    shown: Shown | None = None
    index = -1  # of the frame shown
    for line in tqdm(lines, desc="comparing", unit="answer", disable=None, delay=2, leave=False):
        for number, concept, masks, truth in matched(drawn, line["question"], line, line["masks"]):
            predicted = np.zeros_like(truth)
            for mask in masks:
                predicted |= mask_of(output / RESULTS_FILE, line, mask["rle"])
            found = _compare(line, concept, number, predicted, truth)
            if place := cine_place(line):
                if flow and line["index"] != index:  # a frame has a line for each question
                    shown, index = _shown(output, line), line["index"]
                cines.add(place.code, place.image, line["question"], found.concept, predicted, truth, shown)
            yield found


def _shown(output: Path, line: ResultLine) -> Shown:
    name = file_in(line, PREVIEWS) or ""
    return Shown.of(read_picture(output, name, "JPEG", f"the preview of {line['code']} cannot be read for the optical flow"))


def _compare(line: ResultLine, concept: str | None, number: int, predicted: Mask, truth: Mask) -> Comparison:
    return Comparison(
        index=line["index"],
        code=line["code"],
        image=line["image"],
        question=line["question"],
        concept=_ALL if concept is None else concept,
        mask=None if concept is None else number,
        predicted_area=int(predicted.sum()),
        true_area=int(truth.sum()),
        values={name: metric(predicted, truth) for name, metric in METRICS.items()},
        truth_rle=encode_rle(truth),
    )


def _score(question: str, concept: str, group: Sequence[Comparison]) -> Score:
    values = {name: [c.values[name] for c in group if not math.isnan(c.values[name])] for name in METRICS}
    return Score(
        question=question,
        concept=concept,
        images=len(group),
        mean={name: sum(defined) / len(defined) if defined else math.nan for name, defined in values.items()},
        ci95={name: bootstrap_interval(defined) for name, defined in values.items()},
        left_out={name: len(group) - len(defined) for name, defined in values.items()},
    )


def _write(evaluation: Evaluation, output: Path, show_names: bool) -> None:
    texts = {
        METRICS_FILE: _csv(_metrics_rows(evaluation.comparisons, show_names)),
        MEANS_FILE: _csv(_means_rows(evaluation.scores)),
        EVALUATION_FILE: json.dumps(_as_json(evaluation), allow_nan=False) + "\n",
    }
    if evaluation.cines:
        texts[CINE_METRICS_FILE] = _csv(_cine_rows(evaluation.cines, show_names))
    for name, text in texts.items():
        with writing(output / name), replacing(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def _metrics_rows(comparisons: Sequence[Comparison], show_names: bool) -> Iterator[list[Any]]:
    yield ["index", "code", *(["image"] if show_names else []), "question", "concept", *METRICS, "predicted_area", "true_area"]
    for c in comparisons:
        values = [_rounded(c.values[name]) for name in METRICS]
        yield [c.index, c.code, *([c.image] if show_names else []), c.question, c.concept, *values, c.predicted_area, c.true_area]


def _means_rows(scores: Sequence[Score]) -> Iterator[list[Any]]:
    yield ["question", "concept", "metric", "mean", "ci95_low", "ci95_high", "images", "left_out"]
    for score in scores:
        for name in METRICS:
            low, high = score.ci95[name] or (None, None)
            yield [
                score.question, score.concept, name, _rounded(score.mean[name]), _rounded(low), _rounded(high), score.images,
                score.left_out[name],
            ]  # fmt: skip


def _cine_rows(scores: Sequence[CineScore], show_names: bool) -> Iterator[list[Any]]:
    yield ["code", *(["image"] if show_names else []), "question", "concept", "frames", *_CINE_METRICS]
    for score in scores:
        values = [_rounded(getattr(score, name)) for name in _CINE_METRICS]
        yield [score.code, *([score.image] if show_names else []), score.question, score.concept, score.frames, *values]


def _as_json(evaluation: Evaluation) -> EvaluationFile:
    """The content of evaluation.json: that of metrics.csv, and the ground-truth masks, for report.html."""
    return {
        "schema": SCHEMA,
        "truth": evaluation.truth,
        "metrics": list(METRICS),
        "images": [_image(c) for c in evaluation.comparisons],
        "summary": [_summary(score) for score in evaluation.scores],
        "cines": [_cine(score) for score in evaluation.cines],
        "failed": evaluation.failed,
        "without_truth": evaluation.without_truth,
    }


def _image(c: Comparison) -> ComparedMask:
    record: ComparedMask = {
        "index": c.index,
        "question": c.question,
        "concept": c.concept,
        "mask": c.mask,
        "predicted_area": c.predicted_area,
        "true_area": c.true_area,
        "truth_rle": c.truth_rle,
    }
    return cast(ComparedMask, record | {name: _rounded(value) for name, value in c.values.items()})


def _summary(score: Score) -> ScoreRecord:
    return {
        "question": score.question,
        "concept": score.concept,
        "images": score.images,
        "mean": {name: _rounded(value) for name, value in score.mean.items()},
        "ci95": {name: [_rounded(end) for end in ends] if ends else None for name, ends in score.ci95.items()},
        "left_out": score.left_out,
    }


def _cine(score: CineScore) -> CineRecord:
    names = {"code": score.code, "question": score.question, "concept": score.concept, "frames": score.frames}
    return cast(CineRecord, names | {name: _rounded(getattr(score, name)) for name in _CINE_METRICS})


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 6)


def _csv(rows: Iterator[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()

"""How well the masks of a run agree with drawn ones: the mean Dice of each concept."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vessel_rt.errors import VesselError
from vessel_rt.outputs import RESULTS_FILE, RUN_FILE, json_lines

__all__ = ["ConceptScore", "dice", "evaluate"]


@dataclasses.dataclass(frozen=True)
class ConceptScore:
    """The Dice coefficients of one concept that a question named, one for each image that was both segmented and annotated with it."""

    question: str
    concept: str
    dice: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.dice) / len(self.dice)


def dice(predicted: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    """`2 |A and B| / (|A| + |B|)`, and 1 where both are empty."""
    total = int(predicted.sum()) + int(truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 1.0


def evaluate(output: Path, annotations: Path) -> list[ConceptScore]:
    """Score the run in `output` against annotations in Sa2VA's fine-tuning format.

    That is a list of `{"image": name, "mask": [polygons of an object, ...], "text": [its concept, ...]}`. The concepts are those
    that a question of the run names, in its order: the first mask of a result is the first concept's, and so on; a mask that an
    answer does not give counts as empty, and an image that failed is left out.

    Raises:
        VesselError: a file is missing or not what it should be, or the two share no image or no concept.
    """
    run, results = _read(output / RUN_FILE, json.loads), _read(output / RESULTS_FILE, json_lines)
    try:
        truth = {item["image"]: _polygons_by_concept(item) for item in _read(annotations, json.loads)}
        known = {concept for item in truth.values() for concept in item}
        scored = [result for result in results if result["status"] == "ok" and result["image"] in truth]
        questions = run["options"]["questions"]
        scores = [score for question in questions for score in _scores(question, _concepts_in(question, known), scored, truth)]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise VesselError(f"{annotations} or {output / RESULTS_FILE}: not in the expected form ({type(e).__name__}: {e})") from e
    if not scores:
        raise VesselError(f"{annotations}: annotates no concept that the run's questions name ({', '.join(map(repr, questions))})")
    for score in scores:
        if not score.dice:
            raise VesselError(f"{annotations}: annotates {score.concept!r} in none of the images of {output}")
    return scores


def _scores(question: str, concepts: Sequence[str], results: Sequence[Any], truth: dict[str, dict[str, list[Any]]]) -> list[ConceptScore]:
    """The scores of the masks of each result of `question`, each as the concept of its place."""
    asked = [(result["masks"], truth[result["image"]]) for result in results if result["question"] == question]
    return [
        ConceptScore(question, concept, tuple(_dice_of(masks, number, drawn[concept]) for masks, drawn in asked if concept in drawn))
        for number, concept in enumerate(concepts)
    ]


def _dice_of(masks: Sequence[Any], number: int, polygons: Sequence[Any]) -> float:
    if number >= len(masks):  # the answer gave none: an empty mask
        return 0.0 if polygons else 1.0
    predicted = _decoded(masks[number]["rle"])
    drawn = [_rasterized(polygon, *predicted.shape) for polygon in polygons]
    return dice(predicted, np.logical_or.reduce([np.zeros_like(predicted), *drawn]))


def _polygons_by_concept(item: Any) -> dict[str, list[Any]]:
    """The polygons of one annotated image. A concept is written as training reads it: in lower case, without a final dot."""
    polygons: dict[str, list[Any]] = {}
    for concept, of_object in zip(item["text"], item["mask"], strict=True):
        polygons.setdefault(concept.lower().removesuffix("."), []).extend(of_object)
    return polygons


def _concepts_in(question: str, concepts: set[str]) -> list[str]:
    """The concepts that occur in `question`, in its order; of two that overlap there, the longer."""
    longest_first = sorted(concepts, key=len, reverse=True)
    return list(dict.fromkeys(re.findall("|".join(map(re.escape, longest_first)), question.lower()))) if concepts else []


def _rasterized(polygon: list[float], height: int, width: int) -> npt.NDArray[np.bool_]:
    """A polygon `[x0, y0, x1, y1, ...]` in pixels, filled as Sa2VA's training fills it."""
    from pycocotools import mask as coco

    try:
        return _decoded(coco.frPyObjects([polygon], height, width)[0])
    except Exception as e:  # the library raises plain Exception
        raise ValueError(f"{polygon!r} is not a polygon") from e


def _decoded(run_lengths: Any) -> npt.NDArray[np.bool_]:
    from pycocotools import mask as coco

    decoded: npt.NDArray[np.bool_] = coco.decode(run_lengths).astype(np.bool_)
    return decoded


def _read(path: Path, parse: Any) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VesselError(f"{path}: missing; a run that was finished leaves it in its output folder") from None
    except (OSError, ValueError) as e:
        raise VesselError(f"{path}: cannot be read ({e})") from e

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vessel_rt.errors import VesselError
from vessel_rt.evaluate import dice, evaluate
from vessel_rt.masks import run_lengths


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((40, 60), np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def square(x0: int, y0: int, x1: int, y1: int) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def run_folder(tmp_path: Path, question: str, results: list[tuple[str, list[np.ndarray]]]) -> Path:
    (tmp_path / "run.json").write_text(json.dumps({"options": {"questions": [question]}}))
    lines = [
        {"image": name, "question": question, "status": "ok", "masks": [{"rle": run_lengths(mask)} for mask in masks]}
        for name, masks in results
    ]
    lines.append({"image": "failed.png", "question": question, "status": "error", "masks": []})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def annotated(tmp_path: Path, items: Any) -> Path:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(items))
    return path


def test_dice() -> None:
    nothing, left, right = box(0, 0, 0, 0), box(0, 0, 10, 10), box(5, 0, 15, 10)
    assert dice(left, left) == 1
    assert dice(left, right) == 0.5
    assert dice(left, nothing) == 0
    assert dice(nothing, nothing) == 1


def test_masks_are_matched_to_concepts_in_the_questions_order(tmp_path: Path) -> None:
    vessel, catheter = box(0, 0, 10, 10), box(20, 20, 40, 30)
    out = run_folder(
        tmp_path,
        "Please segment catheter and Vessel in this image.",
        [("a.png", [catheter, vessel]), ("b.png", [catheter]), ("unknown.png", [vessel])],
    )
    gt = annotated(
        tmp_path,
        [
            {"image": "a.png", "mask": [[square(0, 0, 10, 10)], [square(20, 20, 40, 30)]], "text": ["Vessel.", "catheter"]},
            {"image": "b.png", "mask": [[square(0, 0, 10, 10)], [square(20, 20, 30, 30)]], "text": ["vessel", "catheter"]},
            {"image": "failed.png", "mask": [[square(0, 0, 10, 10)]], "text": ["vessel"]},
        ],
    )
    catheter_score, vessel_score = evaluate(out, gt)
    assert (catheter_score.concept, vessel_score.concept) == ("catheter", "vessel")
    assert catheter_score.dice == pytest.approx((1.0, 2 / 3))
    assert vessel_score.dice == (1.0, 0.0)  # b.png has no second mask
    assert vessel_score.mean == 0.5


def test_polygons_of_one_concept_are_joined(tmp_path: Path) -> None:
    out = run_folder(tmp_path, "Please segment vessel.", [("a.png", [box(0, 0, 10, 10) | box(20, 0, 30, 10) | box(40, 0, 50, 10)])])
    polygons = [[square(0, 0, 10, 10), square(20, 0, 30, 10)], [square(40, 0, 50, 10)]]
    [score] = evaluate(out, annotated(tmp_path, [{"image": "a.png", "mask": polygons, "text": ["vessel", "vessel"]}]))
    assert score.dice == (1.0,)


def test_of_two_overlapping_names_the_longer_is_meant(tmp_path: Path) -> None:
    out = run_folder(tmp_path, "Please segment main vessel.", [("a.png", [box(0, 0, 10, 10)])])
    item = {"image": "a.png", "mask": [[square(0, 0, 9, 9)], [square(0, 0, 10, 10)]], "text": ["vessel", "main vessel"]}
    [score] = evaluate(out, annotated(tmp_path, [item]))
    assert (score.concept, score.dice) == ("main vessel", (1.0,))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "annotates no concept"),
        ([{"image": "a.png", "mask": [[]], "text": ["stent"]}], "annotates no concept"),
        ([{"image": "z.png", "mask": [[square(0, 0, 9, 9)]], "text": ["vessel"]}], "in none of the images"),
        ([{"image": "a.png", "mask": [], "text": ["vessel"]}], "not in the expected form"),
        ({"a.png": []}, "not in the expected form"),
        ([{"image": "a.png", "mask": [["x"]], "text": ["vessel"]}], "not in the expected form"),
    ],
)
def test_annotations_that_do_not_fit(tmp_path: Path, items: Any, message: str) -> None:
    out = run_folder(tmp_path, "Please segment vessel.", [("a.png", [box(0, 0, 10, 10)])])
    with pytest.raises(VesselError, match=message):
        evaluate(out, annotated(tmp_path, items))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(VesselError, match=r"run\.json: missing"):
        evaluate(tmp_path, tmp_path / "annotations.json")
    out = run_folder(tmp_path, "vessel", [])
    (tmp_path / "annotations.json").write_text("{")
    with pytest.raises(VesselError, match=r"annotations\.json: cannot be read"):
        evaluate(out, tmp_path / "annotations.json")

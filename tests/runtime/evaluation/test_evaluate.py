from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou
from PIL import Image

from tests.support.frames import CODES, make_frame, placed
from tests.support.journals import result_with
from tests.support.paths import Tiny
from tests.support.runs import options
from vessel_rt.errors import VesselError
from vessel_rt.evaluation.evaluate import evaluate
from vessel_rt.evaluation.ground_truth import read_truth
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.frames import Selection
from vessel_rt.model.result import Mask
from vessel_rt.results.rle import encode_rle
from vessel_rt.results.writer import FrameWriter, failure
from vessel_rt.run.infer import infer


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((40, 60), np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def square(x0: int, y0: int, x1: int, y1: int) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def run_folder(tmp_path: Path, question: str, results: list[tuple[str, list[np.ndarray]]]) -> Path:
    result = dataclasses.replace(result_with(), question=question)
    frames = placed(*(f"{name}.png" for name, _ in results), "failed.png")
    (tmp_path / "out").mkdir()
    for kind in ("masks", "overlays", "previews"):
        (tmp_path / "out" / kind).mkdir()
    writer = FrameWriter(tmp_path / "out", [frame.name for frame in frames], "s")
    entries = [
        writer.write(frame, "0", make_frame(60, 40), [dataclasses.replace(result, masks=tuple(Mask(mask, 0.5, 2.0) for mask in masks))])
        for frame, (_, masks) in zip(frames, results, strict=False)
    ]
    entries.append(failure(frames[-1], [question], "an empty file", "s"))
    text = "".join(json.dumps(line) + "\n" for entry in entries for line in entry.lines)
    (tmp_path / "out" / "results.jsonl").write_text(text)
    return tmp_path / "out"


def annotated(tmp_path: Path, items: Any) -> Path:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(items))
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_masks_are_matched_to_concepts_in_the_questions_order(tmp_path: Path) -> None:
    vessel, catheter = box(0, 0, 10, 10), box(20, 20, 40, 30)
    question = "Please segment catheter and Vessel in this image."
    out = run_folder(tmp_path, question, [("a", [catheter, vessel]), ("b", [catheter]), ("unknown", [vessel])])
    gt = annotated(
        tmp_path,
        [
            {"image": "a.png", "mask": [[square(0, 0, 10, 10)], [square(20, 20, 40, 30)]], "text": ["Vessel.", "catheter"]},
            {"image": "b.png", "mask": [[square(0, 0, 10, 10)], [square(20, 20, 30, 30)]], "text": ["vessel", "catheter"]},
            {"image": "failed.png", "mask": [[square(0, 0, 10, 10)]], "text": ["vessel"]},
        ],
    )
    found = evaluate(out, gt)
    catheters, vessels = found.scores
    assert (catheters.concept, catheters.images, vessels.concept, vessels.images) == ("catheter", 2, "vessel", 2)
    assert catheters.mean["dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert vessels.mean["dice"] == 0.5  # b has no second mask
    assert vessels.left_out == {"dice": 0, "iou": 0, "sensitivity": 0, "specificity": 0, "cldice": 0, "hd95": 1}
    assert (found.failed, found.without_truth) == (1, 1)
    assert [(c.index, c.concept, c.mask) for c in found.comparisons] == [
        (0, "catheter", 0),
        (0, "vessel", 1),
        (1, "catheter", 0),
        (1, "vessel", 1),
    ]
    assert found.table().splitlines()[-1] == "mean Dice vessel: 0.500 over 2 images"
    assert "(1 images left out: not defined)" in found.table()


def test_what_is_written(tmp_path: Path) -> None:
    out = run_folder(tmp_path, "Please segment vessel.", [("a", [box(0, 0, 10, 10)]), ("b", [])])
    gt = annotated(tmp_path, [{"image": f"{name}.png", "mask": [[square(0, 0, 10, 10)]], "text": ["vessel"]} for name in "ab"])
    evaluate(out, gt)
    a, b = rows(out / "metrics.csv")
    assert (a["code"], a["dice"], a["hd95"], a["predicted_area"]) == (CODES.code("a"), "1.0", "0.0", "100")
    assert (b["dice"], b["hd95"], b["true_area"]) == ("0.0", "", "100")
    assert "image" not in a
    means = {row["metric"]: row for row in rows(out / "metrics_mean.csv")}
    assert (means["dice"]["mean"], means["dice"]["images"], means["hd95"]["left_out"]) == ("0.5", "2", "1")
    found = json.loads((out / "evaluation.json").read_text())
    assert found["images"][1]["hd95"] is None
    assert found["images"][0]["truth_rle"] == encode_rle(box(0, 0, 10, 10))
    assert found["summary"][0]["ci95"]["dice"] == [0.0, 1.0]
    evaluate(out, gt, show_names=True)
    assert rows(out / "metrics.csv")[0]["image"] == "a.png"


def test_a_folder_is_compared_with_all_masks_of_an_answer(tmp_path: Path) -> None:
    out = run_folder(tmp_path, "Where?", [("a", [box(0, 0, 10, 10), box(20, 0, 30, 10)])])
    (tmp_path / "gt").mkdir()
    Image.fromarray(box(0, 0, 10, 10) | box(20, 0, 30, 10)).save(tmp_path / "gt" / "a_gt.png")
    [score] = evaluate(out, tmp_path / "gt").scores
    assert (score.concept, score.mean["dice"]) == ("all masks", 1)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "annotates no concept"),
        ([{"image": "a.png", "mask": [[square(0, 0, 9, 9)]], "text": ["stent"]}], "annotates no concept"),
        ([{"image": "a.png", "mask": [[]], "text": ["vessel"]}], "item 0, object 0: empty polygon"),
        ([{"image": "a.png", "mask": [[square(0, 0, 9, 9)[:7]]], "text": ["vessel"]}], "item 0, object 0: coordinates"),
        ([{"image": "z.png", "mask": [[square(0, 0, 9, 9)]], "text": ["vessel"]}], "no ground truth for any image"),
        ([{"image": "a.png", "mask": [["x"]], "text": ["vessel"]}], "item 0, object 0: coordinates"),
    ],
)
def test_annotations_that_do_not_fit(tmp_path: Path, items: Any, message: str) -> None:
    out = run_folder(tmp_path, "Please segment vessel.", [("a", [box(0, 0, 10, 10)])])
    with pytest.raises(VesselError, match=message):
        evaluate(out, annotated(tmp_path, items))
    assert not (out / "metrics.csv").exists()


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(VesselError, match=r"annotations\.json: missing"):
        evaluate(tmp_path, tmp_path / "annotations.json")
    gt = annotated(tmp_path, [])
    with pytest.raises(VesselError, match=r"results\.jsonl: missing"):
        evaluate(tmp_path, gt)
    (tmp_path / "annotations.json").write_text("{")
    with pytest.raises(VesselError, match=r"annotations\.json: cannot be read"):
        evaluate(tmp_path, tmp_path / "annotations.json")


@pytest.mark.parametrize("changed", [{"width": 61}, {"height": 10**9}, {"height": 0}, {"width": "60"}, {"height": None}])
def test_results_of_another_size_are_one_line(tmp_path: Path, changed: dict[str, Any]) -> None:
    out = run_folder(tmp_path, "Please segment vessel.", [("a", [box(0, 0, 10, 10)])])
    first, *rest = (out / "results.jsonl").read_text().splitlines()
    (out / "results.jsonl").write_text("\n".join([json.dumps(json.loads(first) | changed), *rest]) + "\n")
    gt = annotated(tmp_path, [{"image": "a.png", "mask": [[square(0, 0, 10, 10)]], "text": ["vessel"]}])
    with pytest.raises(VesselError, match=r"results\.jsonl: .*not in the format of this version"):
        evaluate(out, gt)


def test_the_trained_models_metrics_equal_monais(tiny: Tiny, fp32_bundle: Path, tmp_path: Path) -> None:
    """From the PNG files and the annotations, by MONAI."""
    infer(Bundle.load(fp32_bundle), options(tiny.frames, tmp_path, selection=Selection(num_images=4)))
    found = evaluate(tmp_path, tiny.annotations)
    truth = read_truth(tiny.annotations)
    assert found.scores[0].mean["dice"] > 0.7
    for comparison in found.comparisons:
        stem = Path(comparison.image).stem
        with Image.open(tmp_path / "masks" / f"{stem}.png") as mask:
            predicted = np.asarray(mask) > 0
        drawn = truth.mask({"name": stem, "height": predicted.shape[0], "width": predicted.shape[1]}, "vessel")
        p, t = (torch.from_numpy(np.ascontiguousarray(m))[None, None].float() for m in (predicted, drawn))
        assert comparison.values["dice"] == pytest.approx(compute_dice(p, t).item(), abs=1e-6)
        assert comparison.values["iou"] == pytest.approx(compute_iou(p, t).item(), abs=1e-6)
        theirs = compute_hausdorff_distance(p, t, include_background=True, percentile=95).item()
        assert comparison.values["hd95"] == pytest.approx(theirs, abs=1e-3)  # there, the rank to interpolate at is float32
        assert not math.isnan(comparison.values["cldice"])


def test_which_mask_is_whose_is_not_guessed(tmp_path: Path) -> None:
    """The annotations lack the concept of the first mask."""
    out = run_folder(tmp_path, "Please segment vessel and catheter.", [("a", [box(0, 0, 10, 10), box(20, 0, 30, 10)])])
    gt = annotated(tmp_path, [{"image": "a.png", "mask": [[square(20, 0, 30, 10)]], "text": ["catheter"]}])
    with pytest.raises(VesselError, match="it has only 'catheter', but answers have 2 masks"):
        evaluate(out, gt)


def test_a_run_that_was_stopped_is_said_to_be_so(tmp_path: Path) -> None:
    out = run_folder(tmp_path, "Please segment vessel.", [("a", [box(0, 0, 10, 10)])])
    gt = annotated(tmp_path, [{"image": "a.png", "mask": [[square(0, 0, 10, 10)]], "text": ["vessel"]}])
    assert "the run was stopped before its end" in evaluate(out, gt).table()
    (out / "run.json").write_text("{}")
    assert "stopped" not in evaluate(out, gt).table()


def test_what_is_compared_with_is_named_only_where_names_are_shown(tmp_path: Path) -> None:
    out = run_folder(tmp_path, "Please segment vessel.", [("a", [box(0, 0, 10, 10)])])
    annotated(tmp_path, [{"image": "a.png", "mask": [[square(0, 0, 10, 10)]], "text": ["vessel"]}]).rename(tmp_path / "S0042.json")
    for show_names, truth in ((False, "annotations"), (True, "S0042.json")):
        evaluate(out, tmp_path / "S0042.json", show_names=show_names)
        assert json.loads((out / "evaluation.json").read_text())["truth"] == truth

"""J, F and stability of cines, in numbers that are known, and what evaluate makes of a run of cines."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.frames import CODES, make_frame, placed
from tests.support.journals import result_with
from vessel_rt.cli import main
from vessel_rt.evaluation.cines import CineScores, mean_score
from vessel_rt.evaluation.evaluate import evaluate
from vessel_rt.inputs.frames import frame_suffix
from vessel_rt.model.result import Mask
from vessel_rt.results.reader import read_evaluation
from vessel_rt.results.writer import FrameWriter, failure


def box(x0: int, x1: int) -> np.ndarray:
    mask = np.zeros((40, 60), np.bool_)
    mask[10:30, x0:x1] = True
    return mask


NOTHING = box(0, 0)


def test_scores_of_an_object() -> None:
    scores = CineScores()
    for predicted, truth in ((NOTHING, NOTHING), (box(0, 20), box(0, 20)), (box(0, 10), box(0, 20)), (NOTHING, box(30, 50))):
        scores.add("a", "a.dcm", "Where?", "vessel", predicted, truth)
    [score] = scores.scores()
    assert (score.frames, score.j) == (4, (1 + 1 + 0.5 + 0) / 4)
    assert score.f == pytest.approx((1 + 1 + 0.75 + 0) / 4, abs=0.1)
    assert score.jf == (score.j + score.f) / 2
    assert score.stability == (0 + 0.5 + 0) / 3
    assert score.true_stability == (0 + 1 + 0) / 3


def test_cines_and_objects_are_apart() -> None:
    scores = CineScores()
    for code, concept, predicted in (
        ("a", "vessel", box(0, 20)),
        ("a", "catheter", box(30, 50)),
        ("a", "vessel", box(0, 20)),
        ("a", "catheter", NOTHING),
        ("b", "vessel", box(30, 50)),
    ):
        scores.add(code, "", "Where?", concept, predicted, box(0, 20))
    vessel, catheter, other = found = scores.scores()
    assert [(score.code, score.concept, score.frames) for score in found] == [("a", "vessel", 2), ("a", "catheter", 2), ("b", "vessel", 1)]
    assert (vessel.stability, catheter.stability) == (1, 0)
    assert math.isnan(other.stability)
    mean = mean_score(found)
    assert (mean.j, mean.stability, mean.frames) == (1 / 3, 0.5, 5)


def run_of_a_cine(folder: Path) -> Path:
    """Four frames of a cine, of which the third failed, and an image; the vessel is ten pixels to the right of the truth."""
    output = folder / "out"
    for kind in ("masks", "overlays", "previews"):
        (output / kind).mkdir(parents=True)
    [image] = placed("single.png")
    frames = [
        dataclasses.replace(frame, number=number, name=f"run{frame_suffix(number)}", code=CODES.code("run") + frame_suffix(number))
        for number, frame in enumerate(placed(*["run.dcm"] * 4))
    ]
    writer = FrameWriter(output, [frame.name for frame in (*frames, image)], "s", cines=True)
    result = dataclasses.replace(result_with(), question="Please segment vessel.", masks=(Mask(box(10, 30), 0.5, 2.0),))
    entries = [
        failure(frame, [result.question], "damaged", "s") if frame.number == 2 else writer.write(frame, "0", make_frame(60, 40), [result])
        for frame in (*frames, dataclasses.replace(image, index=4))
    ]
    for name, lines in (("results", "lines"), ("timings", "timings")):
        text = "".join(json.dumps(line) + "\n" for entry in entries for line in getattr(entry, lines))
        (output / f"{name}.jsonl").write_text(text)
    return output


def truth_of_a_cine(folder: Path) -> Path:
    truth = folder / "truth"
    truth.mkdir()
    Image.fromarray(box(0, 20)).save(truth / "run.tif", save_all=True, append_images=[Image.fromarray(box(0, 20))] * 3)
    Image.fromarray(box(0, 20)).save(truth / "single.png")
    return truth


def test_optical_flow_is_optional(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output, truth = run_of_a_cine(tmp_path), truth_of_a_cine(tmp_path)
    key = tmp_path / "key"
    command = ["evaluate", str(output), "--gt", str(truth), "--key", str(key)]
    assert main(command) == 0
    [record] = read_evaluation(output)["cines"]
    assert record["warped_stability"] is None
    assert "flow" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "skimage.registration", None)
        assert main([*command, "--flow"]) == 1
        [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "vessel-rt[evaluate]" in line
    pytest.importorskip("skimage", reason="the extra `evaluate` is not installed")
    assert main([*command, "--flow"]) == 0
    [record] = read_evaluation(output)["cines"]
    assert (record["warped_stability"], record["true_warped_stability"]) == (1, 1), "all frames show the same"
    assert "1.000 (1.000), 1.000 (1.000)" in capsys.readouterr().out
    next((output / "previews").glob("*_frame_000001.jpg")).unlink()
    assert main([*command, "--flow"]) == 1
    assert "preview" in capsys.readouterr().err


def test_a_run_of_cines(tmp_path: Path) -> None:
    output, truth = run_of_a_cine(tmp_path), truth_of_a_cine(tmp_path)
    found = evaluate(output, truth)
    [score] = found.cines
    assert (score.code, score.concept, score.frames, score.j, score.stability) == (CODES.code("run"), "all masks", 3, 1 / 3, 1)
    assert "J&F" in found.table()
    with (output / "metrics_cines.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert row["j"] == "0.333333"
    assert "image" not in row
    [record] = read_evaluation(output)["cines"]
    assert (record["code"], record["jf"]) == (score.code, round(score.jf, 6))
    evaluate(output, truth, show_names=True)
    assert "run.dcm" in (output / "metrics_cines.csv").read_text()

"""The main job on the small trained model: frames in, masks out, as good as they were trained, in either precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.paths import Tiny
from vessel_rt.cli import main
from vessel_rt.evaluation.evaluate import evaluate

BOTH = "Please segment vessel and catheter in this image."


def _infer(bundle: Path, frames: Path, output: Path, *more: str) -> list[dict[str, object]]:
    assert main(["infer", str(frames), "--bundle", str(bundle), "-o", str(output), "--threads", "2", *more]) == 0
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_masks_are_as_good_as_trained_in_both_precisions(tiny: Tiny, fp32_bundle: Path, fp16_bundle: Path, tmp_path: Path) -> None:
    scores = {}
    for bundle in (fp32_bundle, fp16_bundle):
        results = _infer(bundle, tiny.frames, tmp_path / bundle.name)
        assert len(results) == len(list(tiny.frames.iterdir()))
        assert all(result["status"] == "ok" for result in results)
        (score,) = evaluate(tmp_path / bundle.name, tiny.annotations).scores
        scores[bundle] = score.mean["dice"]
    assert scores[fp32_bundle] >= 0.80  # what training reached, with room for another machine's rounding: see examples/tiny/README.md
    assert scores[fp16_bundle] == pytest.approx(scores[fp32_bundle], abs=0.002)


def test_two_concepts_are_two_masks(tiny: Tiny, fp32_bundle: Path, tmp_path: Path) -> None:
    results = _infer(fp32_bundle, tiny.frames, tmp_path / "both", "--prompt", BOTH, "--num-images", "3")
    for result in results:
        assert str(result["answer"]).count("[SEG]") == 2
        assert isinstance(result["masks"], list)
        assert len(result["masks"]) == 2
    assert [score.concept for score in evaluate(tmp_path / "both", tiny.annotations).scores] == ["vessel", "catheter"]


def test_an_answer_in_words_alone_is_a_result_without_masks(tiny: Tiny, fp32_bundle: Path, tmp_path: Path) -> None:
    (result,) = _infer(fp32_bundle, tiny.frames, tmp_path / "words", "--prompt", "What kind of image is this?", "--num-images", "1")
    assert (result["status"], result["masks"]) == ("ok", [])
    assert "[SEG]" not in str(result["answer"])

"""benchmarks.sa2va: what is made of two results, and what is wrong with an input. Sa2VA's code itself is not here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import sa2va
from benchmarks.sa2va import Case, Figures, Found, _commit, _run_sa2va, _versions, main
from vessel_rt.errors import VesselError

TINY = Path("examples/tiny")
CASES = [Case("images", (Path("a.png"),), "Where?"), Case("cine", (Path("b.png"), Path("c.png")), "Where?")]


def _found(frames: int) -> Found:
    logits = np.random.default_rng(frames).standard_normal((2, frames, 8, 8)).astype(np.float32)
    return Found("It is [SEG] and [SEG].", logits, logits > 0)


def _figures(*theirs: Found) -> Figures:
    figures = Figures()
    for found in theirs:
        figures.add(_found(found.logits.shape[1]), found)
    return figures


def test_equal_results() -> None:
    assert _figures(_found(1), _found(2)).row() == {
        "runs": 2, "identical_answers": 2, "other_counts": 0, "masks": 6, "pixels": 6 * 64, "differing_pixels": 0, "min_iou": 1.0,
        "max_logit_difference": 0.0,
    }  # fmt: skip


def test_every_difference_counts() -> None:
    other, before = _found(2), _found(2).masks[0, 1]
    other.logits[1, 1, 3, 3] += 0.25
    other.masks[0, 1, 0, :2] ^= True
    row = _figures(_found(1), other).row()
    assert (row["identical_answers"], row["differing_pixels"], row["max_logit_difference"]) == (2, 2, 0.25)
    assert row["min_iou"] == round((other.masks[0, 1] & before).sum() / (other.masks[0, 1] | before).sum(), 6)


def test_masks_of_other_answers_are_not_compared() -> None:
    row = _figures(_found(1), Found("Sure.", _found(2).logits, _found(2).masks)).row()
    assert (row["runs"], row["identical_answers"], row["masks"]) == (2, 1, 2)


def test_another_number_of_masks_is_counted() -> None:
    row = _figures(_found(1), Found(_found(2).answer, _found(2).logits[:1], _found(2).masks[:1])).row()
    assert (row["identical_answers"], row["other_counts"], row["masks"]) == (2, 1, 2)


def test_an_answer_without_masks_is_no_agreement() -> None:
    figures = Figures()
    ours = Found("A vessel.", np.zeros((0, 1, 8, 8), np.float32), np.zeros((0, 1, 8, 8), bool))
    figures.add(ours, Found("A vessel.", np.zeros(0, np.float32), np.zeros(0, bool)))
    assert figures.identical_answers == 1
    with pytest.raises(VesselError, match="no mask was compared"):
        figures.row()


def test_logits_that_are_not_finite() -> None:
    other = _found(1)
    other.logits[0, 0, 0, 0] = np.nan
    with pytest.raises(VesselError, match="not finite"):
        _figures(other)


def _arguments(**changed: Any) -> argparse.Namespace:
    files = {"ckpt": TINY / "iter_1000.pth", "base": TINY / "base", "sam2": TINY / "sam2_tiny.pt"}
    return argparse.Namespace(**{"sa2va": Path("clone"), "python": Path(sys.executable), "lora_alpha": None, **files, **changed})


def _peer(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str) -> None:
    (folder / "peer.py").write_text(program, encoding="utf-8")
    monkeypatch.setattr(sa2va, "_PEER", folder / "peer.py")


def test_the_peer_gets_every_tensor_and_every_way_to_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import json, sys\n"
        "from safetensors import safe_open\n"
        "request = json.load(open(sys.argv[1]))\n"
        "names = sorted(safe_open(request['trained'], 'np').keys())\n"
        "json.dump([request, names], open(request['out'] + '/seen.json', 'w'))\n"
    )
    _peer(monkeypatch, tmp_path, program)
    files = _run_sa2va(_arguments(), CASES, tmp_path)
    assert files[CASES[1], ("memories",)] == tmp_path / "3.npz"
    request, names = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert len(names) == 185
    assert (request["lora_alpha"], request["lora_rank"], request["sam2_config"]["image_size"]) == (16, 8, 512)
    assert [(len(case["files"]), case["cine"], case["rounded"]) for case in request["cases"]] == [
        (1, False, []), (1, False, ["constants"]), (2, True, []), (2, True, ["memories"]), (2, True, ["constants", "memories"]),
    ]  # fmt: skip


def test_metas_hiera_l_is_built_by_sa2vas_own_constructor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _peer(monkeypatch, tmp_path, "import json, sys; r = json.load(open(sys.argv[1])); json.dump(r, open(r['out'] + '/seen.json', 'w'))\n")
    _run_sa2va(_arguments(sam2=tmp_path / "sam2_hiera_large.pt"), CASES, tmp_path)
    assert json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))["sam2_config"] is None


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("raise SystemExit(3)\n", "Sa2VA's code ended with code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n", r"Sa2VA's code was killed \(signal 9\)"),
    ],
)
def test_an_end_of_sa2vas_code_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, told: str) -> None:
    _peer(monkeypatch, tmp_path, program)
    with pytest.raises(VesselError, match=told):
        _run_sa2va(_arguments(), CASES, tmp_path)


def test_a_base_model_that_sa2va_cannot_read(tmp_path: Path) -> None:
    base = tmp_path / "base"
    with pytest.raises(VesselError, match=r"config\.json: cannot be read"):
        _run_sa2va(_arguments(base=base), CASES, tmp_path)
    shutil.copytree(TINY / "base", base)
    (base / "config.json").write_text('{"model_type": "internvl"}', encoding="utf-8")
    with pytest.raises(VesselError, match="not InternVL3's original layout"):
        _run_sa2va(_arguments(base=base), CASES, tmp_path)


def test_a_checkpoint_without_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = sa2va.open_checkpoint(TINY / "iter_1000.pth")
    monkeypatch.setattr(sa2va, "open_checkpoint", lambda _: dataclasses.replace(opened, lora_alpha=None))
    with pytest.raises(VesselError, match="does not record LoRA's alpha; give it with --lora-alpha"):
        _run_sa2va(_arguments(), CASES, tmp_path)


def test_no_clone_and_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VesselError, match="not a clone of Sa2VA"):
        _commit(tmp_path)
    models = tmp_path / "projects" / "sa2va" / "hf" / "models"
    models.mkdir(parents=True)
    for name in sa2va._SOURCES:
        (models / f"{name}.py").touch()
    assert _commit(tmp_path) is None
    assert "other files than those of 9832e1a" in capsys.readouterr().err


def test_versions_of_an_environment(tmp_path: Path) -> None:
    assert _versions(Path(sys.executable))["torch"]
    with pytest.raises(VesselError, match="cannot be run"):
        _versions(tmp_path / "python")


def test_a_wrong_path_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sa2va", "--sa2va", str(tmp_path), "--python", sys.executable])
    assert main() == 1
    assert capsys.readouterr().err.count("\n") == 1

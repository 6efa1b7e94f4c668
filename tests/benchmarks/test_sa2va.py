"""benchmarks.sa2va: what is made of two results, and how a failure of Sa2VA's code is told. Sa2VA's code itself is not here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from benchmarks import sa2va
from benchmarks.sa2va import Case, Found, _compare, _run_sa2va
from vessel_export.parity.reference import Reference
from vessel_rt.errors import VesselError

TINY = Path("examples/tiny")
CASES = [Case((Path("a.png"),), "Where?", False), Case((Path("b.png"), Path("c.png")), "Where?", True)]


def _found(frames: int) -> Found:
    logits = np.random.default_rng(frames).standard_normal((2, frames, 8, 8)).astype(np.float32)
    return Found("It is [SEG] and [SEG].", logits, logits > 0)


def _save(path: Path, found: Found) -> Path:
    np.savez(path, answer=found.answer, logits=found.logits, masks=found.masks)
    return path


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Reference:
    """One that finds the same for every case with as many frames."""
    monkeypatch.setattr(sa2va, "_reference", lambda _, case: _found(len(case.files)))
    return cast(Reference, None)


def test_equal_results(tmp_path: Path, reference: Reference) -> None:
    files = [_save(tmp_path / f"{frames}.npz", _found(frames)) for frames in (1, 2)]
    assert _compare(reference, CASES, files) == {
        "runs": 2, "identical_answers": 2, "masks": 6, "pixels": 6 * 64, "differing_pixels": 0, "min_iou": 1.0, "max_logit_difference": 0.0,
    }  # fmt: skip


def test_every_difference_counts(tmp_path: Path, reference: Reference) -> None:
    other, before = _found(2), _found(2).masks[0, 1]
    other.logits[1, 1, 3, 3] += 0.25
    other.masks[0, 1, 0, :2] ^= True
    files = [_save(tmp_path / f"{frames}.npz", found) for frames, found in ((1, _found(1)), (2, other))]
    figures = _compare(reference, CASES, files)
    assert (figures["identical_answers"], figures["differing_pixels"], figures["max_logit_difference"]) == (2, 2, 0.25)
    assert figures["min_iou"] == round((other.masks[0, 1] & before).sum() / (other.masks[0, 1] | before).sum(), 6)


def test_masks_of_other_answers_are_not_compared(tmp_path: Path, reference: Reference) -> None:
    files = [_save(tmp_path / "1.npz", _found(1)), _save(tmp_path / "2.npz", Found("Sure.", _found(2).logits[:0], _found(2).masks[:0]))]
    figures = _compare(reference, CASES, files)
    assert (figures["runs"], figures["identical_answers"], figures["masks"]) == (2, 1, 2)


def test_another_number_of_masks_is_not_compared(tmp_path: Path, reference: Reference) -> None:
    fewer = Found(_found(1).answer, _found(1).logits[:1], _found(1).masks[:1])
    with pytest.raises(VesselError, match=r"masks \(1, 1, 8, 8\) by Sa2VA's code and \(2, 1, 8, 8\) by the reference"):
        _compare(reference, CASES[:1], [_save(tmp_path / "1.npz", fewer)])


def _arguments(**changed: Any) -> argparse.Namespace:
    files = {"ckpt": TINY / "iter_1000.pth", "base": TINY / "base", "sam2": TINY / "sam2_tiny.pt"}
    return argparse.Namespace(sa2va=Path("clone"), python=Path(sys.executable), **files | changed)


def test_the_peer_gets_every_tensor_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = tmp_path / "peer.py"
    peer.write_text(
        "import json, sys\n"
        "from safetensors import safe_open\n"
        "request = json.load(open(sys.argv[1]))\n"
        "names = sorted(safe_open(request['trained'], 'np').keys())\n"
        "json.dump([request, names], open(request['out'] + '/seen.json', 'w'))\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sa2va, "_PEER", peer)
    folder = tmp_path / "out"
    assert _run_sa2va(_arguments(), CASES, folder, "memories") == [folder / "0.npz", folder / "1.npz"]
    request, names = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
    assert len(names) == 185
    assert (request["lora_alpha"], request["rounded"], request["sam2_yaml"]) == (16, "memories", str((TINY / "sam2_tiny.yaml").resolve()))
    assert [(len(case["files"]), case["cine"]) for case in request["cases"]] == [(1, False), (2, True)]


def test_an_error_of_sa2vas_code_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = tmp_path / "peer.py"
    peer.write_text("raise SystemExit('no module named timm')\n", encoding="utf-8")
    monkeypatch.setattr(sa2va, "_PEER", peer)
    with pytest.raises(VesselError, match=r"Sa2VA's code ended with code 1: no module named timm"):
        _run_sa2va(_arguments(), CASES, tmp_path / "out", None)

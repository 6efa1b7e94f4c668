"""The search for the matrices that move the masks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch

from tests.support.paths import Tiny
from tests.support.tampering import change_tensor
from vessel_export.cli import main
from vessel_export.parity.inputs import read_samples
from vessel_export.parity.reference import Reference
from vessel_export.parity.sensitivity import MatrixEffect, Sensitivity, measure_sensitivity
from vessel_export.parity.stored_matrices import stored_matrices
from vessel_rt.formats.bundle import Bundle

QUESTION = "Please segment vessel and catheter in this image."


@pytest.fixture(scope="module")
def reference(tiny: Tiny) -> Reference:
    return Reference.load(tiny.checkpoint, tiny.base, tiny.sam2)


def test_a_bad_matrix_stands_out_and_the_reference_is_left_as_it_was(
    tiny: Tiny, int4_bundle: Path, reference: Reference, tmp_path: Path
) -> None:
    bad = "layers.1.mlp.down_proj.weight"
    shutil.copytree(int4_bundle, tmp_path / "bundle")
    change_tensor(tmp_path / "bundle", "weights/language_model.safetensors", f"{bad}_scale", _negated)
    samples = read_samples(sorted(tiny.frames.glob("*.jpg"))[:2])
    before = reference.segment(samples[0].reference, QUESTION).mask_logits
    bundle = Bundle.load(tmp_path / "bundle")
    found = measure_sensitivity(bundle, reference, samples, [QUESTION])
    assert torch.equal(before, reference.segment(samples[0].reference, QUESTION).mask_logits)
    assert bundle.quantization
    names = {name for matrices in bundle.quantization.matrices.values() for name in matrices}
    assert {effect.name for effect in found.effects} == names - {"lm_head.weight"}
    ious = [effect.mean_iou for effect in found.effects]
    assert ious == sorted(ious)
    assert found.effects[0] == MatrixEffect("language_model", bad, ious[0])
    assert ious[0] < 0.99 < ious[1] <= ious[-1] <= 1


def _negated(scales: npt.NDArray[Any]) -> None:
    scales *= -1


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_matrix_is_what_onnx_says(weights: str, reference: Reference, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.load(request.getfixturevalue(f"{weights}_bundle"))
    matrix = next(iter(stored_matrices(bundle, "language_model")))
    values, (module,) = matrix.values(bundle.folder), matrix.modules(reference)
    expected = module.base_layer.weight + module.get_delta_weight("default")
    assert values.shape == expected.mT.shape
    assert (values - expected.mT).abs().max() <= expected.abs().max() / (127 if weights == "int8" else 7)


def test_sam2s_matrices_are_measured_through_its_encoder(tiny: Tiny, int8_bundle: Path, reference: Reference) -> None:
    bundle = Bundle.load(int8_bundle)
    assert bundle.quantization
    found = measure_sensitivity(bundle, reference, read_samples(sorted(tiny.frames.glob("*.jpg"))[:1]), [QUESTION])
    effects = {effect.name: effect.mean_iou for effect in found.effects if effect.stage == "sam2_image_encoder"}
    assert effects.keys() == bundle.quantization.matrices["sam2_image_encoder"].keys()
    assert 0.99 < min(effects.values()) < 1


def test_the_fewest_matrices_whose_losses_are_too_much() -> None:
    found = Sensitivity(tuple(MatrixEffect("stage", name, mean) for name, mean in (("a", 0.99), ("b", 0.997), ("c", 0.999))))
    assert found.to_keep(0.98) == []
    assert found.to_keep(0.995) == ["a"]
    assert found.to_keep(0.999) == ["a", "b"]
    assert found.to_keep(1.0) == ["a", "b", "c"]
    assert 'keep = ["a"]' in found.table(0.995)


def test_command(tiny: Tiny, int8_bundle: Path, fp32_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--ckpt", str(tiny.checkpoint), "--images", str(min(tiny.frames.glob("*.jpg"))), "--by-matrix"]
    assert main(["verify", "--bundle", str(int8_bundle), *rest]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("for the recipe: keep = [")
    assert main(["verify", "--bundle", str(fp32_bundle), *rest]) == 1
    assert "no quantized matrices" in capsys.readouterr().err

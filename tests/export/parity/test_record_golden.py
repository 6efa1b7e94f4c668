"""Goldens are what the reference computes, and a sound bundle agrees with them."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.paths import Tiny
from vessel_export.cli import main
from vessel_export.parity import verify
from vessel_export.parity.golden_frames import golden_frames
from vessel_export.parity.record_golden import GoldenRecorder
from vessel_export.parity.reference import Reference
from vessel_rt.check.cine import run_cine
from vessel_rt.check.loading import LoadedDeployment
from vessel_rt.device.deployment import deploy
from vessel_rt.device.providers import Device
from vessel_rt.errors import VesselError
from vessel_rt.evaluation.metrics import iou
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.golden import GOLDEN_ARRAYS, GOLDEN_FILE, MOST_GOLDEN_BYTES, SKETCHED, Golden, shifted
from vessel_rt.model.preprocess import tile_pixels
from vessel_rt.model.segmenter import Segmenter


@pytest.fixture(scope="module")
def bundle(golden_bundle: Path) -> Bundle:
    return Bundle.load(golden_bundle)


@pytest.fixture(scope="module")
def golden(bundle: Bundle) -> Golden:
    found = Golden.load(bundle)
    assert found is not None
    return found


def _image(golden: Golden, frame: int) -> Image.Image:
    return Image.fromarray(golden.frames[frame]).convert("RGB")


def test_frames_and_cases(bundle: Bundle, golden: Golden) -> None:
    assert [frame.tiles for frame in golden.file.frames] == [1, 7, 13]
    assert [len(tile_pixels(_image(golden, i), bundle.tiles)) for i in range(3)] == [1, 7, 13]
    assert {case.frame for case in golden.cases} == {0, 1, 2}
    assert len({case.question for case in golden.cases}) >= 2
    assert sum((bundle.folder / name).stat().st_size for name in (GOLDEN_FILE, GOLDEN_ARRAYS)) < MOST_GOLDEN_BYTES
    for frame in golden.frames:
        assert 20 < frame.std() < 80
    reference = golden.file.reference
    assert (reference.precision, reference.streamed) == ("fp32", False)
    assert {"torch", "transformers", "peft", "sam2", "vessel-rt"} == reference.versions.keys()


def test_frames_for_smaller_tiles(bundle: Bundle) -> None:
    tiles = msgspec.structs.replace(bundle.tiles, size=56)
    assert [len(tile_pixels(Image.fromarray(frame).convert("RGB"), tiles)) for frame in golden_frames(tiles)] == [1, 7, 13]


def test_the_bundle_agrees_with_its_goldens(bundle: Bundle, golden: Golden) -> None:
    deployment = deploy(bundle, Device("cpu"))
    with Segmenter(deployment, 1) as segmenter, deployment.session("vision_encoder", 1) as encoder:
        for case in golden.cases:
            image = _image(golden, case.frame)
            pixels = segmenter.prepare(image)
            [[answer]] = segmenter.run([pixels], [case.question])
            assert answer.generation.token_ids == case.token_ids
            assert segmenter.finish(pixels, answer).answer == case.answer
            np.testing.assert_allclose(answer.iou, case.iou, atol=1e-3)
            np.testing.assert_allclose(answer.object_score, case.object_score, rtol=1e-2, atol=1e-2)
            for ours, theirs in zip(answer.low_res_logits > 0, case.low_res_logits > 0, strict=True):
                assert iou(ours, theirs) > 0.99
            embeds = encoder.run({"pixel_values": pixels.tiles})["image_embeds"]
            outputs = {
                "image_embeds": embeds,
                "seg_states": answer.generation.seg_states,
                "low_res_logits": answer.low_res_logits,
            }
            for name, array in outputs.items():
                assert golden.sketch(array).error(case.sketches[name]) < 1e-4, name
            assert golden.sketch(embeds * 1.01).error(case.sketches["image_embeds"]) == pytest.approx(0.01, rel=0.2)
            assert case.sketches.keys() == {name for names in SKETCHED.values() for name in names}


def test_the_bundle_agrees_with_its_golden_cine(bundle: Bundle, golden: Golden) -> None:
    cine = golden.file.cine
    assert cine is not None
    assert golden.cine is not None
    assert len(cine.shifts) == 8
    deployment = deploy(bundle, Device("cpu"))
    with ExitStack() as stack:
        sessions = {stage: stack.enter_context(deployment.session(stage, 1)) for stage in bundle.stages}
        loaded = LoadedDeployment.of(deployment, sessions)
        found = run_cine(loaded, [shifted(golden.frames[0], shift) for shift in cine.shifts], cine.question)
    assert (found.result.token_ids, found.result.answer) == (cine.token_ids, cine.answer)
    assert found.low_res_logits.shape == golden.cine.low_res_logits.shape == (1, 8, 128, 128)
    for ours, theirs in zip(found.low_res_logits[0] > 0, golden.cine.low_res_logits[0] > 0, strict=True):
        assert theirs.sum() > 100
        assert iou(ours, theirs) > 0.99
    assert found.sketched.keys() == golden.cine.sketches.keys()
    for name, array in found.sketched.items():
        assert golden.sketch(array).error(golden.cine.sketches[name]) < 1e-4, name


def test_a_streamed_reference_records_the_same(tiny: Tiny, golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "streamed"):
        shutil.copytree(golden_bundle, tmp_path / name)
    monkeypatch.setattr(verify, "memory_for_reference", lambda _: 0)
    request = verify.VerifyRequest(tmp_path / "streamed", tiny.checkpoint, str(tiny.base), str(tiny.sam2))
    assert not verify.record_after_export(request, stream=False)
    assert verify.record_after_export(request, stream=True)
    whole, streamed = ((tmp_path / name / GOLDEN_ARRAYS).read_bytes() for name in ("whole", "streamed"))
    assert whole == streamed
    golden = Golden.load(Bundle.load(tmp_path / "streamed"))
    assert golden is not None
    assert golden.file.reference.streamed


@pytest.mark.parametrize("memory", [float("inf"), 0.0])
def test_verify_records(
    tiny: Tiny, fp32_bundle: Path, tmp_path: Path, memory: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(fp32_bundle, folder)
    monkeypatch.setattr(verify, "memory_for_reference", lambda _: memory)
    assert main(["verify", "--record", "--bundle", str(folder), "--ckpt", str(tiny.checkpoint), "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "4 runs, 5 masks: parity" in printed
    bundle = Bundle.load(folder)
    assert bundle.files == Bundle.load(fp32_bundle).files
    golden = Golden.load(bundle)
    assert golden is not None
    assert golden.file.reference.streamed == (memory == 0)
    bundle.verify_files()


@pytest.mark.parametrize("option", [["--images", "x.png"], ["--prompt", "Where?"], ["--by-matrix"]])
def test_verify_records_its_own_frames_only(option: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--record", "--bundle", "b", "--ckpt", "c", *option])
    assert ended.value.code == 2


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("memory", [float("inf"), 0.0])
def test_export_records_if_the_reference_fits(
    tiny: Tiny, tmp_path: Path, memory: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "memory_for_reference", lambda _: memory)
    inputs = ["--ckpt", str(tiny.checkpoint), "--base", str(tiny.base), "--sam2", str(tiny.sam2)]
    assert main(["export", *inputs, "--recipe", "cpu", "--out", str(tmp_path / "b")]) == 0
    assert (Golden.load(Bundle.load(tmp_path / "b")) is not None) == (memory > 0)
    assert ("none recorded" in capsys.readouterr().out) == (memory == 0)


def test_ranges_keep_the_goldens(tiny: Tiny, fp16_bundle: Path, golden_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(fp16_bundle, folder)
    golden = Golden.load(Bundle.load(golden_bundle))
    assert golden is not None
    golden.save(Bundle.load(folder))
    assert main(["ranges", "--bundle", str(folder), "--images", str(min(tiny.frames.iterdir())), "--threads", "1"]) == 0
    assert Golden.load(Bundle.load(folder)) is not None


def test_logits_beyond_fp16(bundle: Bundle, tiny: Tiny) -> None:
    reference = Reference.load(tiny.checkpoint, tiny.base, tiny.sam2)
    recorder = GoldenRecorder(bundle, reference)
    result = reference.segment(recorder.image(0), bundle.prompt.default_question)
    logits = torch.full_like(result.prediction.low_res_logits, 1e5)  # FP16 ends at 65504
    result = dataclasses.replace(result, prediction=dataclasses.replace(result.prediction, low_res_logits=logits))
    with pytest.raises(VesselError, match="beyond FP16"):
        recorder.add(0, "Where?", result)

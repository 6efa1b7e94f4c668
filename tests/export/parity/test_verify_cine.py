"""Cines: the runtime against Sa2VA's video path on sam2's own classes, frame by frame.

FP32 may differ by rounding alone, and FP16 as `verify` allows: errors go from frame to frame with the memories.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from tests.support.paths import Tiny
from vessel_export.cli import main
from vessel_export.parity.reference import Reference
from vessel_export.parity.reference_cine import track
from vessel_export.parity.verify_cine import compare_cine, drawn_cine
from vessel_rt.device.deployment import deploy
from vessel_rt.device.providers import Device
from vessel_rt.formats.bundle import Bundle
from vessel_rt.model.cine import CineSegmenter

QUESTION = "Please segment vessel in this image."
SHORT, LONG = 9, 30  # frames


@pytest.fixture(scope="module")
def reference(tiny: Tiny) -> Reference:
    return Reference.load(tiny.checkpoint, tiny.base, tiny.sam2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parity_of_a_short_cine(reference: Reference, precision: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.load(request.getfixturevalue(f"{precision}_bundle"))
    report = compare_cine(deploy(bundle, Device("cpu")), reference, drawn_cine(SHORT), [QUESTION])
    assert report.masks == SHORT
    assert report.passed, report.table()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parity_of_a_long_cine(tiny: Tiny, precision: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = request.getfixturevalue(f"{precision}_bundle")
    inputs = ["--ckpt", str(tiny.checkpoint), "--base", str(tiny.base), "--sam2", str(tiny.sam2)]
    assert main(["verify", "--bundle", str(bundle), *inputs, "--cine", str(LONG)]) == 0
    printed = capsys.readouterr().out
    assert f"{LONG} runs, {LONG} masks" in printed
    assert "mask IoU, last frame" in printed


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
def test_parity_from_any_conditioning_frames_in_both_directions(reference: Reference, fp32_bundle: Path, reverse: bool) -> None:
    conditioning, frames = (2, 4), drawn_cine(7)
    order = [3, 1, 0] if reverse else [3, 5, 6]
    with CineSegmenter(deploy(Bundle.load(fp32_bundle), Device("cpu"))) as segmenter:
        pixels = [segmenter.prepare_frame(frame, 0) for frame in frames]
        [generation], _ = segmenter.ask([pixels[2]], [QUESTION])
        state = generation.seg_states
        [of_object] = [{place: segmenter.condition(pixels[place], state).memories[0] for place in conditioning}]
        found = {
            place: tracked.prediction["low_res_logits"][0]
            for place, _, tracked in segmenter.propagate([of_object], ((place, pixels[place]) for place in order), reverse=reverse)
        }
    squares = [torch.from_numpy(one.square) for one in pixels]
    expected = track(reference, squares, torch.from_numpy(state[0]), conditioning, reverse=reverse).numpy()
    assert sorted(found) == sorted(order)
    for place, logits in found.items():
        assert np.abs(logits - expected[place]).max() <= 1e-4 * np.abs(expected[place]).max()


def test_the_object_pointer_changes_no_bit_of_single_frames(fp32_bundle: Path) -> None:
    model = onnx.load(fp32_bundle / "sam2_mask_decoder.onnx", load_external_data=False)
    random = np.random.default_rng(0)
    sizes, feeds = {"images": 2, "masks": 3}, {}
    for value in model.graph.input:
        shape = [axis.dim_value or sizes[axis.dim_param] for axis in value.type.tensor_type.shape.dim]
        feeds[value.name] = random.standard_normal(shape).astype(np.float32) if value.name != "image_index" else np.array([1, 0, 1])
    with_pointer = ort.InferenceSession(fp32_bundle / "sam2_mask_decoder.onnx", providers=["CPUExecutionProvider"])
    outputs = ["low_res_logits", "iou", "object_score"]
    expected = with_pointer.run(outputs, feeds)
    del model.graph.output[3]
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(fp32_bundle))
    without = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for ours, theirs in zip(without.run(outputs, feeds), expected, strict=True):
        assert np.array_equal(ours, theirs)

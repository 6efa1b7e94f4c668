"""Which stage is named, and how masks are compared. tests/runtime/check/test_check.py runs the whole on bundles with faults."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from vessel_export.parity.emulate import emulate
from vessel_rt.check.cine import check_cine
from vessel_rt.check.loading import LoadedDeployment
from vessel_rt.check.parity import Outputs, _batches, check_parity, decided_iou, golden_images, judge_stages
from vessel_rt.check.record import Record
from vessel_rt.check.schema import CheckLine, StageError
from vessel_rt.check.tolerances import error_limit, tolerances_of
from vessel_rt.device.deployment import Deployment, deploy
from vessel_rt.device.providers import Device
from vessel_rt.formats.bundle import Bundle, Quantization
from vessel_rt.formats.golden import CINE_SKETCHED, SKETCHED, Golden
from vessel_rt.model.segmenter import Segmenter


def judged(**errors: float | None) -> dict[str, CheckLine]:
    """The lines for these errors of outputs, of which 0.1 is permitted; all others are 0."""
    lines: list[CheckLine] = []
    record = Record(str, lines.append, lambda found: None)
    record.device = "cpu"
    stages = [StageError("cpu", stage, name, errors.get(name, 0.0), 0.1, 3) for stage, names in SKETCHED.items() for name in names]
    judge_stages(record, "parity", stages, SKETCHED, "it did not run")
    return {line.name: line for line in lines}


def test_stages_within_tolerance_pass() -> None:
    assert {line.outcome for line in judged(image_embeds=0.1, fpn_0=0.05).values()} == {"pass"}


def test_only_a_stage_whose_inputs_are_right_is_at_fault() -> None:
    lines = judged(image_embeds=0.2, seg_states=0.3, low_res_logits=None)
    assert "image_embeds of case 3: the first stage that is off" in lines["vision_encoder"].reason
    assert lines["language_model"].reason == "seg_states of case 3: its inputs are off already (vision_encoder)"
    assert lines["sam2_image_encoder"].outcome == "pass"
    assert lines["sam2_mask_decoder"].reason == "low_res_logits of case 3: its inputs are off already (language_model)"
    assert "not a number" in lines["sam2_mask_decoder"].figure


def test_two_stages_can_be_at_fault() -> None:
    lines = judged(prompt_state=0.2, fpn_1=0.2)
    assert all("the first stage that is off" in lines[stage].reason for stage in ("language_model", "sam2_image_encoder"))


def test_masks_are_compared_where_the_reference_is_sure() -> None:
    theirs = np.array([[4.0, 0.001], [-4.0, -0.001]], np.float32)
    ours = np.array([[4.0, -0.001], [-4.0, 0.001]], np.float32)
    assert decided_iou(ours, theirs, undecided=1e-3) == 1.0
    assert decided_iou(ours, theirs, undecided=0.0) == 1 / 3
    assert decided_iou(-ours, theirs, undecided=1e-3) == 0.0
    assert decided_iou(np.full((2, 2), -1, np.float32), np.full((2, 2), -1, np.float32), undecided=0.0) == 1.0


@pytest.mark.parametrize(
    ("weights", "encoders"),
    [("fp32", 1e-4), ("fp16", 6e-3), ("bf16", 4e-2), ("int8", 1e-4), ("int4", 1e-4)],
)
def test_a_stage_has_the_tolerance_of_the_worst_that_it_depends_on(standin: Bundle, weights: str, encoders: float) -> None:
    bundle = msgspec.structs.replace(standin, precision=weights)
    if weights.startswith("int"):
        matrices = {"vision_encoder": {"a": 32}}
        bundle = msgspec.structs.replace(standin, quantization=Quantization(weights, matrices, {}))
    limits = {stage: error_limit(bundle, stage) for stage in bundle.stages}
    assert limits["sam2_image_encoder"] == encoders
    assert limits["language_model"] == limits["vision_encoder"] >= encoders
    assert 0 < tolerances_of(bundle).iou <= tolerances_of(bundle).mean_iou <= 1


@pytest.mark.parametrize(("batch", "device", "sizes"), [(1, "cpu", [2]), (4, "cpu", [2]), (1, "rtx", []), (2, "rtx", [2])])
def test_batches_are_as_large_as_the_device_takes(golden_standin: Path, batch: int, device: str, sizes: list[int]) -> None:
    bundle = Bundle.load(golden_standin)
    golden = Golden.load(bundle)
    assert golden
    deployment = LoadedDeployment.of(Deployment(bundle, Device(device), {}, batch), {})
    assert [len(cases) for cases in _batches(golden, deployment)] == sizes


@pytest.mark.parametrize(
    "made",
    [
        "fp32",
        "fp16",
        "int8",
        *(pytest.param(made, marks=pytest.mark.slow) for made in ("int4", "fp16 emulated", "bf16 emulated")),
    ],
)
def test_every_type_of_the_trained_bundle_is_within_its_tolerances(request: pytest.FixtureRequest, golden_bundle: Path, made: str) -> None:
    """Against what PyTorch computed: the measurements of docs/numerics.md."""
    golden = Golden.load(Bundle.load(golden_bundle))
    assert golden
    bundle = Bundle.load(request.getfixturevalue(f"{made.split()[0]}_bundle"))
    deployment = emulate(bundle) if "emulated" in made else deploy(bundle, Device("cpu"))
    lines: list[CheckLine] = []
    loaded = LoadedDeployment.of(deployment, {stage: deployment.session(stage, 1) for stage in deployment.bundle.all_stages})
    record = Record(str, lines.append, lambda found: None)
    record.device = str(loaded.device)
    check_parity(record, loaded, golden)
    assert {line.name: line.outcome for line in lines} == dict.fromkeys((*SKETCHED, "answers", "masks"), "pass"), lines
    del lines[:]
    check_cine(record, loaded, golden)
    assert {line.name: line.outcome for line in lines} == dict.fromkeys((*CINE_SKETCHED, "answer", "masks"), "pass"), lines


def test_a_long_prompt_in_chunks_has_the_same_states(golden_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(golden_tiny)
    golden = Golden.load(bundle)
    assert golden
    deployment = deploy(bundle, Device("cpu"))
    lines: list[CheckLine] = []
    monkeypatch.setattr("vessel_rt.model.segmenter.CPU_TOKENS", 30)
    check_parity(Record(str, lines.append, lambda found: None), LoadedDeployment.of(deployment, deployment.sessions(1)), golden)
    assert {line.name: line.outcome for line in lines} == dict.fromkeys((*SKETCHED, "answers", "masks"), "pass")


def test_outputs_of_an_answer_without_masks(golden_standin: Path) -> None:
    bundle = Bundle.load(golden_standin)
    golden = Golden.load(bundle)
    assert golden
    deployment = deploy(bundle, Device("cpu"))
    outputs = Outputs()
    with Segmenter(LoadedDeployment.of(deployment, deployment.sessions(1)).tapped(outputs), draft=False) as segmenter:
        [[answer]] = segmenter.run([segmenter.prepare(golden_images(golden)[0])], ["Where?"])
    assert outputs.of(answer).keys() == {name for names in SKETCHED.values() for name in names}
    outputs.clear()
    with pytest.raises(IndexError):
        outputs.of(answer)

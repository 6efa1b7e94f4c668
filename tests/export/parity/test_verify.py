"""Parity passes on the bundles that the exporter makes, and fails on one whose weights were changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from tests.support.paths import Tiny
from vessel_export.cli import main
from vessel_export.parity.checks import ALONE, TOLERANCES, Check, Report
from vessel_export.parity.inputs import drawn_samples, read_samples
from vessel_export.parity.reference import Reference
from vessel_export.parity.verify import Case, VerifyRequest, _compare_end_to_end, _Expected, undecided_pixels, verify, verify_bundle
from vessel_rt.device.deployment import deploy
from vessel_rt.device.providers import Device
from vessel_rt.errors import BundleError, VesselError
from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle
from vessel_rt.io.checked_files import sha256_of
from vessel_rt.model.result import Mask, Result

QUESTIONS = ("Please segment vessel in this image.", "Please segment vessel and catheter in this image.")


@pytest.fixture(scope="module")
def reference(tiny: Tiny) -> Reference:
    return Reference.load(tiny.checkpoint, tiny.base, tiny.sam2)


def command(*arguments: object) -> int:
    return main(["verify", *map(str, arguments)])


@pytest.mark.parametrize(
    ("precision", "frames"),
    [
        *((precision, 2) for precision in ("fp32", "fp16", "int8")),
        # The tolerances of int4 are of the means over all frames: two frames with small catheters are below them.
        *(pytest.param(precision, None, marks=pytest.mark.slow) for precision in ("fp32", "fp16", "int8", "int4")),
    ],
)
def test_parity(tiny: Tiny, reference: Reference, precision: str, frames: int | None, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.load(request.getfixturevalue(f"{precision}_bundle"))
    samples = read_samples(sorted(tiny.frames.glob("*.jpg"))[:frames])
    report = verify(deploy(bundle, Device("cpu")), reference, samples, QUESTIONS, threads=1)
    assert report.passed, "\n" + report.table()
    assert report.runs == 2 * len(samples)
    assert report.masks == 3 * len(samples)
    assert {check.stage for check in report.checks} == {"image", "prompt", *bundle.stages, "end to end"}
    alone = [check.stage for check in report.checks if check.quantity == ALONE]
    assert alone == (list(bundle.stages) if bundle.quantization else [])


def test_command_prints_a_table_and_returns_0(tiny: Tiny, fp32_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = min(tiny.frames.glob("*.jpg"))
    assert command("--bundle", fp32_bundle, "--ckpt", tiny.checkpoint, "--images", frame, "--threads", 1) == 0
    printed = capsys.readouterr().out
    assert "answers identical" in printed
    assert printed.endswith("fp32: 1 runs, 1 masks: parity\n")


@pytest.fixture
def damage(fp32_bundle: Path, tmp_path: Path) -> Callable[[str, str, float], Path]:
    """A copy of the FP32 bundle with one weight scaled, and the file's hash made to fit again."""

    def scaled(file: str, name: str, factor: float) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(fp32_bundle, folder)
        path = folder / file
        header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
        record = json.loads(path.read_bytes()[8 : 8 + header_bytes])[name]
        assert record["dtype"] == "F32"
        begin, end = (8 + header_bytes + offset for offset in record["data_offsets"])
        values = np.memmap(path, np.float32, "r+", offset=begin, shape=((end - begin) // 4,))
        values *= factor
        values.flush()
        bundle = Bundle.load(folder)
        files = {**bundle.files, file: msgspec.structs.replace(bundle.files[file], sha256=sha256_of(path))}
        (folder / BUNDLE_FILE).write_text(msgspec.structs.replace(bundle, files=files).to_json())
        return folder

    return scaled


@pytest.mark.parametrize("stage", ["vision_encoder", "language_model", "sam2_image_encoder", "sam2_mask_decoder"])
def test_a_changed_weight_fails_its_stage_alone(
    tiny: Tiny, fp32_bundle: Path, damage: Callable[[str, str, float], Path], stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = f"weights/{'projector' if stage == 'vision_encoder' else stage}.safetensors"
    # the largest matrix of the small mask decoder is one that hardly acts
    decoders = "sam2_mask_decoder.mask_decoder.output_hypernetworks_mlps.1.layers.1.weight"
    folder = damage(file, decoders if stage == "sam2_mask_decoder" else _largest_float(fp32_bundle / file), 1.02)
    frame = min(tiny.frames.glob("*.jpg"))
    assert command("--bundle", folder, "--ckpt", tiny.checkpoint, "--images", frame, "--threads", 1) == 1
    failed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if "FAILED" in line}
    assert failed & Bundle.load(folder).stages.keys() == {stage}


def _largest_float(path: Path) -> str:
    """The name of the largest F32 tensor of a safetensors file: a matrix that matters."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    floats = {name: record["data_offsets"] for name, record in header.items() if record.get("dtype") == "F32"}
    sizes = {name: end - begin for name, (begin, end) in floats.items()}
    return str(max(sizes, key=lambda name: int(sizes[name])))


@pytest.mark.parametrize(("precision", "passing"), [("fp32", [0]), ("fp16", [0, 1]), ("bf16", [0, 1, 2, 4])])
def test_one_pixel_of_a_small_mask_may_flip_where_rounding_flips_pixels(precision: str, passing: list[int]) -> None:
    """A mask of 100 pixels; without one of them its IoU is 0.99, which is below the limit of FP16."""
    theirs = np.zeros((1, 20, 20), np.bool_)
    theirs[0, :10, :10] = True
    expected = _Expected(Case("", drawn_samples()[0], "Where?"), (), theirs, np.zeros_like(theirs))
    passed = []
    for flipped in (0, 1, 2, 4, 5):
        ours = theirs[0].copy()
        ours.reshape(-1)[np.flatnonzero(ours)[:flipped]] = False
        mask = Mask(ours, 1.0, 1.0)
        result = Result("Where?", "", (), 0, 0, 0, 1, {}, (mask,))
        (overlap,) = (each for each in _compare_end_to_end(result, TOLERANCES[precision], expected) if each.quantity == "mask IoU")
        if overlap.limit is not None and overlap.measured >= overlap.limit:
            passed.append(flipped)
    assert passed == passing


def test_a_flipped_byte_is_no_matter_of_tolerance(tiny: Tiny, fp32_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flipped"
    shutil.copytree(fp32_bundle, folder)
    path = folder / "weights/projector.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BundleError, match="projector"):
        verify_bundle(VerifyRequest(folder, tiny.checkpoint))


def test_another_checkpoint_is_refused(tiny: Tiny, fp32_bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / tiny.checkpoint.name
    other.write_bytes(tiny.checkpoint.read_bytes() + b"\0")
    with pytest.raises(VesselError, match=re.escape(f"{fp32_bundle}: not made from {other}")):
        verify_bundle(VerifyRequest(fp32_bundle, other))


def check(measured: float, limit: float, *, at_least: bool = False) -> Check:
    return Check("stage", "quantity", measured, limit, at_least, None, "frame")


@pytest.mark.parametrize(("checks", "masks", "passed"), [
    ([check(1e-5, 1e-4)], 1, True),
    ([check(1e-3, 1e-4)], 1, False),
    ([check(float("nan"), 1e-4)], 1, False),
    ([check(1.0, 0.9999, at_least=True)], 1, True),
    ([check(0.9, 0.9999, at_least=True)], 1, False),
    ([check(1e-5, 1e-4)], 0, False),
])  # fmt: skip
def test_report_passes_only_when_all_does(checks: Sequence[Check], masks: int, passed: bool) -> None:
    report = Report("fp32", 1, masks, tuple(checks))
    assert report.passed == passed
    assert ("FAILED" in report.table()) != passed


def test_only_pixels_whose_logit_is_next_to_zero_may_fall_to_either_side() -> None:
    logits = np.full((2, 3, 4), 20.0, np.float32)
    logits[0, 0, 0], logits[0, 0, 1], logits[1] = -4e-7, 0.1, 0.0
    undecided = undecided_pixels(logits, 1e-4)
    assert np.argwhere(undecided[0]).tolist() == [[0, 0]]
    assert not undecided[1].any(), "a mask of zeros has no largest logit"
    assert not undecided_pixels(logits, 0.0).any()


def test_samples(tmp_path: Path) -> None:
    with pytest.raises(VesselError, match="no images"):
        read_samples([tmp_path])
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(VesselError, match=r"^image 1 of 1: not a JPG"):
        read_samples([tmp_path])
    with pytest.raises(VesselError, match=r"^image 1 of 1: no such file"):
        read_samples([tmp_path / "absent.png"])
    Image.new("LA", (5, 7)).save(tmp_path / "gray.png")
    (sample,) = read_samples([tmp_path / "gray.png"])
    assert sample.name == "image 1 of 1"
    assert sample.reference.mode == sample.runtime.mode == "RGB"
    assert {sample.reference.size for sample in drawn_samples()} == {(512, 512), (640, 480), (300, 300)}

"""Peaks are found where they were planted, exponents follow from them, and the bundle changes in nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from tests.support.paths import Tiny
from vessel_export.cli import main
from vessel_export.graphs.layers import DEFAULT_EXPONENT
from vessel_export.parity.exponents import apply, exponents_of, set_exponents
from vessel_export.parity.fp16_ranges import RangesRequest, measure, measure_and_apply
from vessel_export.parity.inputs import drawn_samples
from vessel_export.parity.ranges_report import LIMIT, RANGES_FILE, Ranges, exponent_for
from vessel_rt.errors import BundleError, VesselError
from vessel_rt.formats.bundle import BUNDLE_FILE, STAGES, Bundle
from vessel_rt.formats.engine_sidecar import ENGINES, SCHEMA, Engine
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.io.checked_files import sha256_of

QUESTION = "Please segment vessel in this image."


def command(*arguments: object) -> int:
    return main(["ranges", *map(str, arguments)])


@pytest.fixture(scope="module")
def ranges(planted_fp16: Path) -> Ranges:
    return measure(Bundle.load(planted_fp16), drawn_samples()[:1], QUESTION, threads=1)


@pytest.fixture
def bundle(planted_fp16: Path, tmp_path: Path) -> Bundle:
    """A copy that may be changed."""
    shutil.copytree(planted_fp16, tmp_path / "bundle")
    return Bundle.load(tmp_path / "bundle")


def _exponents(bundle: Bundle, stage: str) -> dict[str, int]:
    return exponents_of(ir.load(bundle.folder / bundle.stages[stage].file).graph)


@pytest.mark.parametrize(("peak", "exponent"), [(0.0, 0), (16376.0, 0), (16377.0, 1), (65504.0, 2), (2e5, 4), (4.2e6, 9)])
def test_the_smallest_exponent_that_leaves_room(peak: float, exponent: int) -> None:
    assert exponent_for(peak) == exponent
    assert peak / 2**exponent <= LIMIT / 4


def test_what_was_planted_is_found(ranges: Ranges) -> None:
    language_model, vision = ranges.stages["language_model"], ranges.stages["vision_encoder"]
    down = language_model.products["layers.0.mlp.down_proj"]
    assert down.input == pytest.approx(1e5, rel=0.02)
    assert down.output == pytest.approx(2e5, rel=0.02)
    assert language_model.fp32["residual.1"] == pytest.approx(2e5, rel=0.02)  # and there it stays
    assert vision.products["vision_model.layers.0.mlp.fc2"].output == pytest.approx(1e5, rel=0.05)
    assert language_model.fp16["layers.0.self_attn.q_proj.Cast"] == 300
    assert language_model.fp16["layers.0.self_attn.k_proj.Cast"] < 10  # the bias of 300 is taken from it
    asked = {name: product.exponent for stage in ranges.stages.values() for name, product in stage.products.items() if product.exponent}
    assert asked == {"vision_model.layers.0.mlp.fc2": 3, "layers.0.mlp.down_proj": 4}
    assert not any(stage.beyond for stage in ranges.stages.values())


def test_every_value_is_measured(ranges: Ranges) -> None:
    """Of one layer of each built graph, everything between two products; of the traced graphs, something everywhere."""
    measured = {stage: {*peaks.fp16, *peaks.products} for stage, peaks in ranges.stages.items()}
    attention, mlp = "layers.1.self_attn.", "layers.1.mlp."
    assert {f"{attention}{name}" for name in ("Attention.q", "Attention.k", "Attention.v", "Attention.logits", "o_proj")} <= measured[
        "language_model"
    ]
    assert {f"{attention}{name}" for name in ("q_proj.Cast", "k_proj.Cast", "v_proj.Add")} <= measured["language_model"]
    assert {f"{mlp}{name}" for name in ("gate_proj.MatMul", "up_proj.MatMul", "Mul", "down_proj")} <= measured["language_model"]
    assert {"layers.1.input_layernorm.Cast", "lm_head.MatMul"} <= measured["language_model"]
    assert {"vision_model.layers.1.attn.Attention.logits", "projector.Gelu"} <= measured["vision_encoder"]
    assert "image_encoder.trunk.blocks.1.attn.qkv.Add" in measured["sam2_image_encoder"]
    assert "mask_decoder.transformer.layers.1.norm2.LayerNormalization" in measured["sam2_mask_decoder"]
    assert all(peak > 0 for stage in ranges.stages.values() for peak in stage.fp16.values())


def test_a_quantized_bundle_is_measured_as_well(planted_fp16_int8: Path, ranges: Ranges, tmp_path: Path) -> None:
    found = measure(Bundle.load(planted_fp16_int8), drawn_samples()[:1], QUESTION, threads=1)
    for stage, measured in ranges.stages.items():
        assert found.stages[stage].fp16.keys() == measured.fp16.keys(), "dequantized matrices are not activations"
        for name, product in measured.products.items():
            assert found.stages[stage].products[name].output == pytest.approx(product.output, rel=0.1)
    copy = Path(shutil.copytree(planted_fp16_int8, tmp_path / "bundle"))
    assert apply(Bundle.load(copy), found) == ("vision_encoder", "language_model")
    Bundle.load(copy).verify_files()
    assert Bundle.load(copy).quantization == Bundle.load(planted_fp16_int8).quantization


def test_the_exponents_that_a_graph_has_do_not_count(bundle: Bundle, ranges: Ranges) -> None:
    """Peaks are the model's: measured again with other exponents, they are the same."""
    apply(bundle, ranges)
    again = measure(Bundle.load(bundle.folder), drawn_samples()[:1], QUESTION, threads=1)
    for stage, peaks in ranges.stages.items():
        for name, product in peaks.products.items():
            other = again.stages[stage].products[name]
            assert (other.input, other.output) == pytest.approx((product.input, product.output), rel=1e-5)
            assert other.exponent == product.exponent


def test_applying_changes_two_graphs_and_nothing_else(bundle: Bundle, ranges: Ranges) -> None:
    inodes = {name: (bundle.folder / name).stat().st_ino for name in bundle.files}
    assert apply(bundle, ranges) == ("vision_encoder", "language_model")
    changed = Bundle.load(bundle.folder)
    changed.verify_files()
    differing = {name for name in changed.files if changed.files[name] != bundle.files.get(name)}
    assert differing == {RANGES_FILE, "vision_encoder.onnx", "language_model.onnx"}
    assert all((changed.folder / name).stat().st_ino == inodes[name] for name in changed.files.keys() - differing)
    assert _exponents(changed, "language_model") == {
        name: product.exponent for name, product in ranges.stages["language_model"].products.items()
    }
    assert msgspec.structs.replace(changed, files=bundle.files, sha256=bundle.sha256) == bundle
    assert {path.name for path in changed.folder.parent.iterdir()} == {"bundle"}
    document = json.loads((changed.folder / RANGES_FILE).read_text(encoding="utf-8"))
    assert document["stages"]["language_model"]["products"]["layers.0.mlp.down_proj"]["exponent"] == 4


def test_applying_again_changes_no_graph(bundle: Bundle, ranges: Ranges) -> None:
    apply(bundle, ranges)
    once = Bundle.load(bundle.folder)
    assert apply(once, ranges) == ()
    assert Bundle.load(bundle.folder).files == once.files


def test_a_graph_differs_in_its_scalars_alone(bundle: Bundle, ranges: Ranges) -> None:
    """Given the exporter's exponents again, it is the exporter's file to the byte."""
    file = bundle.folder / "language_model.onnx"
    original = file.read_bytes()
    apply(bundle, ranges)
    assert file.read_bytes() != original
    model = ir.load(file)
    set_exponents(model.graph, dict.fromkeys(exponents_of(model.graph), DEFAULT_EXPONENT))
    ir.save(model, file)
    assert file.read_bytes() == original


def test_engines_of_changed_graphs_are_left_out(bundle: Bundle, ranges: Ranges) -> None:
    folder = bundle.folder / ENGINES / "rtx-sm86"
    folder.mkdir(parents=True)
    for stage in STAGES:
        (folder / f"{stage}.onnx").write_bytes(b"compiled")
        sources = {f"{stage}.onnx": bundle.files[f"{stage}.onnx"].sha256}
        record = FileRecord(8, sha256_of(folder / f"{stage}.onnx"))
        engine = Engine(
            schema=SCHEMA,
            stage=stage,
            builder="rtx",
            architecture="sm86",
            gpu="a GPU",
            precision="fp16",
            files={f"{stage}.onnx": record},
            sources=sources,
            profile={},
            versions={"rtx": "1", "onnxruntime": "1"},
        )
        (folder / f"{stage}.json").write_text(engine.to_json(), encoding="utf-8")
    apply(bundle, ranges)
    assert {path.stem for path in folder.glob("*.json")} == {"sam2_image_encoder", "sam2_mask_decoder"}


def test_command_on_a_trained_model(tiny: Tiny, fp16_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(fp16_bundle, tmp_path / "bundle")
    assert command("--bundle", tmp_path / "bundle", "--images", min(tiny.frames.glob("*.jpg")), "--threads", 1) == 0
    printed = capsys.readouterr().out
    assert "layers.*.mlp.down_proj (scaled)" in printed
    assert printed.endswith("peaks over 1 images; exponents changed in: vision_encoder, language_model\n")
    assert command("--bundle", tmp_path / "bundle", "--images", min(tiny.frames.glob("*.jpg")), "--threads", 1) == 0
    assert capsys.readouterr().out.endswith("exponents changed in: no graph\n")


def _set_bias(bundle: Bundle, name: str, value: float) -> None:
    """Change one FP16 tensor of language_model, and its file's hash with it."""
    file = "weights/language_model.safetensors"
    content = bytearray((bundle.folder / file).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    begin, end = (start + offset for offset in json.loads(content[8:start])[name]["data_offsets"])
    content[begin:end] = np.full((end - begin) // 2, value, np.float16).tobytes()
    (bundle.folder / file).write_bytes(content)
    files = {**bundle.files, file: FileRecord(len(content), sha256_of(bundle.folder / file))}
    (bundle.folder / BUNDLE_FILE).write_text(msgspec.structs.replace(bundle, files=files).to_json(), encoding="utf-8")


def test_what_fp16_cannot_hold_is_named(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    _set_bias(bundle, "layers.1.self_attn.v_proj.bias", 2e4)
    assert command("--bundle", bundle.folder, "--threads", 1) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "language_model layers.1.self_attn.v_proj.Add 2" in error
    assert error.endswith("export it with --precision bf16")
    beyond = json.loads((bundle.folder / RANGES_FILE).read_text(encoding="utf-8"))["stages"]["language_model"]["fp16"]
    assert beyond["layers.1.self_attn.v_proj.Add"] > LIMIT / 4


def test_a_model_that_is_not_finite_even_in_fp32(bundle: Bundle) -> None:
    _set_bias(bundle, "layers.1.self_attn.v_proj.bias", float("nan"))
    with pytest.raises(VesselError, match=r"language_model.onnx: layers.1.self_attn.\S+ is not finite even in FP32"):
        measure_and_apply(RangesRequest(bundle.folder, threads=1))
    assert not (bundle.folder / RANGES_FILE).exists()


def test_only_fp16_is_measured(small_fp32: Path) -> None:
    with pytest.raises(VesselError, match=re.escape(f"{small_fp32}: is fp32")):
        measure_and_apply(RangesRequest(small_fp32))


def test_a_damaged_bundle_is_refused(bundle: Bundle) -> None:
    (bundle.folder / "vision_encoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"vision_encoder\.onnx is missing"):
        measure_and_apply(RangesRequest(bundle.folder))

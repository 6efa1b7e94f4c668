from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.support.frames import make_frame
from vessel_rt.cli import main
from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle import BUNDLE_FILE, SCHEMA, Bundle, BundleFile, named_and_unchecked
from vessel_rt.formats.schema import decode, parse_json
from vessel_rt.io.checked_files import sha256_of


@pytest.fixture
def copy(standin: Bundle, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return Path(shutil.copytree(standin.folder, tmp_path / "bundle"))


def _rewrite(folder: Path, **changes: Any) -> None:
    path = folder / BUNDLE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_reads_what_was_written(standin: Bundle) -> None:
    assert Bundle.load(standin.folder) == standin
    assert standin.stages["language_model"].input_dtype("position_ids") == np.int64


def test_verify_accepts_an_intact_bundle_and_reports_every_byte(standin: Bundle) -> None:
    read: list[int] = []
    standin.verify_files(read.append)
    assert sum(read) == sum(record.bytes for record in standin.files.values())


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle here"):
        Bundle.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"{",
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"schema":' * 100_000,
        b'{"schema": ' + b"1" * 5000 + b"}",
        b'{"schema": 1, "schema": 1}',
        b'{"schema": NaN}',
    ],
)
def test_not_a_description(copy: Path, content: bytes) -> None:
    (copy / BUNDLE_FILE).write_bytes(content)
    with pytest.raises(BundleError, match=rf"\A.*{BUNDLE_FILE}.+\Z"):
        Bundle.load(copy)


def test_a_description_is_a_regular_file_of_bounded_size(copy: Path) -> None:
    with (copy / BUNDLE_FILE).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match="larger than"):
        Bundle.load(copy)
    (copy / BUNDLE_FILE).unlink()
    os.mkfifo(copy / BUNDLE_FILE)
    with pytest.raises(BundleError, match="FIFO"):
        Bundle.load(copy)


def test_newer_schema(copy: Path) -> None:
    _rewrite(copy, schema=SCHEMA + 1)
    with pytest.raises(BundleError, match=f"schema {SCHEMA + 1} is newer.*upgrade vessel-rt"):
        Bundle.load(copy)


@pytest.mark.parametrize("schema", ["1", 0, -1, True, 1.0, None, [1]])
def test_a_schema_is_a_number_from_1_on(copy: Path, schema: Any) -> None:
    _rewrite(copy, schema=schema)
    with pytest.raises(BundleError, match="schema"):
        Bundle.load(copy)


@pytest.mark.parametrize("changes", [{"tiles": None}, {"precision": 16}, {"mask": {"size": 1}}, {"files": []}])
def test_wrong_kind(copy: Path, changes: dict[str, Any]) -> None:
    _rewrite(copy, **changes)
    with pytest.raises(BundleError, match="damaged"):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("tiles.max_tiles", 10**7, "tiles.max_tiles"),
        ("tiles.max_tiles", 1024, "tiles.max_tiles"),
        ("tiles.max_tiles", 10**4000, "tiles.max_tiles"),
        ("tiles.min_tiles", 13, "tiles.min_tiles"),
        ("tiles.min_tiles", -1, "tiles.min_tiles"),
        ("tiles.size", 0, "tiles.size"),
        ("tiles.size", 224, "vision_encoder"),
        ("tiles.std.1", 0.0, "tiles.std[1]"),
        ("tiles.mean.0", 1e300, "tiles.mean[0]"),
        ("tiles.tokens_per_tile", 5, "vision_encoder"),
        ("mask.size", 10**6, "mask.size"),
        ("mask.size", 128, "sam2_image_encoder"),
        ("mask.low_res_size", 8, "sam2_mask_decoder"),
        ("language_model.capacity", 10**9, "language_model.capacity"),
        ("language_model.capacity", 255, "language_model"),
        ("language_model.max_new_tokens", 256, "max_new_tokens"),
        ("language_model.layers", 1000, "language_model"),
        ("language_model.kv_heads", 8, "language_model"),
        ("language_model.hidden_size", 128, "vision_encoder"),
        ("language_model.vocabulary", 3, "vocabulary"),
        ("prompt.seg_token_id", 10**5, "token 100000"),
        ("prompt.stop_token_ids", [10**5], "token 100000"),
        ("prompt.stop_token_ids", [-1], "prompt.stop_token_ids[0]"),
        ("prompt.prefix", "\0", "prompt.prefix"),
        ("prompt.prefix", "\ud800", "prompt.prefix"),
        ("prompt.prefix", "x" * 10**6, "prompt.prefix"),
        ("prompt.answers", ["x"] * 10**5, "prompt.answers"),
        ("prompt.tokenizer", "../tokenizer.json", "prompt.tokenizer"),
        ("prompt.tokenizer", "/etc/passwd", "prompt.tokenizer"),
        ("embed_tokens.file", "weights/../../x", "embed_tokens.file"),
        ("stages.vision_encoder.file", "../x.onnx", "stages.vision_encoder.file"),
        ("stages.vision_encoder.file", "x\0.onnx", "stages.vision_encoder.file"),
        ("stages.vision_encoder.inputs", [], "stages.vision_encoder"),
        ("stages.vision_encoder.inputs.0.name", "pixels", "stages.vision_encoder"),
        ("stages.vision_encoder.inputs.0.dtype", "object", "stages.vision_encoder"),
        ("stages.vision_encoder.inputs.0.shape", ["tiles", 3, 448, 449], "stages.vision_encoder"),
        ("stages.vision_encoder.inputs.0.shape.0", "batch", "stages.vision_encoder"),
        ("stages.language_model.inputs.5.dtype", "int64", "stages.language_model"),
        ("stages.sam2_mask_decoder.inputs.0.shape.1", 5, "stages.sam2_mask_decoder"),
        ("stages.more", {"file": "x.onnx", "inputs": [], "outputs": []}, "more"),
        ("files.tokenizer|json.bytes", -1, "files.tokenizer.json.bytes"),
        ("files.||/x", {"bytes": 1, "sha256": ""}, "../x"),
        ("precision", "fp8", "precision"),
        ("quantization", {"weights": "int3", "matrices": {}, "kept": {}}, "quantization.weights is 'int3'"),
        ("quantization", {"weights": "int8", "matrices": {"more": {}}, "kept": {}}, "unknown stage 'more'"),
        ("quantization", {"weights": "int8", "matrices": {"language_model": {"w": 0}}, "kept": {}}, "quantization.matrices"),
        ("provenance.lora_alpha", 1e308 * 10, "Infinity"),
        ("provenance.iteration", True, "provenance.iteration"),
        ("more", 1, "unknown key more"),
        ("folder", "/tmp", "unknown key folder"),
        ("sha256", "0", "unknown key sha256"),
    ],
)
def test_what_cannot_be_run_is_named_in_one_line(copy: Path, place: str, value: Any, named: str) -> None:
    """`place`: keys and indices, joined by dots; a dot in a key is `|`."""
    document = inner = json.loads((copy / BUNDLE_FILE).read_text())
    *path, last = [key.replace("|", ".") for key in place.split(".")]
    for key in path:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[int(last) if isinstance(inner, list) else last] = value
    (copy / BUNDLE_FILE).write_text(json.dumps(document))
    with pytest.raises(BundleError) as caught:
        Bundle.load(copy)
    assert BUNDLE_FILE in str(caught.value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(copy))


def test_missing_stage(copy: Path, standin: Bundle) -> None:
    stages = json.loads((copy / BUNDLE_FILE).read_text())["stages"]
    del stages["sam2_mask_decoder"]
    _rewrite(copy, stages=stages)
    with pytest.raises(BundleError, match="lack sam2_mask_decoder"):
        Bundle.load(copy)


def test_flipped_byte_missing_file_and_cut_file_are_all_named(copy: Path) -> None:
    weights = copy / "weights" / "embed_tokens.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (copy / "tokenizer.json").unlink()
    graph = copy / "vision_encoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(BundleError) as caught:
        Bundle.load(copy).verify_files()
    for text in ("embed_tokens.safetensors was changed", "tokenizer.json is missing", "vision_encoder.onnx has"):
        assert text in str(caught.value)


def test_a_file_that_is_used_must_have_a_hash(copy: Path) -> None:
    files = json.loads((copy / BUNDLE_FILE).read_text())["files"]
    del files["language_model.onnx"]
    _rewrite(copy, files=files)
    with pytest.raises(BundleError, match=r"language_model.onnx has no recorded SHA-256"):
        Bundle.load(copy).verify_files()


def test_a_field_that_is_new_and_has_a_default_leaves_older_bundles_whole(copy: Path) -> None:
    class Newer(BundleFile, frozen=True, kw_only=True):
        comment: str = ""

    assert decode(parse_json((copy / BUNDLE_FILE).read_bytes()), Newer, SCHEMA).comment == ""


def outside(name: str, location: str) -> onnx.TensorProto:
    """A tensor of four floats in another file."""
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def point_to(folder: Path, location: str) -> None:
    """Have a graph name a file, and bundle.json vouch for the graph."""
    path = folder / "vision_encoder.onnx"
    model = onnx.load(path)
    model.graph.initializer.append(outside("more", location))
    path.write_bytes(model.SerializeToString())
    files = json.loads((folder / BUNDLE_FILE).read_text())["files"]
    files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    _rewrite(folder, files=files)


@pytest.mark.parametrize(
    "location", ["weights/unlisted.bin", "../outside.bin", "/etc/hostname", "*/_ORT_MEM_ADDR_/*", "", ".", "bundle.json"]
)
def test_a_graph_may_name_only_files_that_are_hashed(copy: Path, location: str) -> None:
    for path in (copy / "weights" / "unlisted.bin", copy.parent / "outside.bin"):
        path.write_bytes(bytes(16))
    point_to(copy, location)
    with pytest.raises(BundleError, match=r"\A.*vision_encoder\.onnx names .* no recorded SHA-256.*\Z"):
        Bundle.load(copy).verify_files()


def test_a_graph_may_name_what_is_hashed(copy: Path) -> None:
    point_to(copy, "weights/embed_tokens.safetensors")
    Bundle.load(copy).verify_files()


def test_a_graph_that_is_none(copy: Path) -> None:
    path = copy / "vision_encoder.onnx"
    path.write_bytes(b"ORTM" * 100)
    files = json.loads((copy / BUNDLE_FILE).read_text())["files"]
    _rewrite(copy, files=files | {path.name: {"bytes": 400, "sha256": sha256_of(path)}})
    with pytest.raises(BundleError, match=r"vision_encoder\.onnx is not an ONNX graph"):
        Bundle.load(copy).verify_files()


def test_a_record_that_is_taken_out_of_bundle_json_takes_its_file_out_of_use(fp32_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fp32_bundle, tmp_path / "bundle"))
    document = json.loads((folder / BUNDLE_FILE).read_text())
    files, stages = document["files"], document["stages"]
    del files["weights/vision_model.safetensors"]
    _rewrite(folder, files=files)
    with pytest.raises(BundleError, match=r"bundle\.json.*stages\.vision_encoder.*'weights/vision_model\.safetensors'"):
        Bundle.load(folder)
    stages["vision_encoder"]["weights"] = []
    _rewrite(folder, stages=stages)
    with pytest.raises(BundleError, match=r"vision_encoder\.onnx names 'weights/vision_model\.safetensors', which has no recorded SHA-256"):
        Bundle.load(folder).verify_files()


@pytest.mark.parametrize("place", ["weights", "tokenizer.json"])
def test_symbolic_links_are_not_followed(copy: Path, place: str) -> None:
    (copy / place).rename(copy.parent / "moved")
    (copy / place).symlink_to(copy.parent / "moved")
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.load(copy).verify_files()


def test_a_bundle_may_itself_be_reached_by_a_symbolic_link_and_its_files_be_hard_links(copy: Path) -> None:
    os.link(copy / "tokenizer.json", copy.parent / "tokenizer.json")
    (copy.parent / "link").symlink_to(copy)
    Bundle.load(copy.parent / "link").verify_files()


def test_a_file_that_is_no_file(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    os.mkfifo(copy / "tokenizer.json")
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read \(a FIFO"):
        Bundle.load(copy).verify_files()


@pytest.mark.parametrize(
    "command", [["infer", "frame.png", "--device", "cpu", "-o", "out", "--bundle"], ["devices", "--bundle"], ["plan", "--bundle"]]
)
def test_every_command_ends_with_one_line(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_frame().save("frame.png")
    (copy / BUNDLE_FILE).write_bytes(b"[" * 100_000)
    assert main([*command, str(copy)]) == 1
    said = capsys.readouterr().err
    assert BUNDLE_FILE in said
    assert said.count("\n") == 1


def test_the_name_of_a_graph_that_was_compiled_from_memory_is_no_file(tmp_path: Path) -> None:
    """TensorRT-RTX writes it into every engine's node; a file of that name would be one that nobody has hashed."""
    node = helper.make_node("EPContext", [], ["y"], domain="com.microsoft", onnx_model_filename="virtual_model.onnx")
    graph = helper.make_graph([node], "engine", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    onnx.save(helper.make_model(graph), tmp_path / "stage.onnx")
    assert named_and_unchecked(tmp_path, ["stage.onnx"], {}) == ()
    (tmp_path / "virtual_model.onnx").write_bytes(b"")
    assert len(named_and_unchecked(tmp_path, ["stage.onnx"], {})) == 1

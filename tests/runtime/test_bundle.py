from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vessel_rt.bundle import BUNDLE_FILE, SCHEMA, Bundle
from vessel_rt.errors import BundleError


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


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"{", b"\xff\xfe\x00"])
def test_not_a_description(copy: Path, content: bytes) -> None:
    (copy / BUNDLE_FILE).write_bytes(content)
    with pytest.raises(BundleError, match=BUNDLE_FILE):
        Bundle.load(copy)


def test_newer_schema(copy: Path) -> None:
    _rewrite(copy, schema=SCHEMA + 1)
    with pytest.raises(BundleError, match=f"schema {SCHEMA + 1} is newer.*upgrade vessel-rt"):
        Bundle.load(copy)


@pytest.mark.parametrize("changes", [{"tiles": None}, {"precision": 16}, {"mask": {"size": 1}}, {"files": []}])
def test_wrong_kind(copy: Path, changes: dict[str, Any]) -> None:
    _rewrite(copy, **changes)
    with pytest.raises(BundleError, match="damaged"):
        Bundle.load(copy)


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

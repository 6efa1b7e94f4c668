from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.engine_files import TARGET, wrapper, write_engines
from vessel_rt.errors import EngineError
from vessel_rt.formats.bundle import BUNDLE_FILE, STAGES, Bundle
from vessel_rt.formats.engine_sidecar import Engine, EngineSet, Target, builder_version
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.io.checked_files import sha256_of

POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")


@pytest.fixture
def bundle(standin: Bundle, tmp_path: Path) -> Bundle:
    """A bundle with engines, which may be damaged."""
    copy = Bundle.load(Path(shutil.copytree(standin.folder, tmp_path / "bundle")))
    write_engines(copy)
    return copy


def folder_of(bundle: Bundle) -> Path:
    return TARGET.folder(bundle)


def rewrite(path: Path, change: Callable[[Engine], Engine]) -> None:
    path.write_text(change(Engine.load(path)).to_json())


def test_reads_what_was_written(bundle: Bundle) -> None:
    path = folder_of(bundle) / "vision_encoder.json"
    engine = Engine.load(path)
    assert engine.stage == "vision_encoder"
    assert engine.to_json() == path.read_text()


def test_engines_that_agree_with_everything_are_accepted_and_every_byte_is_read(bundle: Bundle) -> None:
    engines, read = EngineSet.open(bundle, TARGET), list[int]()
    engines.verify(read.append)
    assert engines.engines.keys() == set(STAGES)
    assert sum(read) == sum(record.bytes for record in engines.files.values()) > 0


def test_the_driver_and_onnxruntime_are_only_recorded(bundle: Bundle) -> None:
    for stage in STAGES:
        rewrite(
            folder_of(bundle) / f"{stage}.json",
            lambda engine: replace(engine, versions={**engine.versions, "onnxruntime": "1.99", "driver": "999.1"}),
        )
    EngineSet.open(bundle, TARGET).verify()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1}', '{"schema": 2}', '{"schema": 1, "stage": 3}', "\x00"])
def test_a_sidecar_that_is_none(bundle: Bundle, content: str) -> None:
    path = folder_of(bundle) / "vision_encoder.json"
    path.write_text(content)
    with pytest.raises(EngineError, match=r"vision_encoder\.json: not an engine's description .*--rebuild"):
        EngineSet.open(bundle, TARGET)


def test_no_engines_for_this_gpu(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match=r"rtx-sm89: no engine of vision_encoder, .*; vessel-export build --bundle .* makes them"):
        EngineSet.open(bundle, Target("rtx", "sm89", "1.7.1"))


def test_a_stage_without_an_engine_is_named(bundle: Bundle) -> None:
    (folder_of(bundle) / "language_model.json").unlink()
    with pytest.raises(EngineError, match=r"rtx-sm86: no engine of language_model; "):
        EngineSet.open(bundle, TARGET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "sm89"}, "vision_encoder: it was built by rtx for sm89, not by rtx for sm86"),
        ({"builder": "tensorrt"}, "vision_encoder: it was built by tensorrt for sm86"),
        ({"versions": {"rtx": "1.6.0"}}, "vision_encoder: it was built by rtx 1.6.0, and 1.7.1 is installed"),
        ({"versions": {}}, "vision_encoder: it was built by rtx None"),
        ({"sources": {}}, "vision_encoder: it was not built from vision_encoder.onnx"),
        ({"sources": {"vision_encoder.onnx": "0" * 64}}, "vision_encoder: it was built from another vision_encoder.onnx"),
        ({"stage": "language_model"}, "vision_encoder: it is the engine of language_model"),
        ({"files": {}}, "vision_encoder: vision_encoder.onnx is not of its files"),
    ],
)
def test_an_engine_of_something_else_is_named(bundle: Bundle, change: dict[str, object], message: str) -> None:
    rewrite(folder_of(bundle) / "vision_encoder.json", lambda engine: replace(engine, **change))  # type: ignore[arg-type]
    with pytest.raises(EngineError) as caught:
        EngineSet.open(bundle, TARGET)
    assert message in str(caught.value)
    assert f"vessel-export build --bundle {bundle.folder} --rebuild" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_engines_of_another_bundle(bundle: Bundle) -> None:
    """Moved into a bundle whose weights differ: another checkpoint's."""
    document = json.loads((bundle.folder / BUNDLE_FILE).read_text())
    document["files"]["language_model.onnx"]["sha256"] = "f" * 64
    (bundle.folder / BUNDLE_FILE).write_text(json.dumps(document))
    with pytest.raises(EngineError, match=r"language_model: it was built from another language_model\.onnx"):
        EngineSet.open(Bundle.load(bundle.folder), TARGET)


def test_a_flipped_byte(bundle: Bundle) -> None:
    path = folder_of(bundle) / "sam2_mask_decoder_0.engine"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    engines = EngineSet.open(bundle, TARGET)
    with pytest.raises(
        EngineError, match=r"sam2_mask_decoder_0\.engine was changed \(its SHA-256 differs\); vessel-export build .* --rebuild"
    ):
        engines.verify()


def test_missing_and_cut_files_are_all_named(bundle: Bundle) -> None:
    (folder_of(bundle) / "vision_encoder_0.engine").unlink()
    (folder_of(bundle) / "language_model_0.engine").write_text("short")
    with pytest.raises(EngineError) as caught:
        EngineSet.open(bundle, TARGET)
    assert "vision_encoder: vision_encoder_0.engine is missing" in str(caught.value)
    assert "language_model: language_model_0.engine has 5 bytes, not" in str(caught.value)


@POSIX
@pytest.mark.parametrize("name", ["vision_encoder_0.engine", "vision_encoder.onnx", "vision_encoder.json", "."])
def test_what_anyone_may_write_is_refused(bundle: Bundle, name: str) -> None:
    path = (folder_of(bundle) / name).resolve()
    path.chmod(path.stat().st_mode | 0o002)
    with pytest.raises(EngineError, match=rf"{path.name} may be written by anyone \(chmod o-w mends it\)"):
        EngineSet.open(bundle, TARGET)


def test_files_outside_the_folder_are_refused(bundle: Bundle) -> None:
    def change(engine: Engine) -> Engine:
        return replace(engine, files={**engine.files, "../../tokenizer.json": engine.files["vision_encoder.onnx"]})

    rewrite(folder_of(bundle) / "vision_encoder.json", change)
    with pytest.raises(EngineError, match=r"vision_encoder\.json: .*\.\./\.\./tokenizer\.json"):
        EngineSet.open(bundle, TARGET)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"schema": true}', b'{"schema": 1, "schema": 1}', b"\xef\xbb\xbf{}", b'{"schema": ' + b"1" * 5000 + b"}"]
)
def test_a_hostile_sidecar_is_one_line(bundle: Bundle, content: bytes) -> None:
    (folder_of(bundle) / "vision_encoder.json").write_bytes(content)
    with pytest.raises(EngineError, match=r"\A.*vision_encoder\.json: .+\Z"):
        EngineSet.open(bundle, TARGET)


@pytest.mark.parametrize(
    "profile", [{}, {"pixel_values": "1"}, {"pixel_values": "1x3x8x8, 1x3x8x8, 9999999x3x8x8"}, {"pixel_values": "x, x, 0x3x8x8"}]
)
def test_engines_without_sound_shapes_are_named(bundle: Bundle, profile: dict[str, str]) -> None:
    rewrite(folder_of(bundle) / "sam2_image_encoder.json", lambda engine: replace(engine, profile=profile))
    with pytest.raises(EngineError, match=r"sam2_image_encoder\.json"):
        _ = EngineSet.open(bundle, TARGET).max_batch


@pytest.mark.parametrize("name", ["other.engine", "../../tokenizer.json", "vision_encoder.json"])
def test_an_engines_graph_may_name_only_files_of_the_engine(bundle: Bundle, name: str) -> None:
    path = folder_of(bundle) / "vision_encoder.onnx"
    (folder_of(bundle) / "other.engine").write_bytes(b"code")
    path.write_bytes(wrapper(name))
    record = FileRecord(path.stat().st_size, sha256_of(path))
    rewrite(
        folder_of(bundle) / "vision_encoder.json",
        lambda engine: replace(engine, files={**engine.files, path.name: record}),
    )
    with pytest.raises(EngineError, match=rf"vision_encoder\.onnx names '{name}'"):
        EngineSet.open(bundle, TARGET).verify()


@POSIX
def test_engines_behind_a_symbolic_link_are_not_read(bundle: Bundle, tmp_path: Path) -> None:
    folder_of(bundle).rename(tmp_path / "elsewhere")
    folder_of(bundle).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="symbolic link"):
        EngineSet.open(bundle, TARGET).verify()


def test_the_version_is_the_librarys_own() -> None:
    pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx")
    version = builder_version("rtx")
    assert version is not None
    assert version.startswith("1.")
    assert version.count(".") == 2

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.conftest import make_frame
from tests.runtime.engine_files import write_engines
from vessel_rt.bundle import BUNDLE_FILE, Bundle, sha256_of
from vessel_rt.engine import Target
from vessel_rt.errors import BundleError, VesselError
from vessel_rt.folder import InferOptions, find_images, infer
from vessel_rt.session import Device


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def options(inputs: Path | str, output: Path, question: str = "Please segment vessel in this image.", **more: Any) -> InferOptions:
    return InferOptions((str(inputs),), output, question, threads=1, **more)


def test_a_folder_is_sorted_and_not_descended(frames: Path) -> None:
    (frames / "deeper").mkdir()
    for name in ("notes.txt", ".hidden.png", "deeper/d.png", "Z.TIFF"):
        (frames / name).write_bytes(b"")
    assert names(find_images([str(frames)])) == ["Z.TIFF", "a.jpg", "b.png", "c.tif"]
    assert names(find_images([str(frames)], num_images=2)) == ["Z.TIFF", "a.jpg"]


def test_files_and_globs_are_joined_and_each_is_taken_once(frames: Path) -> None:
    (frames / "plain").write_bytes(b"")
    inputs = [str(frames / "c.tif"), str(frames / "plain"), str(frames / "*"), str(frames), str(frames / ".." / "frames" / "a.jpg")]
    assert names(find_images(inputs)) == ["c.tif", "plain", "a.jpg", "b.png"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(frames: Path) -> None:
    shutil.copy(frames / "b.png", frames / "x[1].png")
    assert names(find_images([str(frames / "x[1].png")])) == ["x[1].png"]


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(VesselError, match="this folder holds no image"):
        find_images([str(tmp_path / "empty")])
    with pytest.raises(VesselError, match="this pattern holds no image"):
        find_images([str(tmp_path / "*.png")])
    with pytest.raises(VesselError, match="no such file or folder"):
        find_images([str(tmp_path / "none.png")])


def test_a_run(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    summary = infer(standin, options(frames, tmp_path / "out"))
    assert (summary.images, summary.failed, summary.masks, summary.without_mask) == (3, 0, 3, 0)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["counts"] == {"images": 3, "ok": 3, "failed": 0, "masks": 3, "without_mask": 0}
    assert run["bundle"]["sha256"] == sha256_of(standin.folder / BUNDLE_FILE)
    assert run["device"] == "cpu"
    assert run["options"]["question"] == "Please segment vessel in this image."
    assert run["peak_memory_bytes"] is None or run["peak_memory_bytes"] > 1 << 24
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == ["a.jpg", "b.png", "c.tif"]
    assert "read" in lines[0]["ms"]


def test_good_images_are_finished_though_others_fail(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    (frames / "aa_text.jpg").write_text("This is not an image.")
    (frames / "ab_half.jpg").write_bytes((frames / "a.jpg").read_bytes()[:1500])
    (frames / "ac_empty.png").write_bytes(b"")
    summary = infer(standin, options(frames, tmp_path / "out"))
    assert (summary.images, summary.failed, summary.masks) == (6, 3, 3)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok", "error", "error", "error", "ok", "ok"]
    for line, message in zip(lines[1:4], ["not a JPG", "cannot be decoded", "an empty file"], strict=True):
        assert str(frames / line["image"]) in line["error"]
        assert message in line["error"]


def test_an_image_that_the_model_cannot_take_is_named(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    make_frame(1344, 1344).save(frames / "b_large.png")
    question = "x" * 180  # with one tile's tokens it fits, with ten tiles' it does not
    summary = infer(standin, options(frames, tmp_path / "out", question))
    assert (summary.images, summary.failed) == (4, 1)
    error = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[2])["error"]
    assert error.startswith(f"{frames / 'b_large.png'}: its prompt has")


def test_nothing_is_touched_when_the_run_cannot_begin(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    infer(standin, options(frames, out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(VesselError, match="question is empty"):
        infer(standin, options(frames, out, question=" ", overwrite=True))
    with pytest.raises(VesselError, match="--overwrite"):
        infer(standin, options(frames, out))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_engines_that_auto_passes_over_are_mentioned(
    standin: Bundle, frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.load(Path(shutil.copytree(standin.folder, tmp_path / "bundle")))
    infer(bundle, options(frames / "a.jpg", tmp_path / "one", device=Device("cpu")))
    assert "engines" not in capsys.readouterr().err
    write_engines(bundle, Target("rtx", "sm00", "0.0.0"))  # for no GPU that there is
    infer(bundle, options(frames / "a.jpg", tmp_path / "two"))
    assert f"the bundle's engines are not used (vessel-rt devices --bundle {bundle.folder} says why)" in capsys.readouterr().err


def test_a_damaged_bundle_is_refused(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(standin.folder, tmp_path / "bundle")
    graph = folder / "sam2_mask_decoder.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(BundleError, match=r"sam2_mask_decoder\.onnx was changed"):
        infer(Bundle.load(folder), options(frames, tmp_path / "out"))
    assert not (tmp_path / "out").exists()

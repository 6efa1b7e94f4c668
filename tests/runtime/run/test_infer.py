from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from PIL import Image

from tests.support.engine_files import write_engines
from tests.support.frames import CODES, make_frame
from tests.support.runs import ONE_TILE, files, lines, many, options, same_results
from tests.support.standin_gpu import StandinGpu, cuda_failure, out_of_memory
from vessel_rt.device.providers import PROVIDERS, Device
from vessel_rt.device.session import Session
from vessel_rt.errors import BundleError, DeviceError, OutOfMemory, VesselError
from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle
from vessel_rt.formats.engine_sidecar import Target
from vessel_rt.inputs.frames import Naming, Selection
from vessel_rt.inputs.pseudonyms import StudyCodes
from vessel_rt.io.checked_files import sha256_of
from vessel_rt.model.segmenter import Segmenter
from vessel_rt.run.infer import infer


def test_a_run(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    summary = infer(standin, options(frames, tmp_path / "out"))
    assert (summary.images, summary.failed, summary.masks, summary.without_mask) == (3, 0, 3, 0)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["counts"] == {
        "in_all_shards": 3,
        "images": 3,
        "ok": 3,
        "failed": 0,
        "kept": 0,
        "answers": 3,
        "with_decode_steps": 0,
        "masks": 3,
        "without_mask": 0,
    }
    assert run["bundle"]["sha256"] == sha256_of(standin.folder / BUNDLE_FILE)
    assert run["device"] == "cpu"
    assert run["options"]["questions"] == ["Please segment vessel in this image."]
    assert run["peak_memory_bytes"] is None or run["peak_memory_bytes"] > 1 << 24
    assert [line["image"] for line in lines(tmp_path / "out")] == ["a.jpg", "b.png", "c.tif"]
    assert "read" in lines(tmp_path / "out", "timings.jsonl")[0]["ms"]


def test_a_device_is_probed_once_and_the_bundle_hashed_once(
    standin: Bundle, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[Device] = []
    checked: list[Path] = []
    monkeypatch.setitem(PROVIDERS, "cpu", dataclasses.replace(PROVIDERS["cpu"], probe=probed.append))
    verify_files = Bundle.verify_files

    def noted(self: Bundle, *args: Any, **more: Any) -> Any:
        checked.append(self.folder)
        return verify_files(self, *args, **more)

    monkeypatch.setattr(Bundle, "verify_files", noted)
    infer(standin, options(frames, tmp_path / "out", devices=(Device("cpu"),)))
    assert probed == [Device("cpu")]
    assert checked == [standin.folder]


def test_subfolders_are_run_and_resumed_with_the_output_folder_among_them(standin: Bundle, frames: Path) -> None:
    for folder in ("one", "two"):
        (frames / folder).mkdir()
        shutil.copy(frames / "b.png", frames / folder / "b.png")
    asked = options(frames, frames / "out", selection=Selection(recursive=True))
    assert infer(standin, asked).images == 5
    assert infer(standin, asked).kept == 5
    assert {path.stem for path in (frames / "out" / "masks").iterdir()} == {"a", "b", "c", "one__b", "two__b"}
    assert [line["image"] for line in lines(frames / "out")] == ["a.jpg", "b.png", "c.tif", "one/b.png", "two/b.png"]
    assert json.loads((frames / "out" / "run.json").read_text())["options"]["recursive"] is True


def test_good_images_are_finished_though_others_fail(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    (frames / "aa_text.jpg").write_text("This is not an image.")
    (frames / "ab_half.jpg").write_bytes((frames / "a.jpg").read_bytes()[:1500])
    (frames / "ac_empty.png").write_bytes(b"")
    summary = infer(standin, options(frames, tmp_path / "out"))
    assert (summary.images, summary.failed, summary.masks) == (6, 3, 3)
    assert [line["status"] for line in lines(tmp_path / "out")] == ["ok", "error", "error", "error", "ok", "ok"]
    for line, message in zip(lines(tmp_path / "out")[1:4], ["not a JPG", "cannot be decoded", "an empty file"], strict=True):
        assert message in line["error"]
        assert Path(line["image"]).stem not in line["error"]


def test_an_image_that_the_model_cannot_take_is_named(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    make_frame(1344, 1344).save(frames / "b_large.png")
    question = "x" * 180  # with one tile's tokens it fits, with ten tiles' it does not
    summary = infer(standin, options(frames, tmp_path / "out", question))
    assert (summary.images, summary.failed) == (4, 1)
    assert lines(tmp_path / "out")[2]["error"].startswith("its prompt has")


def results(folder: Path) -> list[Any]:
    """What may not depend on how the work was done."""
    found = lines(folder)
    for line in found:
        del line["settings"]
    return found


@pytest.fixture(scope="module")
def one_by_one(standin: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eleven `frames`, and what a run makes of them `single`: one at a time, without drafts."""
    folder = tmp_path_factory.mktemp("one_by_one")
    infer(standin, options(many(folder / "frames", 11), folder / "single", draft=False))
    return folder


@pytest.mark.parametrize(
    ("batch", "streams", "draft"), [(2, 1, True), (3, 1, False), (8, 2, True), (100, 1, True), (1, 4, True), (2, 3, False)]
)
def test_batches_and_streams_change_nothing_but_the_time(
    standin: Bundle, one_by_one: Path, tmp_path: Path, batch: int, streams: int, draft: bool
) -> None:
    summary = infer(standin, options(one_by_one / "frames", tmp_path / "batch", batch=batch, streams=streams, draft=draft))
    assert (summary.images, summary.failed, summary.batch) == (12, 1, batch)
    assert results(tmp_path / "batch") == results(one_by_one / "single")
    if draft:  # the settings of the two runs differ
        assert files(tmp_path / "batch") == files(one_by_one / "single")
    else:
        same_results(tmp_path / "batch", one_by_one / "single")
    together = {line["batch"] for line in lines(tmp_path / "batch", "timings.jsonl")} - {None}
    assert together <= {min(batch, 11), 11 % batch}


def test_the_rounding_of_a_batch_does_not_reach_the_results(
    standin: Bundle, one_by_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix of another length changes the scores by some 1e-6."""
    run = Segmenter.run

    def run_rounded(self: Segmenter, batch: Any, questions: Any) -> Any:
        change = 1 + 2e-6 * len(batch)
        return [
            [dataclasses.replace(answer, iou=answer.iou * change, object_score=answer.object_score * change) for answer in answers]
            for answers in run(self, batch, questions)
        ]

    monkeypatch.setattr(Segmenter, "run", run_rounded)
    infer(standin, options(one_by_one / "frames", tmp_path / "batch", batch=3, draft=False))
    same_results(tmp_path / "batch", one_by_one / "single")


def test_two_questions_are_two_runs(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    asked = "Where?", "Please segment vessel in this image."
    infer(standin, options(frames, tmp_path / "both", *asked, batch=2))
    apart = []
    for i, question in enumerate(asked):
        infer(standin, options(frames, tmp_path / str(i), question))
        apart.append(results(tmp_path / str(i)))
    both = results(tmp_path / "both")
    assert [(line["image"], line["question"]) for line in both] == [(n, q) for n in ("a.jpg", "b.png", "c.tif") for q in asked]
    for line, alone in zip(both, [line for pair in zip(*apart, strict=True) for line in pair], strict=True):
        assert [mask["rle"] for mask in line["masks"]] == [mask["rle"] for mask in alone["masks"]]
    assert [line["masks"][0]["file"] for line in both[:2]] == ["masks/a.png", "masks/a_1.png"]


def test_without_memory_for_a_batch_smaller_ones_go_on(
    standin: Bundle, one_by_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A device that has room for two images stands in for the GPU."""
    run = Segmenter.run

    def run_small(self: Segmenter, batch: Any, questions: Any) -> Any:
        if len(batch) > 2:
            raise OutOfMemory("vision_encoder fails: Failed to allocate memory")
        return run(self, batch, questions)

    monkeypatch.setattr(Segmenter, "run", run_small)
    summary = infer(standin, options(one_by_one / "frames", tmp_path / "batch", batch=8))
    assert (summary.images, summary.failed, summary.least_batch) == (12, 1, 2)
    assert results(tmp_path / "batch") == results(one_by_one / "single")
    assert json.loads((tmp_path / "batch" / "run.json").read_text())["batch"] == {"streams": 1, "at_first": 8, "least": 2}
    assert "no memory for 8 images at once, continuing with 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("graph", "name", "streams"),
    [
        ("vision_encoder", "pixel_values", 1),
        ("language_model", "inputs_embeds", 1),
        ("sam2_image_encoder", "pixel_values", 1),
        ("language_model", "inputs_embeds", 2),
    ],
)
def test_a_gpu_without_room_for_a_batch_halves_it(
    standin: Bundle, tmp_path: Path, gpu: StandinGpu, capsys: pytest.CaptureFixture[str], graph: str, name: str, streams: int
) -> None:
    """Frames of one tile each: a graph has room for two images, wherever it runs. The results are the CPU's, one image at a time."""
    many(tmp_path / "frames", 11, ONE_TILE)
    infer(standin, options(tmp_path / "frames", tmp_path / "cpu", draft=False, devices=(Device("cpu"),)))
    gpu.fails = lambda running, shapes: out_of_memory() if running == graph and shapes[name][0] > 2 else None
    summary = infer(standin, options(tmp_path / "frames", tmp_path / "gpu", batch=8, streams=streams, devices=(Device("cuda"),)))
    assert (summary.images, summary.failed) == (12, 1)
    assert summary.least_batch == 2 or (streams == 2 and summary.least_batch == 1)  # the last batch, of three, may have failed by then
    assert results(tmp_path / "gpu") == results(tmp_path / "cpu")
    assert files(tmp_path / "gpu") == files(tmp_path / "cpu")
    assert "no memory for 8 images at once, continuing with 4" in capsys.readouterr().err
    assert {run.shapes[name][0] for run in gpu.of(graph)} <= {1, 2}
    gc.collect()
    assert not gpu.sessions
    assert not gpu.values


def test_a_gpus_error_shows_no_host_name(standin: Bundle, frames: Path, tmp_path: Path, gpu: StandinGpu) -> None:
    made = itertools.count()
    gpu.fails = lambda graph, shapes: (
        cuda_failure(719, "unspecified launch failure") if graph == "vision_encoder" and next(made) == 2 else None
    )
    summary = infer(standin, options(frames, tmp_path / "out", devices=(Device("cuda"),), batch=1))
    assert (summary.images, summary.failed) == (3, 1)
    assert [line["error"] for line in lines(tmp_path / "out") if line["status"] == "error"] == [
        "vision_encoder fails on cuda:0: CUDA error 719, unspecified launch failure"
    ]


def test_one_image_that_fails_does_not_take_its_batch_along(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    make_frame(1344, 1344).save(frames / "b_large.png")
    summary = infer(standin, options(frames, tmp_path / "out", "x" * 180, batch=4))
    assert (summary.images, summary.failed) == (4, 1)
    assert [line["status"] for line in lines(tmp_path / "out")] == ["ok", "ok", "error", "ok"]


@pytest.mark.parametrize(("streams", "batch"), [(1, 1), (2, 2)])
def test_a_device_that_begins_to_fail_ends_the_run_and_fails_no_frame(
    standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: int, batch: int
) -> None:
    run, calls = Session.run, itertools.count(1)

    def run_or_fail(session: Session, feeds: Any, **more: Any) -> Any:
        with session._faults():
            if next(calls) > 20:
                raise Fail("CUDA failure 700: an illegal memory access was encountered")
        return run(session, feeds, **more)

    frames = many(tmp_path / "frames", 15, ONE_TILE)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "run", run_or_fail)
        with pytest.raises(DeviceError, match=r"CUDA failure 700"):
            infer(standin, options(frames, tmp_path / "out", streams=streams, batch=batch))
    finished = lines(tmp_path / "out")
    assert 0 < len(finished) < 15
    assert all(line["status"] == "ok" for line in finished if "text" not in line["image"])
    summary = infer(standin, options(frames, tmp_path / "out"))
    assert (summary.images, summary.failed) == (16, 1)
    infer(standin, options(frames, tmp_path / "once"))
    assert results(tmp_path / "out") == results(tmp_path / "once")


def test_one_image_that_the_device_fails_on_fails_alone(standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Session.run

    def run_or_fail(session: Session, feeds: Any, **more: Any) -> Any:
        with session._faults():
            if any(array.shape[1:] == (3, 448, 448) and (array > 2.6).any() for array in feeds.values() if isinstance(array, np.ndarray)):
                raise Fail("CUDA failure 1: invalid argument")
        return run(session, feeds, **more)

    frames = many(tmp_path / "frames", 10)
    Image.new("RGB", (200, 160), (255, 255, 255)).save(frames / "003_white.png")
    monkeypatch.setattr(Session, "run", run_or_fail)
    summary = infer(standin, options(frames, tmp_path / "out", batch=4))
    assert (summary.images, summary.failed) == (12, 2)
    errors = {line["image"]: line["error"] for line in lines(tmp_path / "out") if line["status"] == "error"}
    assert errors.keys() == {"003_white.png", "004_text.png"}
    assert "vision_encoder fails on cpu: CUDA failure 1" in errors["003_white.png"]


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("call", range(1, 9))
def test_an_interrupted_run_leaves_whole_results_and_nothing_else(
    standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, streams: int
) -> None:
    run, calls = Segmenter.run, itertools.count(1)

    def interrupted(self: Segmenter, batch: Any, questions: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return run(self, batch, questions)

    monkeypatch.setattr(Segmenter, "run", interrupted)
    frames = many(tmp_path / "frames", 8, ONE_TILE)
    with pytest.raises(KeyboardInterrupt):
        infer(standin, options(frames, tmp_path / "out", streams=streams))
    names = [f"{i:03}.png" for i in range(8)]
    done = [line["image"] for line in lines(tmp_path / "out") if line["status"] == "ok"]
    assert done == [name for name in names if name in done]
    assert call - streams <= len(done) < 8
    assert {path.name for path in (tmp_path / "out" / "masks").iterdir()} == set(done)
    stems = {Path(name).stem for name in done}
    assert {path.stem for path in (tmp_path / "out" / "overlays").iterdir()} == stems
    assert {path.stem for path in (tmp_path / "out" / "previews").iterdir()} == {CODES.code(stem) for stem in stems}
    assert not (tmp_path / "out" / "run.json").exists()


def test_nothing_is_touched_when_the_run_cannot_begin(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    infer(standin, options(frames, out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(VesselError, match="question is empty"):
        infer(standin, options(frames, out, " ", overwrite=True))
    with pytest.raises(VesselError, match="--overwrite"):
        infer(standin, options(frames, out, "Another question?"))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_engines_that_auto_passes_over_are_mentioned(
    standin: Bundle, frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.load(Path(shutil.copytree(standin.folder, tmp_path / "bundle")))
    infer(bundle, options(frames / "a.jpg", tmp_path / "one", devices=(Device("cpu"),)))
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


def test_a_run_that_is_done_is_left_as_it_is(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    infer(standin, options(frames, tmp_path / "out"))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    summary = infer(standin, options(frames, tmp_path / "out"))
    assert (summary.images, summary.kept, summary.masks, summary.failed) == (3, 3, 3, 0)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_run_goes_on_where_it_was(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    infer(standin, options(frames / "b.png", tmp_path / "out"))
    (frames / "d.png").write_text("This is not an image.")
    assert infer(standin, options(frames, tmp_path / "out")).kept == 1
    make_frame().save(frames / "d.png")
    summary = infer(standin, options(frames, tmp_path / "out"))
    assert (summary.images, summary.kept, summary.failed) == (4, 3, 0)
    infer(standin, options(frames, tmp_path / "once"))
    for name in ("results.jsonl", *files(tmp_path / "once")):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_fail_fast_stops_at_the_first_failure(standin: Bundle, tmp_path: Path) -> None:
    summary = infer(standin, options(many(tmp_path / "frames", 20, ONE_TILE), tmp_path / "out", fail_fast=True))
    assert summary.failed == 1
    assert 5 <= summary.images < 20
    assert not (tmp_path / "out" / "run.json").exists()
    assert len(lines(tmp_path / "out")) == summary.images


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_says_only_errors_and_verbose_every_frame(
    standin: Bundle, tmp_path: Path, quiet: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    infer(standin, options(many(tmp_path / "frames", 6), tmp_path / "out", quiet=quiet, verbose=True, devices=(Device("cpu"),)))
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("vessel-rt: frame ")]
    assert out == ""
    assert f"vessel-rt: error: frame 6 of 7 ({CODES.code('004_text')}): not a JPG" in err
    assert len(said) == (0 if quiet else 6)
    assert ("device cpu" in err) is not quiet


def test_a_frame_that_comes_later_may_be_called_as_a_mask_was(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    asked = ("Where?", "Please segment vessel in this image.")
    infer(standin, options(frames, tmp_path / "out", *asked))
    make_frame(seed=9).save(frames / "a_1.png")
    assert infer(standin, options(frames, tmp_path / "out", *asked)).kept == 2
    infer(standin, options(frames, tmp_path / "once", *asked))
    assert lines(tmp_path / "out") == lines(tmp_path / "once")
    assert files(tmp_path / "out") == files(tmp_path / "once")


def test_a_run_that_is_done_follows_when_names_are_to_be_shown_no_more(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    (frames / "a.jpg").rename(frames / "S0042.jpg")
    shown = dataclasses.replace(options(frames, tmp_path / "out"), naming=Naming(CODES, show_names=True))
    infer(standin, shown)
    assert "S0042" in (tmp_path / "out" / "report.html").read_text()
    for codes in (CODES, StudyCodes(b"another key")):
        summary = infer(standin, dataclasses.replace(shown, naming=Naming(codes)))
        assert summary.kept == 3
        page = (tmp_path / "out" / "report.html").read_text()
        assert "S0042" not in page
        assert codes.code("S0042") in page


def test_pseudonyms_of_two_keys_are_not_mixed(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    first = dataclasses.replace(options(frames / "a.jpg", tmp_path / "out"), naming=Naming(CODES, pseudonymize=True))
    infer(standin, first)
    with pytest.raises(VesselError, match="--overwrite"):
        infer(standin, dataclasses.replace(first, naming=Naming(StudyCodes(b"another key"), pseudonymize=True)))


def test_a_frame_whose_results_would_have_too_long_names_fails_alone(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    (frames / "b.png").rename(frames / f"{'b' * 250}.png")  # its first mask still has a name, its second has none
    for kept in (0, 2):
        summary = infer(standin, options(frames, tmp_path / "out", "Where?", "What?"))
        assert (summary.images, summary.kept, summary.failed) == (3, kept, 1)
    assert [line["error"] for line in lines(tmp_path / "out")][2].startswith("its name is too long")
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 4

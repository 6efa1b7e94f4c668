from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

import vessel_rt
from tests.support.frames import make_frame
from tests.support.image_files import png, tiff
from tests.support.paths import ROOT, Tiny
from tests.support.runs import lines
from tests.support.standin import build_standin
from vessel_rt.cli import main
from vessel_rt.formats.bundle import Bundle
from vessel_rt.model.segmenter import Segmenter

SIXTEEN = np.random.default_rng(0).integers(0, 65536, (64, 96), dtype=np.uint16)


@pytest.fixture(scope="module")
def model(standin: Bundle) -> Iterator[vessel_rt.Model]:
    with vessel_rt.load(standin.folder, device="cpu", threads=1) as loaded:
        yield loaded


def same(one: vessel_rt.Result, other: vessel_rt.Result) -> None:
    assert (one.question, one.answer, one.image.size) == (other.question, other.answer, other.image.size)
    assert one.image.tobytes() == other.image.tobytes()
    for ours, theirs in zip(one.masks, other.masks, strict=True):
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
        assert (ours.iou, ours.object_score) == (theirs.iou, theirs.object_score)


def infer(out: Path, bundle: Path, *arguments: str | Path) -> Path:
    command = ["infer", *map(str, arguments), "--bundle", str(bundle), "-o", str(out), "--device", "cpu", "--threads", "1", "-q"]
    assert main(command) == 0
    return out


def as_infer_wrote(result: vessel_rt.Result, out: Path, line: Any) -> None:
    """The masks' files byte for byte, the overlay, and the line but for what only a run's folder has."""
    for mask, record in zip(result.masks, line["masks"], strict=True):
        with Image.open(out / record["file"]) as written:
            assert written.mode == "L"
            assert written.tobytes() == Image.fromarray(mask.pixels.view(np.uint8) * np.uint8(255)).tobytes()
    unknown = {"index": 0, "code": None, "settings": None, "files": {}}
    assert json.loads(json.dumps(result.to_dict())) == line | unknown | {"masks": [mask | {"file": None} for mask in line["masks"]]}


@pytest.fixture(scope="module")
def tiny_model(fp32_bundle: Path) -> Iterator[vessel_rt.Model]:
    with vessel_rt.load(str(fp32_bundle), threads=1) as loaded:
        assert loaded.device == "cpu"
        yield loaded


# What comes out


@pytest.mark.parametrize("question", [None, "Please segment the dark bar."])
def test_results_are_those_of_infer(standin: Bundle, model: vessel_rt.Model, frames: Path, tmp_path: Path, question: str | None) -> None:
    out = infer(tmp_path / "out", standin.folder, frames, *(["--prompt", question] if question else []))
    for path, line in zip(sorted(frames.iterdir()), lines(out), strict=True):
        result = model.segment(path, question)
        assert result.question == question or model.default_question
        as_infer_wrote(result, out, line)
        [mask] = result.masks
        assert (mask.pixels.dtype, mask.pixels.shape) == (np.bool_, (64, 96))
        assert (mask.area, mask.box) == (mask.pixels.sum(), line["masks"][0]["box"])
        assert "read" in result.ms
        with Image.open(out / "overlays" / f"{path.stem}.jpg") as overlay:
            assert np.abs(np.asarray(overlay, np.int16) - np.asarray(result.overlay(), np.int16)).mean() < 5  # a JPEG


def test_results_of_the_trained_model_are_those_of_infer(
    fp32_bundle: Path, tiny_model: vessel_rt.Model, tiny: Tiny, tiny_frames: list[Path], tmp_path: Path
) -> None:
    questions = ["Please segment vessel in this image.", "Please segment catheter in this image."]
    for question in questions:
        out = infer(tmp_path / question, fp32_bundle, tiny.frames, "--prompt", question)
        written = lines(out)
        assert any(line["masks"] for line in written)
        for path, line, result in zip(tiny_frames, written, tiny_model.segment_many(tiny_frames, question), strict=True):
            assert result.path == path
            assert result.to_dict()["index"] == line["index"]
            as_infer_wrote(tiny_model.segment(path, question), out, line)
            same(result, tiny_model.segment(path, question))


def test_a_picture_and_an_array_equal_their_file(tiny_model: vessel_rt.Model, tiny_frames: list[Path]) -> None:
    path = tiny_frames[0]
    of_file = tiny_model.segment(path)
    with Image.open(path) as picture:  # not decoded yet
        same(tiny_model.segment(picture), of_file)
        same(tiny_model.segment(np.asarray(picture.convert("RGB"))), of_file)
    result = tiny_model.segment(of_file.image)
    same(result, of_file)
    told = result.to_dict()
    assert (told["image"], told["name"], told["input"], result.path, result.sha256) == (None,) * 5
    assert told.keys() == of_file.to_dict().keys()
    assert told["masks"] == of_file.to_dict()["masks"]


# What goes in


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"])
def test_modes_of_eight_bits_are_taken(model: vessel_rt.Model, mode: str) -> None:
    """RGB is the only source from which Pillow makes all of them, some by way of others."""
    steps = {"LA": ["RGBA"], "PA": ["P"], "RGBa": ["RGBA"]}.get(mode, [])
    picture = make_frame()
    if mode == "LAB":
        picture = Image.frombytes("LAB", picture.size, picture.tobytes())
    for step in [*steps, mode]:
        picture = picture if picture.mode == step else picture.convert(step)
    before = picture.tobytes()
    same(model.segment(picture), model.segment(picture.convert("RGB")))
    assert picture.tobytes() == before


def test_what_a_mode_is_converted_to_is_what_its_file_is(model: vessel_rt.Model, tmp_path: Path) -> None:
    for mode in ("1", "L", "LA", "P", "RGBA"):
        picture = make_frame().convert("RGBA").convert(mode) if mode == "LA" else make_frame().convert(mode)
        picture.save(tmp_path / "a.png")
        same(model.segment(picture), model.segment(tmp_path / "a.png"))


@pytest.mark.parametrize("values", [SIXTEEN, SIXTEEN.astype(np.int32) - 9, (SIXTEEN / 65535).astype(np.float32)], ids=["I;16", "I", "F"])
def test_deep_gray_is_refused_or_rescaled_as_in_a_file(model: vessel_rt.Model, tmp_path: Path, values: Any) -> None:
    picture, path = Image.fromarray(values), tmp_path / "a.tif"
    picture.save(path)
    for image in (picture, path):
        with pytest.raises(vessel_rt.ImageError, match=r"(16|32)-bit .*gray.*rescale=True"):
            model.segment(image)
    for rescale in (True, (0, 1000), [0.25, 0.5]):
        same(model.segment(picture, rescale=rescale), model.segment(path, rescale=rescale))
    with Image.open(path) as opened:
        same(model.segment(opened, rescale=True), model.segment(path, rescale=True))
    assert model.segment(picture, rescale=True).image.getextrema() == ((0, 255),) * 3


def test_deep_colours_are_refused_where_they_can_be_told(model: vessel_rt.Model, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(np.full((64, 96, 3), 0x1234, np.uint16)))
    (tmp_path / "a.tif").write_bytes(tiff(np.full((64, 96, 3), 0x1234, np.uint16), {262: (3, 2), 277: (3, 3)}))
    for name in ("a.png", "a.tif"):
        for image in (tmp_path / name, Image.open(tmp_path / name)):
            with pytest.raises(vessel_rt.ImageError, match="16-bit colour"):
                model.segment(image, rescale=True)


def test_a_damaged_picture_that_was_only_opened_is_an_error(model: vessel_rt.Model, tmp_path: Path) -> None:
    make_frame().save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-2000])
    with Image.open(tmp_path / "cut.png") as picture, pytest.raises(vessel_rt.ImageError, match=r"^image: "):
        model.segment(picture)
    with Image.open(tmp_path / "a.png") as closed:
        pass
    with pytest.raises(vessel_rt.ImageError):
        model.segment(closed)


def test_arrays_of_any_layout_are_taken(model: vessel_rt.Model) -> None:
    pixels = np.asarray(make_frame())
    expected = model.segment(make_frame())
    for array in (pixels, np.asfortranarray(pixels), np.flip(np.flip(pixels, 0).copy(), 0), np.repeat(pixels, 2, axis=1)[:, ::2]):
        same(model.segment(array), expected)
    same(model.segment(pixels[..., 0]), model.segment(Image.fromarray(pixels[..., 0].copy())))


@pytest.mark.parametrize(
    ("image", "given"),
    [
        (np.zeros((4, 5), np.float32), r"float32 \[4, 5\]"),
        (np.zeros((4, 5), np.bool_), r"bool \[4, 5\]"),
        (np.zeros((4, 5, 4), np.uint8), r"uint8 \[4, 5, 4\]"),
        (np.zeros((4, 5, 1), np.uint8), r"uint8 \[4, 5, 1\]"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"uint8 \[1, 4, 5, 3\]"),
        (np.zeros(4, np.uint8), r"uint8 \[4\]"),
        ([[1, 2]], "list"),
        (b"a.png", "bytes"),
        (None, "NoneType"),
    ],
    ids=str,
)
def test_what_is_no_image_is_told_with_what_is_taken(model: vessel_rt.Model, image: Any, given: str) -> None:
    with pytest.raises(vessel_rt.ImageError, match=rf"{given}.*a path, a PIL image, .*uint8 \[H, W\] or \[H, W, 3\]"):
        model.segment(image)
    [error] = model.segment_many([image], on_error="return")
    assert isinstance(error, vessel_rt.ImageError)


@pytest.mark.parametrize(
    "image", [np.zeros((0, 5), np.uint8), Image.new("RGB", (0, 0)), np.zeros((1, 9000), np.uint8)], ids=["no rows", "no pixels", "too wide"]
)
def test_sizes_that_are_not_read(model: vessel_rt.Model, image: Any) -> None:
    with pytest.raises(vessel_rt.ImageError, match="pixels"):
        model.segment(image)


@pytest.mark.parametrize("path", ["no such.png", "", ".", "a\0.png", "\ud800.png", "text\n.png"])
def test_a_file_that_cannot_be_read_is_named_in_one_line(model: vessel_rt.Model, tmp_path: Path, monkeypatch: Any, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text\n.png").write_text("text")
    with pytest.raises(vessel_rt.ImageError) as caught:
        model.segment(path)
    assert str(caught.value).isprintable()
    assert repr(path).strip("'")[:3] in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"question": 3}, "question"),
        ({"question": " "}, "question"),
        ({"question": "\ud800"}, "question"),
        ({"frame": -1}, "frame"),
        ({"frame": True}, "frame"),
        ({"frame": "1"}, "frame"),
        ({"frame": 7}, "7"),
        ({"rescale": (9, 1)}, "rescale"),
        ({"rescale": (0, float("inf"))}, "rescale"),
        ({"rescale": "12"}, "rescale"),
        ({"rescale": None}, "rescale"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(model: vessel_rt.Model, frames: Path, arguments: Any, name: str) -> None:
    with pytest.raises(vessel_rt.VesselError, match=name):
        model.segment(frames / "b.png", **arguments)


def test_a_picture_in_memory_has_no_frames(model: vessel_rt.Model) -> None:
    with pytest.raises(vessel_rt.ImageError, match="frame"):
        model.segment(make_frame(), frame=0)


# Files of several frames


def cine(kind: str, folder: Path) -> Path:
    """Five frames, each with its own picture."""
    grays = [np.asarray(make_frame(seed=seed).convert("L")) for seed in range(5)]
    if kind == "dcm":
        from tests.support.dicom_files import make_dicom

        return make_dicom(folder / "cine.dcm", np.stack(grays))
    pictures = [Image.fromarray(gray) for gray in grays]
    pictures[0].save(folder / "cine.tif", save_all=True, append_images=pictures[1:])
    return folder / "cine.tif"


@pytest.mark.parametrize("kind", ["dcm", "tif"])
def test_a_cine_needs_a_frame_and_gives_what_infer_gives(standin: Bundle, model: vessel_rt.Model, tmp_path: Path, kind: str) -> None:
    path = cine(kind, tmp_path)
    assert vessel_rt.frame_count(path) == 5
    with pytest.raises(vessel_rt.ImageError, match=rf"cine\.{kind}: 5 frames.*frame=4"):
        model.segment(path)
    with pytest.raises(vessel_rt.ImageError, match=r"frame 5: .*5"):
        model.segment(path, frame=5)
    out = infer(tmp_path / "out", standin.folder, path, "--frames", ":")
    results = list(model.segment_many([(path, number) for number in range(5)], batch=2))
    assert [result.frame for result in results] == list(range(5))
    for number, line in enumerate(lines(out)):
        same(results[number], model.segment(path, frame=number))
        as_infer_wrote(model.segment(str(path), frame=np.int64(number)), out, line)


def test_frames_of_other_files_are_counted_too(model: vessel_rt.Model, frames: Path) -> None:
    assert vessel_rt.frame_count(str(frames / "a.jpg")) == 1
    same(model.segment(frames / "a.jpg", frame=0), model.segment(frames / "a.jpg"))
    with pytest.raises(vessel_rt.ImageError, match=r"none\.dcm"):
        vessel_rt.frame_count(frames / "none.dcm")


# Many images


def test_many_images_come_in_order_whatever_the_batch(model: vessel_rt.Model, frames: Path) -> None:
    images: list[Any] = [frames / "a.jpg", make_frame(900, 448), np.asarray(make_frame(448, 448, 1)), str(frames / "c.tif"), make_frame()]
    expected = [model.segment(image) for image in images]
    for batch in (None, 1, 2, 4, 9):
        results = list(model.segment_many(iter(images), batch=batch))
        assert [result.index for result in results] == [0, 1, 2, 3, 4]
        assert [result.images for result in results] == {2: [2, 2, 2, 2, 1], 4: [4, 4, 4, 4, 1], 9: [5] * 5}.get(batch or 1, [1] * 5)
        for one, other in zip(results, expected, strict=True):
            assert one.answer == other.answer
            for ours, theirs in zip(one.masks, other.masks, strict=True):
                np.testing.assert_array_equal(ours.pixels, theirs.pixels)


def test_a_bad_image_raises_at_its_place_or_is_returned(model: vessel_rt.Model, frames: Path) -> None:
    images = [frames / "a.jpg", frames / "none.png", frames / "b.png"]
    for batch in (1, 3):
        results = model.segment_many(images, batch=batch)
        assert next(results).path == images[0]
        with pytest.raises(vessel_rt.ImageError, match=r"none\.png: no such file"):
            next(results)
        first, error, last = model.segment_many(images, batch=batch, on_error="return")
        assert isinstance(first, vessel_rt.Result)
        assert isinstance(error, vessel_rt.ImageError)
        assert isinstance(last, vessel_rt.Result)
        assert (first.index, last.index, last.path) == (0, 2, images[2])


def test_memory_may_be_used_again_while_images_are_read_ahead(model: vessel_rt.Model, tmp_path: Path) -> None:
    def reused() -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        buffer = np.empty((64, 96, 3), np.uint8)
        for seed in range(6):
            buffer[:] = np.asarray(make_frame(seed=seed))
            yield buffer

    for seed, result in enumerate(model.segment_many(reused(), batch=2)):
        assert result.image.tobytes() == make_frame(seed=seed).tobytes()
    with Image.open(cine("tif", tmp_path)) as pages:
        for seed, result in enumerate(model.segment_many(ImageSequence.Iterator(pages))):
            assert result.image.tobytes() == make_frame(seed=seed).convert("L").convert("RGB").tobytes()


def test_images_are_taken_as_results_are(model: vessel_rt.Model) -> None:
    taken: list[int] = []
    endless = (taken.append(i) or make_frame() for i in itertools.count())
    results = model.segment_many(endless, batch=2)
    assert taken == []
    next(results)
    assert len(taken) <= 12
    results.close()  # type: ignore[attr-defined]


def test_no_memory_for_a_batch_halves_it(model: vessel_rt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Segmenter.run

    def run_small(self: Segmenter, batch: Any, questions: Any) -> Any:
        if len(batch) > 2:
            raise vessel_rt.OutOfMemory("Failed to allocate memory")
        return run(self, batch, questions)

    monkeypatch.setattr(Segmenter, "run", run_small)
    assert [result.images for result in model.segment_many([make_frame()] * 8, batch=8)] == [2] * 8


@pytest.mark.parametrize(
    "images", ["frames", Path("frames"), make_frame(), np.zeros((4, 5, 3), np.uint8), 3, None], ids=lambda v: type(v).__name__
)
def test_one_image_is_not_many(model: vessel_rt.Model, images: Any) -> None:
    with pytest.raises(vessel_rt.VesselError, match=type(images).__name__):
        model.segment_many(images)


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"batch": True}, {"batch": 1.5}, {"on_error": "skip"}, {"question": ""}], ids=str)
def test_bad_arguments_are_found_before_the_first_image(model: vessel_rt.Model, arguments: Any) -> None:
    with pytest.raises(vessel_rt.VesselError, match=next(iter(arguments))):
        model.segment_many([], **arguments)


def test_an_error_of_the_callers_iterable_is_the_callers(model: vessel_rt.Model) -> None:
    def broken() -> Iterator[Image.Image]:
        yield make_frame()
        raise KeyError("mine")

    results = model.segment_many(broken())
    assert next(results).index == 0
    with pytest.raises(KeyError, match="mine"):
        next(results)


# Loading, and life after it


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"device": "gpu5"}, "gpu5.*auto"),
        ({"device": 0}, "device.*int.*cuda:0"),
        ({"bundle": 3}, "bundle.*int"),
        ({"threads": -1}, "threads"),
        ({"batch": "4"}, "batch"),
    ],
    ids=str,
)
def test_bad_arguments_of_load(standin: Bundle, arguments: Any, told: str) -> None:
    with pytest.raises(vessel_rt.VesselError, match=told):
        vessel_rt.load(**{"bundle": standin.folder} | arguments)


def test_a_device_that_is_not_there_is_not_replaced(standin: Bundle) -> None:
    with pytest.raises(vessel_rt.VesselError, match="tensorrt:7"):
        vessel_rt.load(standin.folder, "tensorrt:7")


def test_a_bundle_that_is_missing_or_changed_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(vessel_rt.BundleError, match="none"):
        vessel_rt.load(tmp_path / "none")
    bundle = build_standin(tmp_path / "bundle")
    with (bundle.folder / "vision_encoder.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(vessel_rt.BundleError, match="vision_encoder"):
        vessel_rt.load(bundle.folder)


def test_a_bundle_that_changes_gives_no_further_result(standin: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(standin.folder, tmp_path / "bundle"))
    with vessel_rt.load(folder, "cpu") as model:
        results = model.segment_many(make_frame() for _ in range(50))
        next(results)
        os.replace(shutil.copy(folder / "vision_encoder.onnx", tmp_path / "new"), folder / "vision_encoder.onnx")
        with pytest.raises(vessel_rt.BundleError, match="vision_encoder"):
            list(results)
        with pytest.raises(vessel_rt.BundleError, match="vision_encoder"):
            model.segment(make_frame())


def test_progress_is_told_of_every_byte(standin: Bundle) -> None:
    told: list[tuple[int, int]] = []
    vessel_rt.load(standin.folder, "cpu", progress=lambda read, total: told.append((read, total))).close()
    assert sum(read for read, _ in told) == told[0][1] == sum(record.bytes for record in standin.files.values())


def test_a_closed_model_says_so(standin: Bundle) -> None:
    with vessel_rt.load(standin.folder, "cpu") as model:
        results = model.segment_many(make_frame() for _ in range(100))
        next(results)
    for use in (lambda: model.segment(make_frame()), lambda: model.segment_many([]), lambda: list(results)):
        with pytest.raises(vessel_rt.VesselError, match="closed"):
            use()
    model.close()


def test_engines_set_the_largest_batch(model: vessel_rt.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model._deployment), "max_batch", 2)
    assert len(list(model.segment_many([make_frame()] * 3, batch=2))) == 3
    with pytest.raises(vessel_rt.VesselError, match=r"batch is 3.*2 images.*load"):
        model.segment_many([make_frame()] * 3, batch=3)


def test_threads_share_a_model(model: vessel_rt.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are each thread's own, batches never run at the same time, and a DICOM cine may be read by all at once."""
    path, running, most = cine("dcm", tmp_path), 0, 0
    run, lock = Segmenter.run, threading.Lock()

    def counted(self: Segmenter, batch: Any, questions: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return run(self, batch, questions)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(Segmenter, "run", counted)
    expected = [model.segment(path, frame=number) for number in range(5)]
    numbers = [number % 5 for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: model.segment(path, f"Question {number}?", frame=number), numbers))
        many = list(pool.map(lambda _: list(model.segment_many([(path, n) for n in range(5)], batch=2)), range(4)))
    assert most == 1
    for number, result in [*zip(numbers, found, strict=True), *(pair for each in many for pair in enumerate(each))]:
        np.testing.assert_array_equal(result.image, expected[number].image)
        np.testing.assert_array_equal(result.masks[0].pixels, expected[number].masks[0].pixels)
    assert [result.question for result in found] == [f"Question {number}?" for number in numbers]


def test_closing_waits_for_the_batch_that_runs(standin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()
    run = Segmenter.run

    def slow(self: Segmenter, batch: Any, questions: Any) -> Any:
        begun.set()
        go.wait(60)
        return run(self, batch, questions)

    model = vessel_rt.load(standin.folder, "cpu")
    monkeypatch.setattr(Segmenter, "run", slow)
    with ThreadPoolExecutor(2) as pool:
        result = pool.submit(model.segment, make_frame())
        assert begun.wait(60)
        closed = pool.submit(model.close)
        assert not closed.done()
        go.set()
        closed.result(60)
        assert result.result(60).masks


# The module


def test_a_library_prints_nothing_and_leaves_no_file(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    program = """
import sys, vessel_rt
with vessel_rt.load(sys.argv[1], device="auto") as model:
    assert [len(result.masks) for result in model.segment_many(sys.argv[2:])] == [1, 1, 1]
    assert model.segment(sys.argv[2]).to_dict()["status"] == "ok"
"""
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "VESSEL_KEY"} | {"HOME": str(home)}
    command = [sys.executable, "-c", program, standin.folder, *sorted(frames.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(home.iterdir())


def test_every_name_is_there_and_no_other() -> None:
    assert set(vessel_rt.__all__) <= set(dir(vessel_rt))
    for name in vessel_rt.__all__:
        assert getattr(vessel_rt, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = vessel_rt.nothing  # type: ignore[attr-defined]


def test_type_checkers_see_the_types(tmp_path: Path) -> None:
    """As a user's project would, with the package's py.typed."""
    (tmp_path / "mine.py").write_text(
        "import vessel_rt\n"
        "with vessel_rt.load('b') as model:\n"
        "    reveal_type(model.segment('a.png').masks[0].pixels)\n"
        "    reveal_type(model.segment_many(['a.png']))\n"
        "    reveal_type(model.segment_many(['a.png'], on_error='return'))\n"
        "    model.segment(3)\n"
        "vessel_rt.nothing\n"
    )
    environment = os.environ | {"MYPYPATH": str(ROOT / "runtime")}
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--cache-dir",
        tmp_path / "cache",
        "--follow-imports",
        "silent",
        tmp_path / "mine.py",
    ]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout
    for text in (
        "bool",
        "Iterator[vessel_rt.api.result.Result]",
        "Iterator[vessel_rt.api.result.Result | vessel_rt.errors.ImageError]",
        "arg-type",
        "attr-defined",
    ):
        assert text in told
    assert "Found 2 errors" in told

"""Runs with --propagate: the frames of a file are one cine, done as a whole, and resumed as a whole."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.support.frames import CODES
from tests.support.runs import files, lines, options, same_results
from vessel_export.parity.verify_cine import drawn_cine
from vessel_rt.cli import main
from vessel_rt.device.providers import Device
from vessel_rt.errors import ImageError, VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.frames import Naming, Selection
from vessel_rt.inputs.pseudonyms import StudyCodes
from vessel_rt.results.writer import FrameWriter
from vessel_rt.run import worker
from vessel_rt.run.infer import InferOptions, infer

FRAMES = 7


@pytest.fixture(scope="module")
def cine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cines") / "cine.tif"
    first, *others = (frame.convert("L") for frame in drawn_cine(FRAMES))
    first.save(path, save_all=True, append_images=others)
    return path


@pytest.fixture(scope="module")
def bundle(fp32_bundle: Path) -> Bundle:
    return Bundle.load(fp32_bundle)


def asked(cine: Path, output: Path, propagate: str | None = "sa2va", **more: Any) -> InferOptions:
    found = options(cine, output, selection=Selection(slice(None)), devices=(Device("cpu"),), quiet=True, **more)
    return dataclasses.replace(found, work=dataclasses.replace(found.work, propagate=propagate))


@pytest.fixture(scope="module")
def done(bundle: Bundle, cine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a whole run; not to be changed."""
    output = tmp_path_factory.mktemp("done") / "out"
    summary = infer(bundle, asked(cine, output))
    assert (summary.images, summary.failed, summary.masks, summary.streams, summary.batch) == (FRAMES, 0, FRAMES, 1, 1)
    return output


def test_what_a_run_leaves(done: Path) -> None:
    found = lines(done)
    assert [line["frame"] for line in found] == list(range(FRAMES))
    assert [line["propagated_from"] for line in found] == [None] * 5 + [[0, 1, 2, 3, 4]] * 2
    assert [line["time_ms"] for line in found] == [None] * FRAMES  # a TIFF does not say
    assert len({line["answer"] for line in found}) == 1
    with Image.open(done / "cines" / "cine.tif") as tiff:
        assert tiff.n_frames == FRAMES
        for number, line in enumerate(found):
            tiff.seek(number)
            with Image.open(done / line["masks"][0]["file"]) as mask:
                assert np.array_equal(np.array(tiff), np.array(mask))
    assert json.loads((done / "run.json").read_text())["options"]["propagate"] == "sa2va"


def test_numbers_are_those_of_the_file(bundle: Bundle, cine: Path, tmp_path: Path) -> None:
    infer(bundle, dataclasses.replace(asked(cine, tmp_path / "out"), selection=Selection(slice(1, None))))
    assert [line["propagated_from"] for line in lines(tmp_path / "out")] == [None] * 5 + [[1, 2, 3, 4, 5]]


def test_a_cine_that_was_stopped_in_the_middle_is_done_again_as_a_whole(
    bundle: Bundle, cine: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write = tmp_path / "out", FrameWriter.write

    def full_disk(self: FrameWriter, frame: Any, *args: Any) -> Any:
        if frame.number == 5:
            raise VesselError("no space left")
        return write(self, frame, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FrameWriter, "write", full_disk)
        with pytest.raises(VesselError, match="no space"):
            infer(bundle, asked(cine, output))
    assert 0 < len(lines(output)) < FRAMES
    again = infer(bundle, asked(cine, output))
    assert (again.images, again.kept) == (FRAMES, 0)
    same_results(output, done)
    assert infer(bundle, asked(cine, output)).kept == FRAMES


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_leaves_the_rest_of_the_cine(
    bundle: Bundle, cine: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told so while the first frame is written; frames that are done are those of a whole run."""
    write = FrameWriter.write

    def told(self: FrameWriter, frame: Any, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return write(self, frame, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FrameWriter, "write", told)
        summary = infer(bundle, asked(cine, tmp_path / "out"))
    assert summary.stopped == signal.SIGTERM
    found = lines(tmp_path / "out")
    assert 0 < len(found) < FRAMES
    assert [line["answer"] for line in found] == [line["answer"] for line in lines(done)][: len(found)]
    assert infer(bundle, asked(cine, tmp_path / "out")).kept == 0
    same_results(tmp_path / "out", done)


def test_a_mask_that_is_gone_is_made_again_with_its_cine(bundle: Bundle, cine: Path, done: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    infer(bundle, asked(cine, output))
    (output / lines(output)[6]["masks"][0]["file"]).unlink()
    assert infer(bundle, asked(cine, output)).kept == 0
    same_results(output, done)


def test_a_frame_that_cannot_be_read_fails_with_those_after_it(
    bundle: Bundle, cine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = worker.read_frame

    def damaged(frame: Any, *args: Any) -> Any:
        if frame.number == 5:
            raise ImageError("damaged")
        return read(frame, *args)

    monkeypatch.setattr(worker, "read_frame", damaged)
    summary = infer(bundle, asked(cine, tmp_path / "out"))
    assert (summary.images, summary.failed) == (FRAMES, 2)
    found = lines(tmp_path / "out")
    assert [line["status"] for line in found] == ["ok"] * 5 + ["error"] * 2
    assert "frame 5" in found[6]["error"]
    assert found[6]["propagated_from"] is None
    assert not (tmp_path / "out" / "cines" / "cine.tif").exists()


@pytest.fixture(scope="module")
def filling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cine whose frames 8 to 15 of 16 have most contrast."""
    path = tmp_path_factory.mktemp("cines") / "filling.tif"
    frames = [frame.convert("L") for frame in drawn_cine(1)] * 16
    frames = [Image.blend(frame.filter(ImageFilter.BoxBlur(40)), frame, min(1, place / 8)) for place, frame in enumerate(frames)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


@pytest.fixture(scope="module")
def best(bundle: Bundle, filling: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a whole run from the best frames; not to be changed."""
    output = tmp_path_factory.mktemp("best") / "out"
    summary = infer(bundle, asked(filling, output, "best-frame"))
    assert (summary.images, summary.failed, summary.streams, summary.batch) == (16, 0, 1, 1)
    return output


def test_what_a_run_from_the_best_frames_leaves(bundle: Bundle, filling: Path, best: Path) -> None:
    """Results are in the order of frames; those that were asked about are images of their own."""
    found = lines(best)
    assert [line["frame"] for line in found] == list(range(16))
    origins = [line["frame"] for line in found if line["propagated_from"] is None]
    assert 1 <= len(origins) <= 3
    assert min(origins) >= 6
    assert all(line["propagated_from"] == origins for line in found if line["frame"] not in origins)
    with Image.open(best / "cines" / "filling.tif") as tiff, Image.open(best / "cines" / "filling.webp") as animation:
        assert (tiff.n_frames, animation.n_frames, animation.size) == (16, 16, (512, 512))
    assert (best / "report.html").read_text().count('data-of="cine"') == 1


def test_a_frame_that_was_asked_about_has_the_mask_of_an_image(bundle: Bundle, filling: Path, best: Path, tmp_path: Path) -> None:
    origin = next(line for line in lines(best) if line["propagated_from"] is None)
    image = dataclasses.replace(asked(filling, tmp_path / "out", None), selection=Selection(slice(origin["frame"], origin["frame"] + 1)))
    infer(bundle, image)
    [line] = lines(tmp_path / "out")
    assert line["answer"] == origin["answer"]
    assert [mask["rle"] for mask in line["masks"]] == [mask["rle"] for mask in origin["masks"]]


def test_a_run_from_the_best_frames_that_was_stopped_is_done_again(
    bundle: Bundle, filling: Path, best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write = tmp_path / "out", FrameWriter.write

    def full_disk(self: FrameWriter, frame: Any, *args: Any) -> Any:
        if frame.number == 2:
            raise VesselError("no space left")
        return write(self, frame, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FrameWriter, "write", full_disk)
        with pytest.raises(VesselError, match="no space"):
            infer(bundle, asked(filling, output, "best-frame"))
    assert 0 < len(lines(output)) < 16
    assert infer(bundle, asked(filling, output, "best-frame")).kept == 0
    same_results(output, best)


# vessel-rt, killed when the function that the first argument names (module:attributes) was called for the N-th time.
KILLED = """
import functools, importlib, itertools, os, signal, sys
module, _, names = sys.argv[1].partition(":")
*owners, name = names.split(".")
owner = functools.reduce(getattr, owners, importlib.import_module(module))
function, calls = getattr(owner, name), itertools.count(1)
def dying(*args, **kwargs):
    found = function(*args, **kwargs)
    if next(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return found
setattr(owner, name, dying)
from vessel_rt.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "calls"),
    [
        ("vessel_rt.results.writer:FrameWriter.write", 1),
        ("vessel_rt.results.writer:FrameWriter.write", 9),
        ("vessel_rt.run.journal:Record.add", 15),
        ("PIL.TiffImagePlugin:AppendingTiffWriter.newFrame", 5),
        ("vessel_rt.results.animation:_still", 12),
        ("vessel_rt.results.cines:write_animation", 1),
        ("vessel_rt.results.run_file:write_run", 1),
    ],
)
@pytest.mark.parametrize("kind", ["file", "series"])
def test_a_run_that_is_killed_is_finished_as_if_it_had_not_been(
    bundle: Bundle, filling: Path, best: Path, series: tuple[Path, Path], tmp_path: Path, kind: str, function: str, calls: int
) -> None:
    """In the middle of tracking, of the TIFF, of the animation, and after each; twice in a row. Times are not in these files."""
    inputs, whole, extra = (filling, best, ()) if kind == "file" else (*series, ("--series",))
    key = tmp_path / "key"
    key.write_text("00" * 32)
    key.chmod(0o600)
    output = tmp_path / "out"
    command = ["infer", str(inputs), "--bundle", str(bundle.folder), "-o", str(output), "--key", str(key), "--device", "cpu"]
    command += ["--threads", "1", "-q", "--propagate", *extra]
    for _ in range(2):
        process = subprocess.run([sys.executable, "-c", KILLED, function, str(calls), *command], capture_output=True, check=False)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert not (output / "report.html").exists()
    assert main(command) == 0
    same_results(output, whole)
    found, wanted = ({path.relative_to(of): path.read_bytes() for path in of.glob("cines/*")} for of in (output, whole))
    assert found == wanted
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]


def test_a_frame_that_cannot_be_read_is_left_out(bundle: Bundle, filling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = worker.read_frame

    def damaged(frame: Any, *args: Any) -> Any:
        if frame.number in (4, 10):
            raise ImageError("damaged")
        return read(frame, *args)

    monkeypatch.setattr(worker, "read_frame", damaged)
    summary = infer(bundle, asked(filling, tmp_path / "out", "best-frame"))
    assert (summary.images, summary.failed) == (16, 2)
    assert [line["frame"] for line in lines(tmp_path / "out") if line["error"] == "damaged"] == [4, 10]
    assert [path.name for path in (tmp_path / "out" / "cines").iterdir()] == ["filling.webp"]


def test_a_cine_of_which_no_frame_can_be_read(bundle: Bundle, filling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: Any) -> Any:
        raise ImageError("damaged")

    monkeypatch.setattr(worker, "read_frame", damaged)
    assert infer(bundle, asked(filling, tmp_path / "out", "best-frame")).failed == 16


def numbered(filling: Path, folder: Path) -> Path:
    """The frames of a cine as numbered files, from 7 on, with a gap after the first, and an image that is not of it."""
    folder.mkdir()
    with Image.open(filling) as tiff:
        for place in range(tiff.n_frames):
            tiff.seek(place)
            tiff.save(folder / f"run_{7 + place + (place > 0)}.png")
        tiff.save(folder / "other.png")
    return folder


def in_series(folder: Path, output: Path, propagate: str = "best-frame", **more: Any) -> InferOptions:
    return dataclasses.replace(asked(folder, output, propagate, **more), selection=Selection(slice(None), series=True))


@pytest.fixture(scope="module")
def series(bundle: Bundle, filling: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Numbered files, and the output of a whole run; not to be changed."""
    folder, output = numbered(filling, tmp_path_factory.mktemp("series") / "in"), tmp_path_factory.mktemp("series") / "out"
    assert infer(bundle, in_series(folder, output)).failed == 0
    return folder, output


def test_a_series_of_files_gives_the_masks_of_the_cine(series: tuple[Path, Path], best: Path) -> None:
    """Places in the cine count, not the numbers of the files."""
    _, output = series
    (other, *found), wanted = lines(output), lines(best)
    number = {place: 7 + place + (place > 0) for place in range(16)}
    assert (other["name"], other["series"]) == ("other", None)
    assert [line["name"] for line in found] == [f"run_{number[place]}" for place in range(16)]
    assert [line["series"] for line in found] == [{"name": "run", "code": CODES.code("run"), "number": each} for each in number.values()]
    assert [line["frame"] for line in found] == [None] * 16
    for line, expected in zip(found, wanted, strict=True):
        assert [mask["rle"] for mask in line["masks"]] == [mask["rle"] for mask in expected["masks"]]
        origins = expected["propagated_from"]
        assert line["propagated_from"] == (None if origins is None else [number[place] for place in origins])
    for name in ("filling.tif", "filling.webp"):
        assert (output / "cines" / name.replace("filling", "run")).read_bytes() == (best / "cines" / name).read_bytes()
    page = (output / "report.html").read_text()
    assert page.count('data-of="cine"') == 1
    assert f'"cine":"{CODES.code("run")}","number":7,' in page


def test_a_series_is_done_again_as_a_whole(bundle: Bundle, series: tuple[Path, Path], tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(series[0], folder)
    shutil.copytree(series[1], output)
    options = in_series(folder, output)
    assert infer(bundle, options).kept == 17
    (folder / "run_23.png").unlink()
    with pytest.raises(VesselError, match="1 frames that are not among these inputs"):
        infer(bundle, options)
    assert infer(bundle, dataclasses.replace(options, prune=True)).kept == 1, "the image"
    with Image.open(output / "cines" / "run.tif") as tiff:
        assert tiff.n_frames == 15
    shutil.copy(series[0] / "run_23.png", folder)
    assert infer(bundle, options).kept == 1
    same_results(output, series[1])
    again = dataclasses.replace(options, naming=Naming(StudyCodes(bytes([1] * 32))))
    assert infer(bundle, again).kept == 17
    assert {line["series"]["code"] for line in lines(output)[1:]} == {again.naming.codes.code("run")}


def test_a_damaged_file_of_a_series_is_left_out(bundle: Bundle, series: tuple[Path, Path], tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(series[0], folder)
    (folder / "run_9.png").write_bytes((folder / "run_9.png").read_bytes()[:500])
    assert infer(bundle, in_series(folder, output)).failed == 1
    failed = [line for line in lines(output) if line["status"] == "error"]
    assert [(line["name"], line["series"]["number"]) for line in failed] == [("run_9", 9)]
    assert [path.name for path in (output / "cines").iterdir()] == ["run.webp"]


def test_series_need_propagate(series: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for extra, says in ((["--series"], "--propagate"), (["--series", "--propagate", "--frames", "0:5"], "--frames")):
        with pytest.raises(SystemExit) as e:
            main(["infer", str(series[0]), *extra])
        assert e.value.code == 2
        assert says in capsys.readouterr().err.splitlines()[-1]


def test_the_command_tells_its_series(bundle: Bundle, series: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    inputs = [str(series[0] / f"run_{number}.png") for number in (10, 9)]
    command = ["infer", *inputs, "--bundle", str(bundle.folder), "-o", str(tmp_path / "out"), "--device", "cpu", "--propagate", "--series"]
    assert main([*command, "--pseudonymize"]) == 0
    assert "vessel-rt: series: 1 cine from 2 files\n" in capfd.readouterr().err
    code = lines(tmp_path / "out")[0]["series"]["code"]
    assert sorted(path.name for path in (tmp_path / "out" / "cines").iterdir()) == [f"{code}.tif", f"{code}.webp"]
    assert [line["series"]["number"] for line in lines(tmp_path / "out")] == [9, 10]


def test_two_cines_do_not_share_memories(bundle: Bundle, cine: Path, done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "cine.tif").write_bytes(cine.read_bytes())
    Image.open(cine).save(folder / "a.png")
    infer(bundle, asked(folder, tmp_path / "out"))
    found = {name: content for name, content in files(tmp_path / "out").items() if name.startswith("masks/cine")}
    assert found == {name: content for name, content in files(done).items() if name.startswith("masks/")}


def test_what_is_refused(bundle: Bundle, standin: Bundle, cine: Path, tmp_path: Path) -> None:
    with pytest.raises(VesselError, match="--num-shards"):
        infer(bundle, dataclasses.replace(asked(cine, tmp_path / "out"), devices=(Device("cpu"), Device("cpu"))))
    with pytest.raises(VesselError, match="older version"):
        infer(standin, asked(cine, tmp_path / "old"))


def test_the_command(bundle: Bundle, cine: Path, done: Path, tmp_path: Path) -> None:
    command = ["infer", str(cine), "--bundle", str(bundle.folder), "-o", str(tmp_path / "out"), "--device", "cpu", "-q"]
    assert main([*command, "--propagate", "sa2va"]) == 0
    assert [line["masks"][0]["area"] for line in lines(tmp_path / "out")] == [line["masks"][0]["area"] for line in lines(done)]
    assert main([*command, "--overwrite", "--propagate"]) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"]["propagate"] == "best-frame"

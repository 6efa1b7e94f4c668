from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime.conftest import make_frame, placed
from tests.runtime.test_outputs import box_mask, files, result_with
from vessel_rt.errors import VesselError
from vessel_rt.frames import Frame, input_sha256
from vessel_rt.outputs import FrameWriter, failure
from vessel_rt.record import JOURNAL_FILE, Record
from vessel_rt.results import read_results

S = "settings"


@pytest.fixture
def abc(frames: Path) -> list[Frame]:
    return placed(frames / "a.jpg", frames / "b.png", frames / "c.tif")


def do(record: Record, frames: Sequence[Frame], settings: str = S, masks: int = 1) -> None:
    writer = FrameWriter(record.folder, [frame.name for frame in frames], settings)
    for frame in frames:
        record.add(writer.write(frame, input_sha256(frame.path), make_frame(), [result_with(*[box_mask(3, 5, 20, 30)] * masks)]))


def run(folder: Path, frames: Sequence[Frame], *, overwrite: bool = False, settings: str = S, masks: int = 1) -> list[str]:
    """The names of the frames that were left to do."""
    record = Record(folder, frames, overwrite)
    left = record.resume(settings)
    with record:
        do(record, left, settings, masks)
    return [frame.name for frame in left]


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def test_what_is_done_is_kept_and_the_rest_is_left(abc: list[Frame], tmp_path: Path) -> None:
    assert run(tmp_path / "part", abc[:2]) == ["a", "b"]
    assert run(tmp_path / "part", abc) == ["c"]
    assert run(tmp_path / "part", abc) == []
    run(tmp_path / "once", abc)
    assert content(tmp_path / "part") == content(tmp_path / "once")


def test_results_are_in_the_order_of_the_inputs_however_they_were_done(abc: list[Frame], tmp_path: Path) -> None:
    run(tmp_path / "once", abc)
    record = Record(tmp_path / "out", abc)
    record.resume(S)
    with record:
        do(record, abc[::-1])
    assert content(tmp_path / "out") == content(tmp_path / "once")


def test_frames_that_come_before_those_that_are_done_move_them_on(abc: list[Frame], tmp_path: Path) -> None:
    last = placed(abc[2].path)
    run(tmp_path / "out", last)
    assert run(tmp_path / "out", abc) == ["a", "b"]
    assert [line["index"] for line in read_results(tmp_path / "out")] == [0, 1, 2]


def test_a_journal_that_was_cut_short_counts_up_to_its_last_whole_line(abc: list[Frame], tmp_path: Path) -> None:
    record = Record(tmp_path / "out", abc)
    record.resume(S)
    record.__enter__()
    do(record, abc[:2])  # and killed
    journal = tmp_path / "out" / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-7])
    (tmp_path / "out" / "masks" / "c_1.png").write_bytes(b"begun")
    (tmp_path / "out" / "masks" / ".1-2.tmp").write_bytes(b"half")
    record._lock.close()
    assert run(tmp_path / "out", abc) == ["b", "c"]
    run(tmp_path / "once", abc)
    assert content(tmp_path / "out") == content(tmp_path / "once")


@pytest.mark.parametrize("change", ["input", "mask", "no mask", "overlay", "failed"])
def test_a_frame_is_done_again_when_anything_of_it_changed(abc: list[Frame], tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    record = Record(out, abc)
    record.resume(S)
    with record:
        do(record, [abc[0], abc[2]], masks=2)
        if change == "failed":
            record.add(failure(abc[1], ["Where?"], "an empty file", S))
        else:
            do(record, [abc[1]], masks=2)
    match change:
        case "input":
            make_frame(seed=9).save(abc[1].path)
        case "mask":
            (out / "masks" / "b_1.png").write_bytes(b"drawn anew by hand")
        case "no mask":
            (out / "masks" / "b.png").unlink()
        case "overlay":
            (out / "overlays" / "b.jpg").write_bytes(b"")
    assert run(out, abc) == ["b"]
    assert {name for name in files(out) if Path(name).stem.startswith("b") and not name.endswith(".changed")} == {
        "masks/b.png",
        "overlays/b.jpg",
        "previews/b.jpg",
    }
    kept = {path.name: path.read_bytes() for path in out.rglob("*.changed")}
    assert kept == ({"b_1.png.changed": b"drawn anew by hand"} if change == "mask" else {})


def test_other_settings_or_other_inputs_need_overwrite(abc: list[Frame], tmp_path: Path) -> None:
    run(tmp_path / "out", abc)
    before = content(tmp_path / "out")
    with pytest.raises(VesselError, match=r"results of another bundle, device, question or version.*--overwrite"):
        run(tmp_path / "out", abc, settings="others")
    with pytest.raises(VesselError, match=r"results of 2 frames that are not among these inputs.*--overwrite"):
        run(tmp_path / "out", abc[:1])
    assert content(tmp_path / "out") == before
    assert run(tmp_path / "out", placed(abc[0].path), settings="others", overwrite=True) == ["a"]
    assert files(tmp_path / "out") == {"masks/a.png", "overlays/a.jpg", "previews/a.jpg", "results.jsonl", "timings.jsonl"}


def test_a_folder_with_something_else_in_it_needs_overwrite(abc: list[Frame], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(VesselError, match=r"not empty.*--overwrite"):
        Record(tmp_path / "out", abc)
    with pytest.raises(VesselError, match="is a file"):
        Record(tmp_path / "out" / "notes.txt", abc, overwrite=True)


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(abc: list[Frame], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, abc[:2], masks=2)
    foreign = [out / "notes.txt", out / "masks" / "corrected.png", out / "masks" / "c_gt.png"]
    for path in foreign:
        path.write_text("mine")
    run(out, placed(abc[2].path), overwrite=True)
    ours = {"masks/c.png", "overlays/c.jpg", "previews/c.jpg", "results.jsonl", "timings.jsonl"}
    assert files(out) == ours | {path.relative_to(out).as_posix() for path in foreign}
    assert {path.read_text() for path in foreign} == {"mine"}


@pytest.mark.parametrize("name", ["masks/c.png", "masks/c_1.png", "overlays/c.jpg", "masks/C.png"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_file_in_the_way_stops_the_run(abc: list[Frame], tmp_path: Path, name: str, overwrite: bool) -> None:
    run(tmp_path / "out", abc[:1])
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(VesselError, match="would be overwritten"):
        run(tmp_path / "out", [*abc[:1], abc[2]], overwrite=overwrite)
    assert (tmp_path / "out" / name).read_text() == "mine"
    assert (tmp_path / "out" / "masks" / "a.png").exists()


def test_results_that_are_not_ours_are_left_alone(abc: list[Frame], tmp_path: Path) -> None:
    for text in ("something else\n", '{"name": "a"}\n', "[]\n"):
        (tmp_path / "results.jsonl").write_text(text)
        for overwrite in (False, True):
            with pytest.raises(VesselError, match="not written by this version of vessel-rt"):
                Record(tmp_path, abc, overwrite)


def test_results_cannot_point_outside_their_folder(abc: list[Frame], tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim.png"
    run(out, abc[:1])
    victim.write_text("mine")
    [line] = read_results(out)
    line["files"] |= {"../victim.png": "0", str(victim): "0", "masks/../../victim.png": "0"}
    (out / "results.jsonl").write_text(json.dumps(line) + "\n")
    run(out, placed(abc[2].path), overwrite=True)
    assert victim.read_text() == "mine"


def test_an_input_is_never_removed(abc: list[Frame], tmp_path: Path) -> None:
    run(tmp_path / "out", abc[:1])
    again = placed(tmp_path / "out" / "overlays" / "a.jpg")
    with pytest.raises(VesselError, match="both an input and a result"):
        Record(tmp_path / "out", again, overwrite=True)


def test_two_runs_do_not_share_a_folder(abc: list[Frame], tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    record = Record(tmp_path / "out", abc)
    record.resume(S)
    with record, pytest.raises(VesselError, match="another run is writing here"):
        Record(tmp_path / "out", abc)
    Record(tmp_path / "out", abc)


def test_whatever_ends_a_run_what_is_done_is_listed_and_nothing_else_is_there(abc: list[Frame], tmp_path: Path) -> None:
    record = Record(tmp_path / "out", abc)
    record.resume(S)
    with pytest.raises(KeyboardInterrupt), record:  # noqa: PT012
        do(record, abc[:1])
        writer = FrameWriter(tmp_path / "out", ["a", "b", "c"], S)
        writer.write(abc[1], "0", make_frame(), [result_with(box_mask(0, 0, 1, 1))])
        raise KeyboardInterrupt
    assert files(tmp_path / "out") == {"masks/a.png", "overlays/a.jpg", "previews/a.jpg", "results.jsonl", "timings.jsonl"}
    assert [line["image"] for line in read_results(tmp_path / "out")] == ["a.jpg"]


@pytest.mark.skipif(os.name != "posix" or not shutil.which("mount"), reason="needs a small file system of its own")
def test_a_full_disk_leaves_whole_entries(tmp_path: Path, small_disk: Path) -> None:
    """Masks of noise on a file system of a few hundred kilobytes: it is full soon."""
    paths = []
    for number in range(40):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(paths[-1])
    frames = placed(*paths)
    noise = np.random.default_rng(0).random((400, 400)) < 0.5
    record = Record(small_disk / "out", frames)
    record.resume(S)
    with pytest.raises(VesselError, match="cannot be written \\(No space left on device\\)"), record:  # noqa: PT012
        writer = FrameWriter(record.folder, [frame.name for frame in frames], S)
        for frame in frames:
            record.add(writer.write(frame, input_sha256(frame.path), make_frame(400, 400), [result_with(noise)]))
    done = [entry.name for entry in Record(small_disk / "out", frames)._earlier.values()]
    assert 0 < len(done) < 40
    assert {path.stem for path in (small_disk / "out" / "masks").iterdir()} == set(done)
    assert not list(small_disk.rglob("*.tmp"))


def test_every_mask_that_was_drawn_by_hand_is_kept(abc: list[Frame], tmp_path: Path) -> None:
    for drawn in (b"first", b"second", b"third"):
        run(tmp_path / "out", abc)
        (tmp_path / "out" / "masks" / "b.png").write_bytes(drawn)
    run(tmp_path / "out", abc)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out" / "masks").glob("*.changed*")}
    assert kept == {"b.png.changed": b"first", "b.png.changed2": b"second", "b.png.changed3": b"third"}


def test_files_that_are_called_nearly_as_ours_are_left_alone(abc: list[Frame], tmp_path: Path) -> None:
    cine = [dataclasses.replace(abc[0], number=0, name="a_frame_000000")]
    run(tmp_path / "out", cine)
    (tmp_path / "out" / "cines").mkdir()
    for name in ("a.tif", "a_1.tif", "a_final.tif"):
        (tmp_path / "out" / "cines" / name).write_text("pages")
    run(tmp_path / "out", cine, overwrite=True)
    assert [path.name for path in (tmp_path / "out" / "cines").iterdir()] == ["a_final.tif"]


@pytest.mark.parametrize("name", ["metrics.csv", "report.html", "run.json"])
def test_overwrite_needs_a_run_to_replace_its_account(abc: list[Frame], tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(VesselError, match=f"holds {name}, but no run's results"):
        Record(tmp_path / "out", abc, overwrite=True)

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.disks import SmallDisk
from tests.support.frames import CODES, make_frame, placed, preview
from tests.support.journals import QUESTIONS, S, box_mask, content, do, files, look, opened, result_with, run
from vessel_rt.errors import VesselError
from vessel_rt.inputs.frames import Frame, input_sha256
from vessel_rt.inputs.pseudonyms import StudyCodes
from vessel_rt.results.reader import JOURNAL_FILE, read_results
from vessel_rt.results.writer import FrameWriter, failure
from vessel_rt.run.earlier import read_earlier


@pytest.fixture
def abc(frames: Path) -> list[Frame]:
    return placed(frames / "a.jpg", frames / "b.png", frames / "c.tif")


def test_what_is_done_is_kept_and_the_rest_is_left(abc: list[Frame], tmp_path: Path) -> None:
    assert run(tmp_path / "part", abc[:2]) == ["a", "b"]
    assert run(tmp_path / "part", abc) == ["c"]
    assert run(tmp_path / "part", abc) == []
    run(tmp_path / "once", abc)
    assert content(tmp_path / "part") == content(tmp_path / "once")


def test_results_are_in_the_order_of_the_inputs_however_they_were_done(abc: list[Frame], tmp_path: Path) -> None:
    run(tmp_path / "once", abc)
    with opened(tmp_path / "out", abc) as record, record:
        do(record, abc[::-1])
    assert content(tmp_path / "out") == content(tmp_path / "once")


def test_frames_that_come_before_those_that_are_done_move_them_on(abc: list[Frame], tmp_path: Path) -> None:
    last = placed(abc[2].path)
    run(tmp_path / "out", last)
    assert run(tmp_path / "out", abc) == ["a", "b"]
    assert [line["index"] for line in read_results(tmp_path / "out")] == [0, 1, 2]


def test_a_journal_that_was_cut_short_counts_up_to_its_last_whole_line(abc: list[Frame], tmp_path: Path) -> None:
    with opened(tmp_path / "out", abc) as record:
        record.__enter__()
        do(record, abc[:2])  # and killed
    journal = tmp_path / "out" / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-7])
    (tmp_path / "out" / "masks" / "c_1.png").write_bytes(b"begun")
    (tmp_path / "out" / "masks" / ".1-2.tmp").write_bytes(b"half")
    assert run(tmp_path / "out", abc) == ["b", "c"]
    run(tmp_path / "once", abc)
    assert content(tmp_path / "out") == content(tmp_path / "once")


@pytest.mark.parametrize("change", ["input", "mask", "no mask", "overlay", "failed"])
def test_a_frame_is_done_again_when_anything_of_it_changed(abc: list[Frame], tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    with opened(out, abc) as record, record:
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
    assert {
        name for name in files(out) if Path(name).stem.partition("_")[0] in ("b", CODES.code("b")) and not name.endswith(".changed")
    } == {
        "masks/b.png",
        "overlays/b.jpg",
        preview("b"),
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
    assert files(tmp_path / "out") == {"masks/a.png", "overlays/a.jpg", preview("a"), "results.jsonl", "timings.jsonl"}


def test_a_folder_with_something_else_in_it_needs_overwrite(abc: list[Frame], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(VesselError, match=r"not empty.*--overwrite"):
        look(tmp_path / "out", abc)
    with pytest.raises(VesselError, match="is a file"):
        look(tmp_path / "out" / "notes.txt", abc, overwrite=True)


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(abc: list[Frame], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, abc[:2], masks=2)
    foreign = [out / "notes.txt", out / "masks" / "corrected.png", out / "masks" / "c_gt.png"]
    for path in foreign:
        path.write_text("mine")
    run(out, placed(abc[2].path), overwrite=True)
    ours = {"masks/c.png", "overlays/c.jpg", preview("c"), "results.jsonl", "timings.jsonl"}
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
            with pytest.raises(VesselError, match=r"results\.jsonl: line 1: .*not in the format of this version"):
                look(tmp_path, abc, overwrite=overwrite)


def test_results_cannot_point_outside_their_folder(abc: list[Frame], tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim.png"
    run(out, abc[:1])
    victim.write_text("mine")
    [line] = read_results(out)
    for name in ("../victim.png", str(victim), "masks/../../victim.png", "masks/..", "masks/a\0.png", "masks/\ud800.png", "masks/"):
        (out / "results.jsonl").write_text(json.dumps(line | {"files": line["files"] | {name: "0"}}) + "\n")
        with pytest.raises(VesselError, match="files: lists a file outside"):
            run(out, placed(abc[2].path), overwrite=True)
    assert victim.read_text() == "mine"


def test_an_input_is_never_removed(abc: list[Frame], tmp_path: Path) -> None:
    run(tmp_path / "out", abc[:1])
    again = placed(tmp_path / "out" / "overlays" / "a.jpg")
    with pytest.raises(VesselError, match="both an input and a result"):
        look(tmp_path / "out", again, overwrite=True)


def test_two_runs_do_not_share_a_folder(abc: list[Frame], tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with opened(tmp_path / "out", abc), pytest.raises(VesselError, match="another command is at work"):
        look(tmp_path / "out", abc)
    look(tmp_path / "out", abc)


def test_whatever_ends_a_run_what_is_done_is_listed_and_nothing_else_is_there(abc: list[Frame], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "out", abc) as record, record:  # noqa: PT012
        do(record, abc[:1])
        writer = FrameWriter(tmp_path / "out", ["a", "b", "c"], S)
        writer.write(abc[1], "0", make_frame(), [result_with(box_mask(0, 0, 1, 1))])
        raise KeyboardInterrupt
    assert files(tmp_path / "out") == {"masks/a.png", "overlays/a.jpg", preview("a"), "results.jsonl", "timings.jsonl"}
    assert [line["image"] for line in read_results(tmp_path / "out")] == ["a.jpg"]


@pytest.mark.parametrize("limit", [450_000, 300_000], ids=["overlay", "journal"])  # bytes; which file is the first to exceed them
def test_a_full_disk_leaves_whole_entries(tmp_path: Path, small_disk: SmallDisk, limit: int) -> None:
    """Masks of noise, and a larger picture for every fifth frame."""
    paths = []
    for number in range(40):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(paths[-1])
    frames = placed(*paths)
    noise = np.random.default_rng(0).random((600, 600)) < 0.5
    out, refused = small_disk.folder / "out", pytest.raises(VesselError, match=re.escape(f"cannot be written ({small_disk.message})"))
    with refused, small_disk.full(limit), opened(out, frames) as record, record:
        writer = FrameWriter(record.folder, [frame.name for frame in frames], S)
        for number, frame in enumerate(frames, start=1):
            side = 400 if number % 5 else 600
            record.add(writer.write(frame, input_sha256(frame.path), make_frame(side, side), [result_with(noise[:side, :side])]))
    done = read_earlier(out).entries.keys()
    assert 0 < len(done) < 40
    assert {path.stem for path in (out / "masks").iterdir()} == set(done)
    assert not list(out.rglob("*.tmp"))


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
    for overwrite in (False, True):
        with pytest.raises(VesselError, match=f"would be overwritten; move {name} away"):
            look(tmp_path / "out", abc, overwrite=overwrite)


def test_a_frame_that_failed_and_is_gone_simply_goes(abc: list[Frame], tmp_path: Path) -> None:
    with opened(tmp_path / "out", abc) as record, record:
        do(record, [abc[0], abc[2]])
        record.add(failure(abc[1], QUESTIONS, "an empty file", S))
    left = placed(abc[0].path, abc[2].path)
    with opened(tmp_path / "out", left) as record:
        assert not record.is_settled
    assert run(tmp_path / "out", left) == []
    run(tmp_path / "once", left)
    assert content(tmp_path / "out") == content(tmp_path / "once")
    with opened(tmp_path / "out", left) as record:
        assert record.is_settled


def test_results_of_frames_that_are_gone_are_kept_until_they_are_pruned(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        make_frame(seed=number).save(path)
    frames, left = placed(*paths), placed(paths[5])
    run(tmp_path / "out", frames, masks=2)
    before = content(tmp_path / "out")
    with pytest.raises(VesselError, match=r"results of 5 frames that are not among these inputs.*--prune.*-o.*--overwrite") as caught:
        run(tmp_path / "out", left)
    assert content(tmp_path / "out") == before
    assert [frame.code in str(caught.value) for frame in frames] == [True] * 3 + [False] * 3
    (tmp_path / "out" / "masks" / "2_1.png").write_bytes(b"drawn by hand")
    (tmp_path / "out" / "masks" / "notes.txt").write_bytes(b"mine")
    assert run(tmp_path / "out", left, prune=True, masks=2) == []
    run(tmp_path / "once", left, masks=2)
    others = {"masks/2_1.png.changed": b"drawn by hand", "masks/notes.txt": b"mine"}
    assert content(tmp_path / "out") == content(tmp_path / "once") | others
    assert run(tmp_path / "out", frames, masks=2) == ["0", "1", "2", "3", "4"]  # more inputs need no option


@pytest.mark.parametrize("why", ["permission", "gone", "a folder"])
def test_what_was_made_of_an_input_that_cannot_be_read_now_is_kept(abc: list[Frame], tmp_path: Path, why: str, unprivileged: None) -> None:
    out, path = tmp_path / "out", abc[1].path
    run(out, abc)
    before, picture = content(out), path.read_bytes()
    if why == "permission":
        path.chmod(0)
    else:
        path.unlink()
        if why == "a folder":
            path.mkdir()
    with opened(out, abc) as record:
        said = {"permission": "Permission denied", "gone": "no such file", "a folder": "not a regular file"}[why]
        assert list(record.unread) == ["b"]
        assert said in record.unread["b"]
        assert record.is_settled
    assert run(out, abc) == []
    assert content(out) == before
    if why == "a folder":
        path.rmdir()
    if why != "permission":
        path.write_bytes(b"")
    path.chmod(0o600)
    path.write_bytes(picture + b"\0")  # readable again, and another: now what was made of it is out of date
    assert run(out, abc) == ["b"]


def test_without_its_files_a_frame_whose_input_cannot_be_read_is_not_done(abc: list[Frame], tmp_path: Path) -> None:
    run(tmp_path / "out", abc)
    (tmp_path / "out" / "masks" / "b.png").unlink()
    abc[1].path.unlink()
    with opened(tmp_path / "out", abc) as record:
        assert record.unread == {}
        assert "b" not in [entry.name for entry in record.kept]


def test_a_mask_that_was_drawn_by_hand_is_kept_though_its_input_cannot_be_read(abc: list[Frame], tmp_path: Path) -> None:
    run(tmp_path / "out", abc)
    (tmp_path / "out" / "masks" / "b.png").write_bytes(b"drawn by hand")
    abc[1].path.unlink()
    before = content(tmp_path / "out")
    assert run(tmp_path / "out", abc) == []
    assert content(tmp_path / "out") == before


def test_overwriting_keeps_masks_that_were_drawn_by_hand(abc: list[Frame], tmp_path: Path) -> None:
    run(tmp_path / "out", abc, masks=2)
    (tmp_path / "out" / "masks" / "b_1.png").write_bytes(b"drawn by hand")
    run(tmp_path / "out", abc, overwrite=True, masks=2)
    run(tmp_path / "once", abc, masks=2)
    assert content(tmp_path / "out") == content(tmp_path / "once") | {"masks/b_1.png.changed": b"drawn by hand"}


@pytest.mark.skipif(os.name != "posix", reason="the files are POSIX's")
@pytest.mark.parametrize("kind", ["masks/b.png", "overlays/b.jpg"])
@pytest.mark.parametrize("what", ["fifo", "folder", "device", "unreadable"])
def test_whatever_stands_where_a_result_was_the_frame_is_done_again(
    abc: list[Frame], tmp_path: Path, kind: str, what: str, unprivileged: None
) -> None:
    run(tmp_path / "out", abc)
    place = tmp_path / "out" / kind
    mask = place.read_bytes()
    if what != "unreadable":
        place.unlink()
    match what:
        case "fifo":
            os.mkfifo(place)
        case "folder":
            place.mkdir()
            (place / "mine").write_text("mine")
        case "device":
            place.symlink_to("/dev/zero")
        case "unreadable":
            place.write_bytes(b"drawn by hand")
            place.chmod(0)
    assert run(tmp_path / "out", abc) == ["b"]
    assert place.read_bytes() == mask
    kept = place.with_name(f"{place.name}.changed")
    assert os.path.lexists(kept) == (kind.startswith("masks") or what == "folder")
    if what == "folder":
        assert (kept / "mine").read_text() == "mine"


def test_a_mask_whose_name_is_as_long_as_names_can_be_is_kept_under_a_shorter_one(tmp_path: Path) -> None:
    frames = placed(tmp_path / f"{'é' * 125}.png")
    make_frame().save(frames[0].path)
    for drawn in (b"first", b"second"):
        run(tmp_path / "out", frames)
        (tmp_path / "out" / "masks" / f"{frames[0].name}.png").write_bytes(drawn)
    run(tmp_path / "out", frames)
    assert sorted(path.read_bytes() for path in (tmp_path / "out" / "masks").glob("*.changed*")) == [b"first", b"second"]


def test_a_run_that_was_killed_before_its_first_file_is_no_obstacle(abc: list[Frame], tmp_path: Path) -> None:
    for kind in ("masks", "overlays", "previews"):
        (tmp_path / "out" / kind).mkdir(parents=True)
    (tmp_path / "out" / ".12-34.tmp").write_bytes(b"half")
    assert run(tmp_path / "out", abc) == ["a", "b", "c"]
    assert not list((tmp_path / "out").glob(".*"))


def test_hidden_files_of_others_stay(abc: list[Frame], tmp_path: Path) -> None:
    run(tmp_path / "out", abc[:1])
    for name in (".mine.tmp", "masks/.mine.tmp"):
        (tmp_path / "out" / name).write_text("mine")
    run(tmp_path / "out", abc)
    assert {name for name in files(tmp_path / "out") if "mine" in name} == {".mine.tmp", "masks/.mine.tmp"}


@pytest.mark.parametrize("empty", [False, True])
def test_a_folder_that_is_replaced_during_a_run_ends_it_and_is_left_alone(abc: list[Frame], tmp_path: Path, empty: bool) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    with pytest.raises(VesselError, match="was moved or replaced"), opened(out, abc) as record, record:  # noqa: PT012
        do(record, abc[:1])
        out.rename(moved)
        if empty:
            out.mkdir()
        else:
            shutil.copytree(moved, out)
            (out / "masks" / "b.png").write_bytes(b"mine")
        do(record, abc[1:2]) if not empty else record.add(failure(abc[1], QUESTIONS, "none", S))
    assert run(moved, abc) == ["b", "c"]
    assert empty == (not any(out.iterdir()))


@pytest.mark.parametrize("how", ["gone", "changed", "cut"])
def test_a_journal_that_somebody_touches_during_the_run(abc: list[Frame], tmp_path: Path, how: str) -> None:
    out = tmp_path / "out"
    run(tmp_path / "once", abc)
    ends = contextlib.nullcontext() if how == "gone" else pytest.raises(VesselError, match="changed while the run wrote it")
    with ends, opened(out, abc) as record, record:
        do(record, abc)
        journal = out / JOURNAL_FILE
        text = journal.read_bytes()
        match how:
            case "gone":
                journal.unlink()
            case "changed":
                journal.write_bytes(text.replace(b'"lines"', b'"limes"'))
            case "cut":
                journal.write_bytes(text[: len(text) // 2])
    if how == "gone":
        assert content(out) == content(tmp_path / "once")
    else:
        assert {"masks/a.png", "masks/b.png", "masks/c.png"} <= files(out)


def operations(call: Callable[[], object]) -> int:
    """How many functions are called, those of threads that it starts, too."""
    count = itertools.count()

    def profile(frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            next(count)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return next(count)


def test_resuming_takes_as_many_steps_as_there_are_frames(tmp_path: Path) -> None:
    def resume(folder: Path, frames: Sequence[Frame]) -> None:
        with opened(folder, frames) as record, record:
            assert len(record.kept) == len(frames)

    steps = []
    for count in (100, 200, 400):
        frames = placed(*(tmp_path / f"{number:03}.png" for number in range(count)))
        for frame in frames:
            frame.path.write_bytes(b"")
        with opened(tmp_path / str(count), frames) as record, record:
            do(record, frames)
        steps.append(operations(lambda folder=tmp_path / str(count), frames=frames: resume(folder, frames)))  # type: ignore[misc]
    first, second = steps[1] - steps[0], steps[2] - steps[1]
    assert second < 2.2 * first


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the journal sees, as its only item."""
    now = [100.0]
    monkeypatch.setattr("vessel_rt.run.journal.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were synced, in order."""
    noted: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: noted.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
    return noted


@pytest.mark.skipif(sys.platform != "linux", reason="the names of open files are in /proc")
def test_the_journal_is_synced_every_five_seconds_and_at_the_end(tmp_path: Path, clock: list[float], synced: list[str]) -> None:
    frames = placed(*(tmp_path / f"{number:02}.png" for number in range(20)))
    for frame in frames:
        frame.path.write_bytes(b"")
    with opened(tmp_path / "out", frames) as record, record:
        assert len(synced) == 2  # the new journal, and its folder
        for frame in frames:
            clock[0] += 1
            do(record, [frame])
        assert synced[2:] == ["journal.jsonl"] * 4
        synced.clear()
    assert synced[0] == "journal.jsonl"
    assert len(synced) == 5  # results.jsonl and timings.jsonl, each with its folder
    assert not (tmp_path / "out" / JOURNAL_FILE).exists()


def test_results_are_on_the_disk_before_the_journal_is_gone(
    abc: list[Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: list[str]
) -> None:
    before: list[int] = []
    unlink = Path.unlink

    def noted(path: Path, missing_ok: bool = False) -> None:
        if path.name == JOURNAL_FILE:
            before.append(len(synced))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)
    run(tmp_path / "out", abc)
    assert before == [len(synced)]


def _killed(out: Path, frames: Sequence[Frame], done: int) -> Path:
    """The journal of a run that was killed when these frames were done."""
    with opened(out, frames) as record:
        record.__enter__()
        do(record, frames[:done])
    return out / JOURNAL_FILE


@pytest.mark.parametrize("left", [0, 1, 200, -1])
@pytest.mark.parametrize("tail", [b"", bytes(4096), bytes(300) + b'"b"}]}\n{"name": "c"'])
def test_a_journal_whose_end_a_power_failure_took_counts_up_to_there(abc: list[Frame], tmp_path: Path, left: int, tail: bytes) -> None:
    """`left` bytes of the second entry are there, and what else its blocks hold."""
    out = tmp_path / "out"
    journal = _killed(out, abc, 2)
    planned, first, second = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(planned + first + second[:left] + tail)
    assert run(out, abc) == ["b", "c"]
    run(tmp_path / "once", abc)
    assert content(out) == content(tmp_path / "once")


@pytest.mark.parametrize("kind", ["masks", "overlays", "previews"])
@pytest.mark.parametrize("how", ["missing", "empty", "short", "zeros"])
@pytest.mark.parametrize("killed", [True, False])
def test_a_file_that_a_power_failure_took_is_made_again(abc: list[Frame], tmp_path: Path, kind: str, how: str, killed: bool) -> None:
    """Its entry was on the disk before it."""
    out = tmp_path / "out"
    if killed:
        _killed(out, abc, 2)
    else:
        run(out, abc)
    [path] = [path for path in (out / kind).iterdir() if path.stem in ("b", abc[1].code)]
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "short": whole[: len(whole) // 2], "zeros": bytes(len(whole))}[how])
    assert run(out, abc) == (["b", "c"] if killed else ["b"])
    run(tmp_path / "once", abc)
    assert content(out) == content(tmp_path / "once")


def test_an_empty_mask_is_no_result_of_an_input_that_cannot_be_read(abc: list[Frame], tmp_path: Path) -> None:
    run(tmp_path / "out", abc)
    (tmp_path / "out" / "masks" / "b.png").write_bytes(b"")
    abc[1].path.unlink()
    with opened(tmp_path / "out", abc) as record:
        assert "b" not in [entry.name for entry in record.kept]


def _recoded(frames: Sequence[Frame]) -> list[Frame]:
    """The frames under another key of study codes."""
    codes = StudyCodes(b"another key")
    return [dataclasses.replace(frame, code=codes.code(frame.path.stem)) for frame in frames]


def test_previews_follow_the_key_of_study_codes(abc: list[Frame], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, abc[:2])
    assert run(out, _recoded(abc)) == ["c"]
    run(tmp_path / "once", _recoded(abc))
    assert content(out) == content(tmp_path / "once")


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_run_that_was_killed_goes_on_with_another_key(abc: list[Frame], tmp_path: Path, done: int) -> None:
    out = tmp_path / "out"
    _killed(out, abc, done)
    (out / preview("c")).write_bytes(b"begun")
    run(out, _recoded(abc))
    run(tmp_path / "once", _recoded(abc))
    assert content(out) == content(tmp_path / "once")


@pytest.mark.parametrize("name", ["journal.jsonl", "results.jsonl"])
def test_a_run_that_is_killed_while_it_changes_study_codes_is_no_obstacle(
    abc: list[Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before the journal is written, and before what it replaces is removed."""
    out = tmp_path / "out"
    run(out, abc)
    replace, unlink = os.replace, Path.unlink

    def killed_replace(source: Path, target: Path) -> None:
        if target.name == name:
            raise KeyboardInterrupt
        replace(source, target)

    def killed_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_replace)
        patch.setattr(Path, "unlink", killed_unlink)
        with pytest.raises(KeyboardInterrupt), opened(out, _recoded(abc)) as record:
            record.__enter__()
    assert run(out, _recoded(abc)) == []
    run(tmp_path / "once", _recoded(abc))
    assert content(out) == content(tmp_path / "once")

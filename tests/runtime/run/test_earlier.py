"""What stands in an output folder before a run, and whether what a message advises mends it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.frames import placed
from tests.support.journals import content, do, files, look, opened, run
from vessel_rt.errors import VesselError
from vessel_rt.inputs.frames import Frame
from vessel_rt.results.reader import JOURNAL_FILE, iter_timings, read_results


@pytest.fixture
def abc(frames: Path) -> list[Frame]:
    return placed(frames / "a.jpg", frames / "b.png", frames / "c.tif")


@pytest.fixture
def out(abc: list[Frame], tmp_path: Path) -> Path:
    run(tmp_path / "out", abc)
    return tmp_path / "out"


@pytest.fixture
def killed(abc: list[Frame], tmp_path: Path) -> Path:
    """Of a run that was killed when two frames were done."""
    with opened(tmp_path / "killed", abc) as record:
        record.__enter__()
        do(record, abc[:2])
    return tmp_path / "killed"


def refused(folder: Path, frames: list[Frame], match: str, mend: Callable[[], object], left: list[str]) -> None:
    """With and without --overwrite the folder is refused and left alone; another one can be taken; `mend` lets the run go on."""
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    for overwrite in (False, True):
        with pytest.raises(VesselError, match=match) as caught:
            look(folder, frames, overwrite=overwrite)
        assert ("another output folder" in str(caught.value)) != ("Permission denied" in str(caught.value))
        assert "delete" not in str(caught.value)
        assert "--overwrite" not in str(caught.value)
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before
    assert run(folder.with_name("another"), frames) == [frame.name for frame in frames]
    mend()
    assert run(folder, frames) == left


@pytest.mark.parametrize("name", ["results.jsonl", "timings.jsonl"])
def test_results_that_may_not_be_read(out: Path, abc: list[Frame], name: str, unprivileged: None) -> None:
    (out / name).chmod(0)
    refused(out, abc, rf"{name}: cannot be read \(Permission denied\); change its permissions", lambda: (out / name).chmod(0o600), [])


def test_a_journal_that_may_not_be_read(killed: Path, abc: list[Frame], unprivileged: None) -> None:
    (killed / JOURNAL_FILE).chmod(0)
    refused(killed, abc, r"journal\.jsonl: cannot be read \(Permission denied\)", lambda: (killed / JOURNAL_FILE).chmod(0o600), ["c"])


@pytest.mark.skipif(os.name != "posix", reason="the files are POSIX's")
@pytest.mark.parametrize("name", ["results.jsonl", "timings.jsonl", "run.json", "report.html", "evaluation.json", "journal.jsonl"])
@pytest.mark.parametrize("what", ["fifo", "device", "folder"])
def test_what_is_no_file(out: Path, abc: list[Frame], name: str, what: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    if (out / name).exists():
        (out / name).rename(kept)
    if what == "fifo":
        os.mkfifo(out / name)
    elif what == "device":
        (out / name).symlink_to("/dev/zero")
    else:
        (out / name).mkdir()

    def mend() -> None:
        (out / name).rename(tmp_path / "away")
        if kept.exists():
            kept.rename(out / name)

    refused(out, abc, rf"{name}: not a regular file; move it away", mend, [])


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "of others", "no lines"])
def test_without_its_times_a_run_goes_on(out: Path, abc: list[Frame], damage: str) -> None:
    path, results = out / "timings.jsonl", (out / "results.jsonl").read_bytes()
    text = path.read_text()
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_text("")
        case "cut":
            path.write_text(text[:-30])
        case "of others":
            path.write_text(text.replace("Where?", "What?"))
        case "no lines":
            path.write_text("[]\n" * 3)
    with opened(out, abc) as record:
        assert not record.is_settled
    assert run(out, abc) == []
    assert (out / "results.jsonl").read_bytes() == results
    timings = [line for lines in iter_timings(out) for line in lines]
    assert [(line["index"], line["ms"], line["decode_steps"]) for line in timings] == [(index, {}, None) for index in range(3)]
    with opened(out, abc) as record:
        assert record.is_settled


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda text: text.replace('"question"', '"questions"', 2), r"results\.jsonl: line 1: missing key question"),
        (lambda text: text[:-40], r"results\.jsonl: line 3: not JSON"),
        (lambda text: "\n\n" + text[: len(text) // 2] + "\0" + text[len(text) // 2 :], r"results\.jsonl: line [45]: not JSON"),
        (lambda text: text + text, r"results\.jsonl: line 4: 'index' is less"),
        (lambda text: text.replace('"name": "b"', '"name": "a"'), r"results\.jsonl: line 2: two frames have one 'name'"),
    ],
)
def test_a_line_that_is_damaged_is_named(out: Path, abc: list[Frame], damage: Callable[[str], str], match: str) -> None:
    text = (out / "results.jsonl").read_text()
    (out / "results.jsonl").write_text(damage(text))
    refused(out, abc, match, lambda: (out / "results.jsonl").write_text(text), [])


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda text: text.replace('"lines"', '"linse"', 1), r"journal\.jsonl: line 2: missing key lines"),
        (lambda text: text.replace("planned", "plan"), r"journal\.jsonl: line 1: missing key planned"),
        (lambda text: "", r"journal\.jsonl: empty"),
        (lambda text: text[:5], r"journal\.jsonl: empty"),
    ],
)
def test_a_journal_that_is_damaged_is_refused(killed: Path, abc: list[Frame], damage: Callable[[str], str], match: str) -> None:
    text = (killed / JOURNAL_FILE).read_text()
    (killed / JOURNAL_FILE).write_text(damage(text))
    refused(killed, abc, match, lambda: (killed / JOURNAL_FILE).write_text(text), ["c"])


def test_fields_that_are_not_known_are_ignored(killed: Path, abc: list[Frame]) -> None:
    text = (killed / JOURNAL_FILE).read_text()
    (killed / JOURNAL_FILE).write_text(text.replace('"name"', '"newer": 1, "name"').replace('"planned"', '"newer": 1, "planned"'))
    assert run(killed, abc) == ["c"]


def test_a_folder_of_another_version_is_said_to_be_one(out: Path, abc: list[Frame]) -> None:
    text = (out / "results.jsonl").read_text()
    (out / "results.jsonl").write_text(text.replace('"settings"', '"settings_hash"'))
    (out / "run.json").write_text(json.dumps({"versions": {"vessel-rt": "9.9.9"}}))
    refused(out, abc, r"missing key settings; written by vessel-rt 9\.9\.9, this is", lambda: (out / "results.jsonl").write_text(text), [])


def test_what_an_editor_makes_of_it_does_not_matter(out: Path, abc: list[Frame]) -> None:
    before = content(out)
    text = (out / "results.jsonl").read_text().rstrip("\n").replace("\n", "\r\n\r\n")
    (out / "results.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert run(out, abc) == []
    assert content(out) == before


@pytest.mark.parametrize("gone", ["results.jsonl", "all but masks"])
def test_without_results_what_would_be_overwritten_is_named(out: Path, abc: list[Frame], gone: str, tmp_path: Path) -> None:
    """What --overwrite would refuse is not advised: that names, at once, all that has to be moved away."""
    (out / "results.jsonl").unlink()
    places = ["masks/", "overlays/", "previews/", "timings.jsonl"]
    if gone == "all but masks":
        for name in ("overlays", "previews"):
            shutil.rmtree(out / name)
        (out / "timings.jsonl").unlink()
        places = ["masks/"]

    def mend() -> None:
        (tmp_path / "away").mkdir()
        for name in places:
            (out / name).rename(tmp_path / "away" / name)

    refused(out, abc, f"move {', '.join(places)} away", mend, ["a", "b", "c"])
    assert "masks/a.png" in files(tmp_path / "away")


def test_two_questions_of_which_one_line_is_gone(abc: list[Frame], out: Path) -> None:
    lines = read_results(out)
    lines += [line | {"question": "What?"} for line in lines]
    lines.sort(key=lambda line: line["index"])
    del lines[1]
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(VesselError, match=r"results\.jsonl: line 3: a frame has other questions"):
        look(out, abc)


@pytest.mark.parametrize("field", ["settings", "index", "name", "files", "masks", "input"])
@pytest.mark.parametrize("value", [None, True, -1, 10**400, 1.5, "\ud800", "", [], [None], {}, {"a": "b"}, [[]] * 1000])
def test_fields_of_other_kinds(out: Path, abc: list[Frame], field: str, value: Any) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*.*g")}
    first, *others = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text(json.dumps(json.loads(first) | {field: value}) + "\n" + "".join(others))
    with contextlib.suppress(VesselError):
        look(out, abc)
    assert {path: path.read_bytes() for path in out.rglob("*.*g")} == before

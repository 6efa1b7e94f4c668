"""Every reader of an output folder, given files that were edited by hand: one line each, that names the file, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.frames import make_frame
from vessel_rt.cli import main
from vessel_rt.formats.bundle import Bundle

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the files are POSIX's")

Edit = Callable[[Any], Any]


@pytest.fixture(scope="module")
def sound(standin: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """frames/, gt/, two shards and the whole of a run, evaluated; not to be written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VESSEL_KEY", str(tmp_path_factory.getbasetemp() / "study-codes.key"))  # as for each test
        yield _make(standin, tmp_path_factory.mktemp("sound"))


def _make(standin: Bundle, place: Path) -> Path:
    for folder in ("frames", "gt"):
        (place / folder).mkdir()
    for name in "abc":
        make_frame().save(place / "frames" / f"{name}.png")
        Image.fromarray(np.eye(64, 96, dtype=np.uint8) * 255).save(place / "gt" / f"{name}.png")
    common = ["infer", str(place / "frames"), "--bundle", str(standin.folder), "--device", "cpu", "-q"]
    assert main([*common, "-o", str(place / "out")]) == 0
    for shard in "01":
        assert main([*common, "-o", str(place / f"shard{shard}"), "--num-shards", "2", "--shard-id", shard]) == 0
    assert main(["evaluate", str(place / "out"), "--gt", str(place / "gt")]) == 0
    return place


def readers(place: Path, bundle: Bundle) -> Iterator[tuple[str, list[str]]]:
    """Every command that reads `out`, or `shard0`, which was edited alike."""
    common = ["infer", str(place / "frames"), "--bundle", str(bundle.folder), "--device", "cpu", "-q"]
    yield "resume", [*common, "-o", str(place / "out")]
    yield "evaluate", ["evaluate", str(place / "out"), "--gt", str(place / "gt")]
    yield "report", ["report", str(place / "out")]
    yield "merge-shards", ["merge-shards", str(place / "shard0"), str(place / "shard1"), "-o", str(place / "merged")]


def read_edited(sound: Path, bundle: Bundle, tmp_path: Path, name: str, edit: Callable[[Path], object], capfd: Any) -> dict[str, int]:
    """The exit code of each reader, of whose errors each is one line."""
    codes = {}
    for reader, command in readers(tmp_path / "place", bundle):
        shutil.copytree(sound, tmp_path / "place")
        for folder in ("out", "shard0"):
            if name != "evaluation.json" or folder == "out":
                edit(tmp_path / "place" / folder / name)
        before = {path: path.read_bytes() for path in tmp_path.rglob("masks/*")}
        codes[reader] = main(command)
        lines = capfd.readouterr().err.splitlines()
        if codes[reader]:
            assert len(lines) == 1, (reader, lines)
            assert lines[0].startswith("vessel-rt: error: "), (reader, lines)
            assert name in lines[0] or "shard0" in lines[0], (reader, lines)
        after = {path: path.read_bytes() for path in tmp_path.rglob("masks/*")}
        assert before.items() <= after.items(), reader
        assert codes["merge-shards"] == 0 or not (tmp_path / "place" / "merged").exists() if reader == "merge-shards" else True
        shutil.rmtree(tmp_path / "place")
    return codes


def of_line(edit: Edit) -> Callable[[Path], None]:
    """An edit of the first line, or of the only value."""

    def apply(path: Path) -> None:
        first, end, others = path.read_text().partition("\n") if path.suffix == ".jsonl" else (path.read_text(), "", "")
        path.write_text(json.dumps(edit(json.loads(first))) + end + others)

    return apply


def of_rle(**fields: Any) -> Edit:
    return lambda line: line | {"masks": [mask | {"rle": mask["rle"] | fields} for mask in line["masks"]]}


def of_mask(**fields: Any) -> Edit:
    return lambda line: line | {"masks": [mask | fields for mask in line["masks"]]}


@pytest.mark.parametrize(
    "edit",
    [
        lambda line: [line],
        lambda line: None,
        lambda line: line | {"masks": None},
        lambda line: line | {"masks": 3},
        lambda line: line | {"masks": [None]},
        lambda line: line | {"masks": [{}]},
        lambda line: line | {"files": []},
        lambda line: line | {"files": {"masks/../../x.png": "0"}},
        lambda line: line | {"width": "96"},
        lambda line: line | {"width": 10**9},
        lambda line: line | {"height": None},
        lambda line: line | {"index": "0"},
        lambda line: line | {"index": 10**400},
        lambda line: line | {"name": "../a"},
        lambda line: line | {"name": None},
        lambda line: line | {"frame": "x"},
        lambda line: line | {"status": "fine"},
        lambda line: {key: value for key, value in line.items() if key != "question"},
        of_mask(file="run.json"),
        of_mask(file="/dev/zero"),
        of_mask(iou=float("nan")),
        of_mask(rle=None),
        of_rle(counts=7),
        of_rle(size=[10**6, 10**6]),
        of_rle(size=[64]),
    ],
)
def test_edited_results(sound: Path, standin: Bundle, tmp_path: Path, edit: Edit, capfd: pytest.CaptureFixture[str]) -> None:
    assert set(read_edited(sound, standin, tmp_path, "results.jsonl", of_line(edit), capfd).values()) == {1}


@pytest.mark.parametrize(
    "fields", [{"counts": "o" * 10**5}, {"counts": ""}, {"counts": "\ud800"}, {"size": [64, 97]}, {"size": [8192, 8192]}]
)
def test_masks_that_are_none(sound: Path, standin: Bundle, tmp_path: Path, fields: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The frame is done again: it is not what was written."""
    codes = read_edited(sound, standin, tmp_path, "results.jsonl", of_line(of_rle(**fields)), capfd)
    assert codes == {"resume": 0, "evaluate": 1, "report": 1, "merge-shards": 1}


@pytest.mark.parametrize(
    "edit",
    [
        lambda line: [],
        lambda line: line | {"ms": None},
        lambda line: line | {"ms": {"read": "fast"}},
        lambda line: line | {"ms": {"read": float("inf")}},
        lambda line: line | {"index": 7},
        lambda line: line | {"decode_steps": "none"},
        lambda line: {},
    ],
)
def test_edited_times(sound: Path, standin: Bundle, tmp_path: Path, edit: Edit, capfd: pytest.CaptureFixture[str]) -> None:
    codes = read_edited(sound, standin, tmp_path, "timings.jsonl", of_line(edit), capfd)
    assert codes == {"resume": 0, "evaluate": 1, "report": 1, "merge-shards": 1}  # evaluate makes the report anew


@pytest.mark.parametrize(
    "edit",
    [
        lambda run: [],
        lambda run: {},
        lambda run: None,
        lambda run: run | {"options": None},
        lambda run: run | {"options": run["options"] | {"show_names": "yes"}},
        lambda run: run | {"options": run["options"] | {"shard_id": "0"}},
        lambda run: run | {"counts": {"in_all_shards": 10**15, "images": "3"}},
        lambda run: run | {"seconds": {"load": None}},
        lambda run: run | {"peak_memory_bytes": "much"},
        lambda run: run | {"device": 3},
    ],
)
def test_an_edited_account_of_the_run(sound: Path, standin: Bundle, tmp_path: Path, edit: Edit, capfd: pytest.CaptureFixture[str]) -> None:
    codes = read_edited(sound, standin, tmp_path, "run.json", of_line(edit), capfd)
    assert codes == {"resume": 0, "evaluate": 1, "report": 1, "merge-shards": 1}


def test_a_number_of_frames_that_no_run_has(sound: Path, standin: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit = of_line(lambda run: run | {"counts": run["counts"] | {"in_all_shards": 2**50}})
    assert read_edited(sound, standin, tmp_path, "run.json", edit, capfd)["merge-shards"] == 1


@pytest.mark.parametrize(
    "edit",
    [
        lambda found: [],
        lambda found: found | {"images": None},
        lambda found: found | {"images": [{}]},
        lambda found: found | {"images": [image | {"truth_rle": {"size": [10**6, 10**6], "counts": "0"}} for image in found["images"]]},
        lambda found: found | {"images": [image | {"truth_rle": {"size": [64, 96], "counts": "o"}} for image in found["images"]]},
        lambda found: found | {"metrics": ["dice", "fame"]},
        lambda found: found | {"summary": [{"mean": 1}]},
    ],
)
def test_an_edited_evaluation(sound: Path, standin: Bundle, tmp_path: Path, edit: Edit, capfd: pytest.CaptureFixture[str]) -> None:
    codes = read_edited(sound, standin, tmp_path, "evaluation.json", of_line(edit), capfd)
    assert codes == {"resume": 0, "evaluate": 0, "report": 1, "merge-shards": 0}  # evaluate writes it anew


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize("name", ["results.jsonl", "timings.jsonl", "run.json", "evaluation.json"])
@pytest.mark.parametrize(
    "edit",
    [
        _bytes(b"[" * 100_000),
        _bytes(b'{"a":' * 100_000),
        _bytes(b"1" * 10_000),
        _bytes(b"\xff\xfe\0"),
        _bytes(b"\0" * 1000),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_what_is_no_json_or_no_file(
    sound: Path, standin: Bundle, tmp_path: Path, name: str, edit: Callable[[Path], object], capfd: pytest.CaptureFixture[str]
) -> None:
    codes = read_edited(sound, standin, tmp_path, name, edit, capfd)
    assert codes["report"] == 1
    assert codes["evaluate"] == 1 or name == "evaluation.json"
    assert codes["merge-shards"] == 1 or name == "evaluation.json"


@pytest.mark.parametrize("what", ["fifo", "device", "folder", "bomb"])
def test_a_preview_that_is_none(sound: Path, standin: Bundle, tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    place = shutil.copytree(sound, tmp_path / "place")
    [picture, *_] = (place / "out" / "previews").iterdir()
    picture.unlink()
    match what:
        case "fifo":
            os.mkfifo(picture)
        case "device":
            picture.symlink_to("/dev/zero")
        case "folder":
            picture.mkdir()
        case "bomb":
            Image.new("L", (65000, 1)).save(picture)
            content = picture.read_bytes()
            at = content.index(b"\xff\xc0") + 5
            picture.write_bytes(content[:at] + b"\xff\xff\xff\xff" + content[at + 4 :] + b"\0" * 30_000_000)
    assert main(["report", str(place / "out")]) == (1 if what == "bomb" else 0)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["results.jsonl", "timings.jsonl", "run.json", "evaluation.json"])
def test_a_newer_schema_is_said_to_be_one(sound: Path, standin: Bundle, tmp_path: Path, name: str, capfd: Any) -> None:
    place = tmp_path / "place"
    shutil.copytree(sound, place)
    path = place / "out" / name
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    assert main(["report", str(place / "out")]) == 1
    said = capfd.readouterr().err
    assert re.search(rf"{name}: (line 1: )?schema 2 is newer than 1.*upgrade vessel-rt\n\Z", said), said

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.frames import make_frame
from tests.support.runs import options, same_results
from vessel_rt.errors import VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.frames import Selection
from vessel_rt.results.merge_shards import merge
from vessel_rt.run.infer import infer


@pytest.fixture
def parts(standin: Bundle, frames: Path, tmp_path: Path) -> list[Path]:
    """Two parts of three frames; see test_cli for what comes of them."""
    for part in range(2):
        infer(standin, options(frames, tmp_path / f"part{part}", selection=Selection(parts=2, part=part)))
    return [tmp_path / "part0", tmp_path / "part1"]


def change(path: Path, edit: Any) -> None:
    run = json.loads(path.read_text())
    edit(run)
    path.write_text(json.dumps(run))


def test_parts_that_do_not_belong_together(parts: list[Path], standin: Bundle, frames: Path, tmp_path: Path) -> None:
    make_frame().save(frames / "later.png")
    infer(standin, options(frames, tmp_path / "later", selection=Selection(parts=2, part=1)))
    infer(standin, options(frames, tmp_path / "other", "Where?", selection=Selection(parts=2, part=1)))
    for given, message in [
        (parts[:1], "one of 2 parts; 1 were given"),
        ([parts[0], parts[0]], None),
        ([parts[0], tmp_path / "none"], r"run\.json: missing"),
        ([parts[0], tmp_path / "later"], "inputs were not those of the other parts"),
        ([parts[0], tmp_path / "other"], "another bundle, device, question"),
    ]:
        with pytest.raises(VesselError, match=message):
            merge(given, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_was_changed_is_not_merged(parts: list[Path], tmp_path: Path) -> None:
    (parts[1] / "masks" / "b.png").write_bytes(b"another")
    with pytest.raises(VesselError, match=r"part1: a file of \w{12} in masks/ was changed"):
        merge(parts, tmp_path / "merged")
    (parts[1] / "masks" / "b.png").unlink()
    with pytest.raises(VesselError, match=r"part1: a file of \w{12} cannot be read"):
        merge(parts, tmp_path / "again")


def test_an_unfinished_part_is_not_merged(parts: list[Path], tmp_path: Path) -> None:
    (parts[1] / "run.json").unlink()
    with pytest.raises(VesselError, match=r"part1/run\.json: missing"):
        merge(parts, tmp_path / "merged")


def test_a_folder_with_something_in_it_is_not_merged_into(parts: list[Path]) -> None:
    with pytest.raises(VesselError, match="not empty"):
        merge(parts, parts[0])


def test_results_cannot_point_outside_their_folder(parts: list[Path], tmp_path: Path) -> None:
    line = json.loads((parts[1] / "results.jsonl").read_text())
    line["files"] = {"masks/../../victim.png": "0"}
    (parts[1] / "results.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(VesselError, match="'files' is not what it has to be"):
        merge(parts, tmp_path / "merged")


@pytest.mark.parametrize("place", [0, 1])
def test_a_further_mask_never_takes_the_name_of_a_frame_in_another_part(standin: Bundle, frames: Path, tmp_path: Path, place: int) -> None:
    (frames / "b.png").rename(frames / ["a_1.png", "_.png"][place])
    (frames / "c.tif").rename(frames / ["c.tif", "__1.tif"][place])
    asked = ("Where?", "What?")
    infer(standin, options(frames, tmp_path / "whole", *asked))
    for part in range(2):
        infer(standin, options(frames, tmp_path / f"part{part}", *asked, selection=Selection(parts=2, part=part)))
    merge([tmp_path / "part0", tmp_path / "part1"], tmp_path / "merged")
    same_results(tmp_path / "merged", tmp_path / "whole")


def test_parts_with_codes_of_two_keys_are_not_merged(parts: list[Path], tmp_path: Path) -> None:
    change(parts[1] / "run.json", lambda run: run["options"].update(key="0" * 12))
    with pytest.raises(VesselError, match=r"part1: its study codes were made with another key than those of .*part0"):
        merge(parts, tmp_path / "merged")

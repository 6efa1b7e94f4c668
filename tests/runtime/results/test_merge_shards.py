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
from vessel_rt.results.merge_shards import merge_shards
from vessel_rt.run.infer import infer


@pytest.fixture
def shards(standin: Bundle, frames: Path, tmp_path: Path) -> list[Path]:
    """Two shards of three frames; see test_cli for what comes of them."""
    for shard in range(2):
        infer(standin, options(frames, tmp_path / f"shard{shard}", selection=Selection(shards=2, shard=shard)))
    return [tmp_path / "shard0", tmp_path / "shard1"]


def change(path: Path, edit: Any) -> None:
    run = json.loads(path.read_text())
    edit(run)
    path.write_text(json.dumps(run))


def test_shards_that_do_not_belong_together(shards: list[Path], standin: Bundle, frames: Path, tmp_path: Path) -> None:
    make_frame().save(frames / "later.png")
    infer(standin, options(frames, tmp_path / "later", selection=Selection(shards=2, shard=1)))
    infer(standin, options(frames, tmp_path / "other", "Where?", selection=Selection(shards=2, shard=1)))
    for given, message in [
        (shards[:1], "one of 2 shards, but 1 were given"),
        ([shards[0], shards[0]], None),
        ([shards[0], tmp_path / "none"], r"run\.json: missing"),
        ([shards[0], tmp_path / "later"], "the other shards have other inputs"),
        ([shards[0], tmp_path / "other"], "another bundle, device, question"),
    ]:
        with pytest.raises(VesselError, match=message):
            merge_shards(given, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_was_changed_is_not_merged(shards: list[Path], tmp_path: Path) -> None:
    (shards[1] / "masks" / "b.png").write_bytes(b"another")
    with pytest.raises(VesselError, match=r"shard1: a file of \w{12} in masks/ was changed"):
        merge_shards(shards, tmp_path / "merged")
    (shards[1] / "masks" / "b.png").unlink()
    with pytest.raises(VesselError, match=r"shard1: a file of \w{12} cannot be read"):
        merge_shards(shards, tmp_path / "again")


def test_counts_that_are_not_known_are_left_out(shards: list[Path], tmp_path: Path) -> None:
    for shard in shards:
        change(shard / "run.json", lambda run: run["counts"].update(note="S0001"))
    merge_shards(shards, tmp_path / "merged")
    counts = json.loads((tmp_path / "merged" / "run.json").read_text())["counts"]
    assert (counts["images"], counts["in_all_shards"], "note" in counts) == (3, 3, False)


def test_an_unfinished_shard_is_not_merged(shards: list[Path], tmp_path: Path) -> None:
    (shards[1] / "run.json").unlink()
    with pytest.raises(VesselError, match=r"shard1/run\.json: missing"):
        merge_shards(shards, tmp_path / "merged")


def test_a_folder_with_something_in_it_is_not_merged_into(shards: list[Path]) -> None:
    with pytest.raises(VesselError, match="not empty"):
        merge_shards(shards, shards[0])


def test_results_cannot_point_outside_their_folder(shards: list[Path], tmp_path: Path) -> None:
    line = json.loads((shards[1] / "results.jsonl").read_text())
    line["files"] = {"masks/../../victim.png": "0"}
    (shards[1] / "results.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(VesselError, match="files: lists a file outside"):
        merge_shards(shards, tmp_path / "merged")


@pytest.mark.parametrize("place", [0, 1])
def test_a_further_mask_never_takes_the_name_of_a_frame_in_another_shard(standin: Bundle, frames: Path, tmp_path: Path, place: int) -> None:
    (frames / "b.png").rename(frames / ["a_1.png", "_.png"][place])
    (frames / "c.tif").rename(frames / ["c.tif", "__1.tif"][place])
    asked = ("Where?", "What?")
    infer(standin, options(frames, tmp_path / "whole", *asked))
    for shard in range(2):
        infer(standin, options(frames, tmp_path / f"shard{shard}", *asked, selection=Selection(shards=2, shard=shard)))
    merge_shards([tmp_path / "shard0", tmp_path / "shard1"], tmp_path / "merged")
    same_results(tmp_path / "merged", tmp_path / "whole")


def test_shards_with_codes_of_two_keys_are_not_merged(shards: list[Path], tmp_path: Path) -> None:
    change(shards[1] / "run.json", lambda run: run["options"].update(key="0" * 12))
    with pytest.raises(VesselError, match=r"shard1: its study codes have another key than those of .*shard0"):
        merge_shards(shards, tmp_path / "merged")

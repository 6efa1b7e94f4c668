"""Files of other machines: of older and newer minor versions, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.benches import bench_file, bench_run
from vessel_rt.bench.compare import merge, read_bench
from vessel_rt.bench.report import write_bench
from vessel_rt.bench.schema import BENCH_FILE
from vessel_rt.errors import VesselError


@pytest.fixture
def document(tmp_path: Path) -> Any:
    write_bench(tmp_path, bench_file())
    return json.loads((tmp_path / BENCH_FILE).read_text())


def saved(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_runs_are_merged_in_order_each_once(tmp_path: Path) -> None:
    here, there = bench_run("here"), bench_run("there")
    merged = merge([bench_file(here), bench_file(there), bench_file(here, there)])
    assert [run.machine.cpu for run in merged.runs] == ["here", "there"]
    write_bench(tmp_path, merged)
    assert read_bench(tmp_path / BENCH_FILE) == merged  # it can be compared again
    assert merge([merged]) == merged


def test_a_newer_minor_version_is_read_without_what_it_added(tmp_path: Path, document: Any) -> None:
    document["minor"] = 7
    document["weather"] = "fine"
    document["runs"][0]["rows"][0]["joules"] = 12.5
    assert read_bench(saved(tmp_path / "new.json", document)).runs == bench_file().runs


def test_an_older_version_lacks_what_was_added_later(tmp_path: Path, document: Any) -> None:
    del document["minor"]
    for row in document["runs"][0]["rows"]:
        del row["least_iou"], row["dice"]
    found = read_bench(saved(tmp_path / "old.json", document))
    assert {row.dice for row in found.runs[0].rows} == {None}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "not a bench.json"),
        (lambda text: "", "not a bench.json"),
        (lambda text: "[]", "not a bench.json"),
        (lambda text: '{"schema": 1, "verdict": "PASS", "passed": true}', "missing key runs"),
        (lambda text: '{"schema": 1, "runs": []}', "has no measurements"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "schema 2 is newer than 1"),
        (lambda text: text.replace('"cores": 8', '"cores": "many"'), r"runs\[0\].machine.cores"),
        (lambda text: text.replace('"cores": 8', '"cores": -8'), r"runs\[0\].machine.cores"),
        (lambda text: text.replace('"bundle": 1', '"bundle": 9', 1), "a bundle that is not there"),
        (lambda text: text.replace('"dice": 0.8123', '"dice": NaN', 1), "NaN is not a number"),
        (lambda text: text.replace('"dice": 0.8123', '"dice": 1e999', 1), "dice"),
        (lambda text: "[" * 100_000, "nested too deeply"),
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path: Path, document: Any, damage: Callable[[str], str], says: str) -> None:
    path = tmp_path / "b.json"
    path.write_text(damage((tmp_path / BENCH_FILE).read_text()))
    with pytest.raises(VesselError, match=says) as caught:
        read_bench(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json", Path("/dev/zero")):
        with pytest.raises(VesselError, match="cannot be read"):
            read_bench(path)

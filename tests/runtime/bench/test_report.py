"""bench.html: the table and the plots, in one page that loads nothing."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from tests.support.benches import bench_file, bench_run
from vessel_rt.bench.report import page, write_bench
from vessel_rt.bench.schema import BenchFile
from vessel_rt.errors import VesselError


def test_it_shows_everything_and_no_text_is_markup() -> None:
    text = page(bench_file())
    for part in (
        "200.00 images/s of 1 tile: fp32 on cuda:0, 2 images at once",
        "A &lt;processor&gt;, 8 cores, 32.0 GiB, Card, onnxruntime 1.32.0, CPUExecutionProvider, CUDAExecutionProvider, 2026-01-02",
        "2026-01-02 03:04:05 UTC",
        "bundle 3 on cpu: bundle: &lt;damaged&gt; bundle",
        "Please segment &lt;vessel&gt; in this image.",
        "3 of 1 tile, 1 of 10 tiles (given)",
        "16.00 GB",
        "0.8123",
        "0.9912",
        "Images per second, 10 tiles",
        "Time of an image, 1 tile",
    ):
        assert part in text, part
    assert "<damaged>" not in text
    assert text.count("<svg") == 4


def test_it_loads_and_runs_nothing() -> None:
    text = page(bench_file(bench_run("here"), bench_run("there")))
    assert "default-src 'none'" in text
    assert not re.search(r"<script|<link|<img|src=|https?:|url\(", text)


def test_several_machines_each_have_a_panel() -> None:
    text = page(bench_file(bench_run("here"), bench_run("there")))
    assert "<h2>Machine 1</h2>" in text
    assert "<h2>Machine 2</h2>" in text
    assert "fp16, cuda:0, machine 2" in text


@pytest.mark.parametrize(("finished", "rows", "outcome"), [(True, 99, "pass"), (True, 0, "fail"), (False, 99, "skip")])
def test_the_outcome_is_in_the_title(finished: bool, rows: int, outcome: str) -> None:
    run = bench_run(finished=finished)
    found = BenchFile(runs=(msgspec.structs.replace(run, rows=run.rows[:rows] or run.rows[-1:]),))
    assert f"<title>vessel-rt bench: {outcome}</title>" in page(found)
    assert page(found) == page(found)


def test_both_files_are_replaced_whole(tmp_path: Path, read_only: Path) -> None:
    for _ in range(2):
        write_bench(tmp_path / "a" / "b", bench_file())
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"bench.json", "bench.html"}
    with pytest.raises(VesselError, match=r"bench\.json: cannot be written \(Permission denied\)"):
        write_bench(read_only, bench_file())

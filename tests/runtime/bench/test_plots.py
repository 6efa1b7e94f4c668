from __future__ import annotations

import xml.etree.ElementTree as ET

import msgspec
import pytest

from tests.support.benches import bench_file
from vessel_rt.bench.plots import _ticks, by_batch, by_step
from vessel_rt.bench.table import Line, lines_of


@pytest.fixture
def lines() -> list[Line]:
    """Those of one tile: two bundles, two devices, two batch sizes."""
    return [line for line in lines_of(bench_file()) if line.row.tiles == 1]


def test_a_line_and_a_place_in_the_legend_for_each_bundle_and_device(lines: list[Line]) -> None:
    plot = ET.fromstring(by_batch(lines))
    assert sum(path.get("class", "").endswith(" line") for path in plot.iter("path")) == 4
    words = [text.text for text in plot.iter("text")]
    assert {"fp32, cpu", "fp16, cuda:0", "images at once", "images per second", "1", "2", "0"} <= set(words)


def test_there_is_nothing_to_draw_over_one_batch_size(lines: list[Line]) -> None:
    assert by_batch([line for line in lines if line.row.batch == 1]) == ""
    assert by_step([]) == ""


def test_a_bar_of_steps_for_each_row_with_its_time(lines: list[Line]) -> None:
    plot = ET.fromstring(by_step(lines))
    assert sum("step" in rect.get("class", "") for rect in plot.iter("rect")) == 6 * (1 + len(lines))  # with the legend
    words = [text.text or "" for text in plot.iter("text")]
    assert "fp32, cpu, batch 1" in words
    assert "100.0 ms, 10.00/s" in words
    assert any(word.startswith("milliseconds per image") for word in words)
    bars = [rect for rect in plot.iter("rect") if rect.get("height") == "18"]
    assert all(float(rect.get("x", -1)) >= 0 and float(rect.get("x", 0)) + float(rect.get("width", 0)) <= 960 for rect in bars)


def test_a_time_of_zero_and_names_with_markup_can_be_drawn(lines: list[Line]) -> None:
    row = msgspec.structs.replace(lines[0].row, steps=(), images_per_second=0.0)
    odd = [Line("", "<&>", "cpu", lines[0].run, msgspec.structs.replace(row, batch=batch)) for batch in (1, 2)]
    for plot in (by_batch(odd), by_step(odd)):
        assert "&lt;&amp;&gt;" in ET.tostring(ET.fromstring(plot), encoding="unicode")


@pytest.mark.parametrize("most", [0.0, 1e-3, 0.9, 1.0, 7.4, 99.0, 100.0, 123.4, 51234.0])
def test_ticks_are_few_and_reach_the_largest(most: float) -> None:
    ticks = _ticks(most)
    assert ticks[0] == 0
    assert ticks[-1] >= most
    assert 3 <= len(ticks) <= 8

"""How times are taken; no test asserts on their length."""

from __future__ import annotations

import pytest

from tests.support.frames import make_frame
from vessel_rt.device.deployment import deploy
from vessel_rt.device.providers import Device
from vessel_rt.formats.bundle import Bundle
from vessel_rt.measure import timing
from vessel_rt.measure.timing import TOTAL, medians, repeated, timed_batch
from vessel_rt.model.segmenter import Segmenter


def test_a_batch_has_the_times_of_an_image_and_all_results(standin: Bundle) -> None:
    with Segmenter(deploy(standin, Device("cpu")), 1) as segmenter:
        times, results = timed_batch(segmenter, [make_frame(), make_frame(seed=1)], "Please segment vessel in this image.")
    assert [result.images for result in results] == [2, 2]
    assert list(times)[-1] == TOTAL
    assert times.keys() == {*results[0].ms, TOTAL}
    assert times["vision_encoder"] == pytest.approx(results[0].ms["vision_encoder"])


@pytest.mark.parametrize(("least", "count"), [(0, 3), (2, 3), (30, 30)])
def test_runs_after_the_first_count_up_to_what_is_needed(monkeypatch: pytest.MonkeyPatch, least: int, count: int) -> None:
    monkeypatch.setattr(timing, "_SECONDS", -1.0)
    assert repeated(lambda number: number, least) == list(range(1, count + 1))


def test_short_runs_are_repeated_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SECONDS", 1e9)
    assert len(repeated(lambda number: number)) == timing._MOST_RUNS


def test_the_median_and_the_90th_percentile_of_each_step() -> None:
    found = medians([{"a": float(value), **({"b": 4.0} if value else {})} for value in range(11)])
    assert found == {"a": (5.0, 9.0)}
    assert medians([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": (2.0, 2.8), "b": (1.0, 1.8)}

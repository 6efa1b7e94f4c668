"""What is made of the times of a cine: which frames are late, and the ratios."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.cines import Done, _memories, _ratios
from vessel_rt.formats.bundle import Bundle
from vessel_rt.model.result import Result


def _done(place: int, propagated_from: tuple[int, ...] | None) -> Done:
    return Done(place, cast(Result, SimpleNamespace(propagated_from=propagated_from)), 0.0)


@pytest.mark.parametrize(
    ("asked", "tracked", "memories"),
    [
        ([3], [2, 1, 0, 4, 5, 6, 7, 8, 9, 10, 11], [1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 7]),
        ([4, 2], [1, 0, 3, 5, 6], [2, 3, 2, 3, 4]),
        ([0, 1, 2, 3, 4], [5, 6], [5, 6]),
    ],
)
def test_memories_that_a_frame_attends_to(fp32_bundle: Path, asked: list[int], tracked: list[int], memories: list[int]) -> None:
    done = [_done(place, None) for place in asked] + [_done(place, tuple(asked)) for place in tracked]
    assert _memories(done, Bundle.load(fp32_bundle)) == [0] * len(asked) + memories


def test_ratios() -> None:
    alone: dict[str, Any] = {"frames": 3, "seconds": 36.0, "frames_per_second": 0.083, "processor_seconds": 60.0}
    tracked = {"frames": 10, "frames_per_second": 0.125, "processor_seconds": 125.0, "late_frame_ms": 6000.0}
    assert _ratios({"alone": alone, "sa2va": tracked}, "sa2va") == {"measured": 1.51, "processor": 1.6, "long": 2.0}

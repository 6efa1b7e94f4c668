"""How a process ends; tests/runtime/bench/test_bench.py runs them."""

from __future__ import annotations

import pytest

from vessel_rt.bench.process import _death


@pytest.mark.parametrize(
    ("code", "says"),
    [(-9, "was killed, probably for lack of memory"), (-11, "died (signal 11)"), (3, "died (exit code 3)")],
)
def test_a_death_has_its_cause(code: int, says: str) -> None:
    assert _death(code) == f"its process {says}"

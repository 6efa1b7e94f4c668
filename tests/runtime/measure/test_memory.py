from __future__ import annotations

import pytest

from vessel_rt.measure.memory import size


@pytest.mark.parametrize(("count", "text"), [(0, "0.0 MB"), (12_345_678, "12.3 MB"), (99_900_000, "99.9 MB"), (15_300_000_000, "15.30 GB")])
def test_sizes_are_readable(count: int, text: str) -> None:
    assert size(count) == text

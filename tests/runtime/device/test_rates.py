from __future__ import annotations

import pytest

from vessel_rt.device.rates import DATA_SHEETS, Rates, known_rates
from vessel_rt.formats.stage_cost import Cost


def test_the_floor_is_the_slower_of_products_and_memory() -> None:
    rates = Rates(flops=1e12, bytes=1e11)
    assert rates.floor_ms(Cost(flops=2 * 10**9, bytes=10**6)) == 2.0
    assert rates.floor_ms(Cost(flops=10**6, bytes=5 * 10**8)) == 5.0
    assert rates.floor_ms(Cost(flops=2 * 10**9, bytes=10**6), of_flops=0.5) == 4.0
    assert rates.used(Cost(flops=2 * 10**9, bytes=10**8), ms=4.0) == pytest.approx((0.5, 0.25))


def test_cards_are_known_by_their_whole_names() -> None:
    assert known_rates("NVIDIA GeForce RTX 3090") == DATA_SHEETS["RTX 3090"]
    assert known_rates("NVIDIA GeForce RTX 3090 Ti") is None

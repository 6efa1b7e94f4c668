from __future__ import annotations

import numpy as np
import pytest

from vessel_rt.bench.masks import PackedMask, least_iou


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 96)])
def test_a_mask_is_unpacked_as_it_was(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random(shape) > 0.5
    packed = PackedMask.of(mask)
    assert np.array_equal(packed.pixels, mask)
    assert len(packed.bits) == -(-mask.size // 8)


def test_the_least_overlap_of_all_frames() -> None:
    whole, half = np.ones((4, 4), np.bool_), np.zeros((4, 4), np.bool_)
    half[:2] = True
    one, other = PackedMask.of(whole), PackedMask.of(half)
    assert least_iou({0: [one], 1: [one]}, {0: [one], 1: [other]}) == 0.5
    assert least_iou({0: [one], 1: [one, other]}, {0: [one], 1: [one]}) == 0.0  # another number of masks
    assert least_iou({0: [one]}, {0: [one], 1: [other]}) == 1.0  # of the frames that both have
    assert least_iou({0: [one]}, {}) is None
    assert least_iou({0: []}, {0: []}) is None

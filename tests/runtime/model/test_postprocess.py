from __future__ import annotations

import numpy as np
import pytest
import torch

from vessel_rt.model.postprocess import bounding_box, upsample


@pytest.mark.parametrize("size", [(512, 512), (300, 300), (1024, 1024), (641, 479), (97, 2000), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize(("side", "middle"), [(256, 1024), (16, 64), (128, 512)])
def test_upsample_equals_two_interpolations(size: tuple[int, int], side: int, middle: int) -> None:
    width, height = size
    logits = np.random.default_rng(width + side).normal(0, 8, (2, side, side)).astype(np.float32)
    twice = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], size=(middle, middle), mode="bilinear", align_corners=False)
    expected = torch.nn.functional.interpolate(twice, size=(height, width), mode="bilinear", align_corners=False)[0].numpy()
    found = upsample(logits, middle, width, height)
    assert found.dtype == np.float32
    assert found.shape == (2, height, width)
    # Sums of float32 products in another order: a few units in the last place of values up to 40.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert np.mean((found > 0) != (expected > 0)) < 1e-5


def test_upsample_of_no_mask() -> None:
    assert upsample(np.empty((0, 16, 16), np.float32), 64, 5, 4).shape == (0, 4, 5)


def test_bounding_box_is_half_open() -> None:
    mask = np.zeros((6, 8), np.bool_)
    assert bounding_box(mask) is None
    mask[2:4, 3:7] = True
    assert bounding_box(mask) == [3, 2, 7, 4]
    mask[...] = True
    assert bounding_box(mask) == [0, 0, 8, 6]

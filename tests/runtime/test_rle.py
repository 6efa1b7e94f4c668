from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from vessel_rt.rle import decode_rle, encode_rle


@pytest.mark.parametrize(("height", "width"), [(31, 17), (1, 1), (1, 500), (500, 1), (200, 300)])
def test_run_lengths_are_cocos(height: int, width: int) -> None:
    for density in (0.0, 0.01, 0.4, 1.0):
        mask = np.random.default_rng(0).random((height, width)) < density
        encoded = encode_rle(mask)
        assert encoded["size"] == [height, width]
        assert isinstance(encoded["counts"], str)
        np.testing.assert_array_equal(coco.decode(encoded).astype(bool), mask)
        np.testing.assert_array_equal(decode_rle(encoded), mask)
        np.testing.assert_array_equal(decode_rle(encoded | {"counts": encoded["counts"].encode()}), mask)


GOOD = encode_rle(np.arange(600).reshape(20, 30) % 7 == 0)


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        "counts",
        {"size": [20, 30]},
        {"counts": GOOD["counts"]},
        GOOD | {"size": [20]},
        GOOD | {"size": [20, 30, 1]},
        GOOD | {"size": [20.0, 30.0]},
        GOOD | {"size": [-20, -30]},
        GOOD | {"size": [0, 0], "counts": ""},
        GOOD | {"size": [2**31, 2**31]},
        GOOD | {"size": [10**12, 1], "counts": "0"},
        GOOD | {"size": [30, 30]},
        GOOD | {"counts": ""},
        GOOD | {"counts": GOOD["counts"][:-1]},
        GOOD | {"counts": GOOD["counts"] + "1"},
        GOOD | {"counts": "o" * 1000},
        GOOD | {"counts": "\u20ac"},
        GOOD | {"counts": 7},
        GOOD | {"counts": [600]},
    ],
)
def test_what_is_no_mask_is_a_value_error(damaged: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # its text is for the reader of the file, who says which it was
        decode_rle(damaged)


def test_damaged_counts_are_a_mask_or_an_error() -> None:
    """pycocotools, given these, writes beyond its memory."""
    rng = random.Random(0)
    for _ in range(2000):
        counts = bytearray(GOOD["counts"].encode())
        for _ in range(rng.randint(1, 3)):
            counts[rng.randrange(len(counts))] = rng.randrange(32, 127)
        try:
            mask = decode_rle(GOOD | {"counts": counts.decode()})
        except ValueError:
            continue
        assert mask.shape == (20, 30)

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from vessel_rt.results.rle import decode_rle, encode_rle


def test_run_lengths_are_cocos() -> None:
    mask = np.random.default_rng(0).random((31, 17)) > 0.6
    encoded = encode_rle(mask)
    assert encoded["size"] == [31, 17]
    assert isinstance(encoded["counts"], str)
    np.testing.assert_array_equal(coco.decode(encoded).astype(bool), mask)
    assert coco.area(encoded) == mask.sum()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (31, 17), (640, 480)])
def test_what_is_decoded_is_what_pycocotools_decodes(shape: tuple[int, int], share: float) -> None:
    mask = np.random.default_rng(1).random(shape) < share
    mask[shape[0] // 3 : shape[0] // 2] = True  # long runs beside short ones: differences of both signs
    encoded = encode_rle(mask)
    np.testing.assert_array_equal(decode_rle(encoded), mask)
    np.testing.assert_array_equal(decode_rle(encoded | {"counts": encoded["counts"].encode()}), coco.decode(encoded).astype(bool))


SOUND = encode_rle(np.eye(9, 7, dtype=np.bool_))


@pytest.mark.parametrize(
    "rle",
    [
        None,
        [],
        {},
        {"size": [9, 7]},
        SOUND | {"size": [10**9, 10**9]},
        SOUND | {"size": [9, 8]},
        SOUND | {"size": [-9, -7]},
        SOUND | {"size": [0, 7]},
        SOUND | {"size": [9.0, 7]},
        SOUND | {"size": [True, 63]},
        SOUND | {"size": [9]},
        SOUND | {"size": "97"},
        SOUND | {"counts": ""},
        SOUND | {"counts": SOUND["counts"][:-1]},
        SOUND | {"counts": SOUND["counts"] + "1"},
        SOUND | {"counts": SOUND["counts"] * 1000},
        SOUND | {"counts": "o" * 10**6},
        SOUND | {"counts": "ooooooooooooo0"},
        SOUND | {"counts": "oooooo7" * 10**5},
        SOUND | {"counts": "@0o1"},
        SOUND | {"counts": "é"},
        SOUND | {"counts": "\ud800"},
        SOUND | {"counts": " " * 4},
        SOUND | {"counts": [0, 63]},
        SOUND | {"counts": 10**15},
    ],
)
def test_whatever_is_no_mask_is_an_error(rle: Any) -> None:
    with pytest.raises(ValueError, match=r"^[a-z0-9 ,()]+$"):
        decode_rle(rle)


def test_counts_of_any_letters_decode_or_are_an_error() -> None:
    rng = np.random.default_rng(2)
    letters = np.frombuffer(SOUND["counts"].encode(), np.uint8)
    for _ in range(2000):
        changed = letters.copy()
        changed[rng.integers(len(letters), size=rng.integers(1, 4))] = rng.integers(40, 120)
        try:
            mask = decode_rle(SOUND | {"counts": changed.tobytes()})
        except ValueError:
            continue
        assert mask.shape == (9, 7)

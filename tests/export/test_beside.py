"""A function in a process beside this one."""

from __future__ import annotations

import math
import os

import pytest

from vessel_export.beside import beside
from vessel_rt.errors import VesselError


def test_the_result_comes_back() -> None:
    with beside(math.hypot) as other:
        other.call(3, 4)
        assert other.result() == 5


def test_an_error_comes_back_with_its_traceback() -> None:
    with beside(math.sqrt) as other:
        other.call(-1)
        with pytest.raises(ValueError, match="math domain error") as caught:
            other.result()
    assert "_answer" in caught.value.__notes__[0]


def test_a_process_that_dies_is_reported() -> None:
    with beside(os._exit) as other:
        other.call(9)
        with pytest.raises(VesselError, match="ended with code 9"):
            other.result()


def test_a_block_that_fails_ends_the_process_before_it_is_asked() -> None:
    with pytest.raises(RuntimeError, match="first"), beside(math.sqrt):
        raise RuntimeError("first")

from __future__ import annotations

import re

import pytest

from vessel_rt.device.cuda_driver import list_gpus
from vessel_rt.errors import VesselError


def test_gpus_are_described() -> None:
    try:
        gpus = list_gpus()
    except VesselError as e:
        pytest.skip(str(e))
    assert [gpu.index for gpu in gpus] == list(range(len(gpus)))
    for gpu in gpus:
        assert re.fullmatch(r"sm\d{2,3}", gpu.architecture)
        assert gpu.name
        assert gpu.memory > 1 << 30

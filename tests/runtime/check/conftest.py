"""Bundles with goldens, and checks that measure for no longer than they must."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checks import TILES, Check, once, with_goldens
from tests.support.shared import made_once
from vessel_rt.check import check as check_module
from vessel_rt.check import speed
from vessel_rt.check.check import CheckOptions, check
from vessel_rt.check.schema import CheckFile
from vessel_rt.device.providers import Device

OF_TWO_MASKS = "Please segment vessel and catheter in this image."


@pytest.fixture(scope="session")
def golden_tiny(fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained bundle in FP32, with goldens of two frames, each with two masks. Not to be written to."""
    name = "golden-tiny"
    return made_once(tmp_path_factory, name, lambda folder: with_goldens(folder / name, fp32_bundle, OF_TWO_MASKS)) / name


@pytest.fixture
def run_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """`check` on a bundle, with as few runs and tiles as it can do with."""
    once(monkeypatch)
    for module in (speed, check_module):
        monkeypatch.setattr(module, "MEASURED_TILES", TILES)
    monkeypatch.setattr("vessel_rt.device.deployment.MOST_IMAGES", 2)

    def run(folder: Path, device: str = "cpu", *, minutes: float = 0.0) -> CheckFile:
        options = CheckOptions(folder, tmp_path / "out", Device.parse_several(device), threads=1, minutes=minutes)
        return check(options, lambda line: None)

    return run

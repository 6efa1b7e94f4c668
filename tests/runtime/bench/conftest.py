"""Measurements that take no longer than they must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.benches import ONCE, Bench
from tests.support.frames import CODES
from vessel_rt.bench import process
from vessel_rt.bench.bench import BenchOptions, bench
from vessel_rt.bench.report import write_bench
from vessel_rt.bench.schema import BenchFile
from vessel_rt.device.providers import Device
from vessel_rt.inputs.frames import Naming


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs Python code in each process before it serves."""

    def planted(code: str) -> None:
        monkeypatch.setattr(process, "_PROGRAM", f"{ONCE}{code}\nfrom vessel_rt.bench.process import serve; serve()")

    planted("")
    return planted


@pytest.fixture
def run_bench(tmp_path: Path, plant: Any) -> Bench:
    """`bench` on bundles, as few times as possible, with its files in tmp_path/out. `warned` and `saved` collect what it says."""

    def run(
        *bundles: Path, devices: str = "cpu", batches: tuple[int, ...] = (1,), warned: list[str] | None = None, **more: Any
    ) -> BenchFile:
        wanted = tuple(Device.parse(device) for device in devices.split(","))
        options = BenchOptions(bundles, wanted, batches, **{"inputs": (), "naming": Naming(CODES), "rounds": 1, "threads": 1, **more})
        found = bench(options, lambda found: write_bench(tmp_path / "out", found), (warned if warned is not None else []).append)
        write_bench(tmp_path / "out", found)
        return found

    return run

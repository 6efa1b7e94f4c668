from __future__ import annotations

import sys

import pytest

from tests.support.fake_gpu import install_gpu
from vessel_rt.check.memory import check_memory
from vessel_rt.check.record import Record
from vessel_rt.check.schema import CheckLine
from vessel_rt.device.deployment import Deployment
from vessel_rt.device.providers import Device
from vessel_rt.formats.bundle import Bundle
from vessel_rt.measure import memory
from vessel_rt.measure.memory import MemoryWatch


def test_a_card_that_cannot_be_read_is_skipped_with_the_reason(standin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    lines: list[CheckLine] = []
    device = Device("cuda")
    with MemoryWatch(device) as watch:
        assert watch.now() is None
    check_memory(Record(str, lines.append, lambda found: None), Deployment(standin, device, {}), watch)
    assert (lines[0].outcome, lines[0].reason) == ("skip", "nvidia-ml-py is not installed: pip install nvidia-ml-py")


def test_a_machine_that_swapped(standin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 5_000_000)
    monkeypatch.setattr(memory, "anonymous_memory", lambda: 1_000_000)
    lines: list[CheckLine] = []
    record = Record(str, lines.append, lambda found: None)
    with MemoryWatch(Device("cpu")) as watch:
        pass
    check_memory(record, Deployment(standin, Device("cpu"), {}), watch)
    watch.peak = 9_000_000
    check_memory(record, Deployment(standin, Device("cpu"), {}), watch)
    assert [line.outcome for line in lines] == ["pass", "fail"]
    assert "8.0 MB" in lines[1].figure

"""What is wrong with its packages and driver."""

from __future__ import annotations

import pytest

from tests.support.fake_gpu import install_gpu
from vessel_rt.check import machine
from vessel_rt.check.machine import check_gpu, check_machine
from vessel_rt.check.record import Record
from vessel_rt.check.schema import CheckLine
from vessel_rt.device.providers import Device, onnxruntime
from vessel_rt.measure.machine import describe_machine


@pytest.fixture
def lines() -> list[CheckLine]:
    return []


@pytest.fixture
def record(lines: list[CheckLine]) -> Record:
    return Record(str, lines.append, lambda found: None)


def test_the_machine_is_described_and_named(record: Record, lines: list[CheckLine], monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch)
    check_machine(record)
    assert record.machine == describe_machine()
    assert [(line.name, line.outcome) for line in lines] == [("software", "pass"), ("cpu", "pass")]


def test_a_driver_older_than_onnxruntimes_cuda(record: Record, lines: list[CheckLine], monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch)
    for built, outcome in (("13.0", "pass"), ("12.8", "pass"), ("14.1", "fail"), ("", "pass")):
        monkeypatch.setattr(onnxruntime(), "cuda_version", built, raising=False)
        check_gpu(record, Device("cuda"))
        assert lines[-1].outcome == outcome
    assert next(line.reason for line in lines if line.outcome == "fail").startswith("onnxruntime needs CUDA 14.1, and the driver runs 13.0")


def test_without_nvml_the_free_memory_is_not_told(record: Record, lines: list[CheckLine], monkeypatch: pytest.MonkeyPatch) -> None:
    library = install_gpu(monkeypatch)
    library.broken = ("nvmlInit",)
    check_gpu(record, Device("cuda"))
    assert lines[-1].figure == "NVIDIA GeForce RTX 3090, sm86, 24.0 GiB, driver of an unknown version (CUDA 13.0)"


def test_the_packages_own_metadata_say_what_is_needed() -> None:
    needed = machine._needed_runtime()
    assert needed is None or machine._numbers(needed) >= (1, 24)
    assert machine._numbers("1.32.0rc1") == (1, 32, 0)

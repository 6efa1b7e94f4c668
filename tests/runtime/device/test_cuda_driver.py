from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from vessel_rt.device import cuda_driver
from vessel_rt.device.cuda_driver import driver_cuda, list_gpus, pci_bus
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
        assert re.fullmatch(r"[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d", pci_bus(gpu.index))
    assert driver_cuda() >= (11, 0)


@pytest.mark.parametrize(
    ("code", "told"),
    [(100, "sees no GPU here; .*CUDA_VISIBLE_DEVICES"), (803, "CUDA error 803.*restart the machine"), (999, "CUDA error 999.*nvidia-smi")],
)
def test_a_driver_that_fails_is_named_with_what_mends_it(monkeypatch: pytest.MonkeyPatch, code: int, told: str) -> None:
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: SimpleNamespace(cuInit=lambda flags: code))
    with pytest.raises(VesselError, match=rf"\A[^\n]*{told}[^\n]*\Z"):
        list_gpus()


def test_without_a_driver_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", absent)
    with pytest.raises(VesselError, match=r"there is no NVIDIA driver here .* install it"):
        list_gpus()


def test_without_a_driver_everything_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vessel_rt.device.cuda_driver._LIBRARY", "libnone.so.1")
    for ask in (list_gpus, driver_cuda, lambda: pci_bus(0)):
        with pytest.raises(VesselError, match=r"libnone\.so\.1 is missing"):
            ask()

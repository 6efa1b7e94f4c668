"""The facts of the machine: all that matter, and none that tell where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fake_gpu import install_gpu
from vessel_rt.formats.schema import to_json
from vessel_rt.measure import machine
from vessel_rt.measure.machine import describe_machine


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_gpu(monkeypatch)
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: AMD Ryzen 9 5950X\nflags\t\t: fpu sse2 avx2 avx512_vnni fma\n\nprocessor\t: 1\nmodel name\t: other\n"
    )
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    facts = describe_machine()
    assert (facts.cpu, facts.features) == ("AMD Ryzen 9 5950X", ("avx2", "avx512_vnni", "fma"))
    assert [(gpu.name, gpu.architecture) for gpu in facts.gpus] == [("NVIDIA GeForce RTX 3090", "sm86")]
    assert facts.driver == "580.65.06"
    assert {"vessel-rt", "python", "numpy"} <= facts.versions.keys()
    assert facts.cores >= 1


def test_no_host_user_or_folder_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("platform.node", "socket.gethostname", "getpass.getuser"):
        monkeypatch.setattr(name, lambda: "quokka-ward-3")
    (tmp_path / "quokka-ward-3").mkdir()
    monkeypatch.chdir(tmp_path / "quokka-ward-3")
    monkeypatch.setenv("HOME", str(tmp_path / "quokka-ward-3"))
    text = to_json(describe_machine())
    assert "quokka" not in text
    assert str(tmp_path) not in text

"""What a message may not tell of the machine and its user."""

from __future__ import annotations

from pathlib import Path

import pytest

from vessel_rt.measure.redact import redactor


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder whose name has a blank; the working folder is in it."""
    folder = tmp_path / "Jane Quokka"
    (folder / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.chdir(folder / "work")
    monkeypatch.setattr("platform.node", lambda: "ward-7")
    return folder


@pytest.mark.parametrize(
    ("message", "redacted"),
    [
        ("engines/new/weights/a.safetensors was changed", "bundle/weights/a.safetensors was changed"),
        ("{home}/work/engines/new: damaged bundle", "bundle: damaged bundle"),
        ("cannot open {home}/.cache/vessel-rt/abc/graph.bin (Permission denied)", "cannot open .../graph.bin (Permission denied)"),
        ("Failed to load library /opt/My-Venv/lib/libcudnn.so.9: no such file", "Failed to load library .../libcudnn.so.9: no such file"),
        ("Load model from:/srv/quokka/model.onnx failed", "Load model from:.../model.onnx failed"),
        (r"not found: C:\Users\quokka\nvinfer_10.dll", "not found: .../nvinfer_10.dll"),
        (r"not found: \\quokka\share\nvinfer_10.dll", "not found: .../nvinfer_10.dll"),
        ("~/engines/other, too", ".../other, too"),
        (
            "CUDA failure 2: out of memory ; GPU=0 ; hostname=ward-7.clinic ; file=/onnx/a.cc ; line=1",
            "CUDA failure 2: out of memory ; GPU=0 ; hostname=... ; file=.../a.cc ; line=1",
        ),
        ("ward-7 does not answer", "... does not answer"),
        (
            "at https://developer.nvidia.com/cudnn, 1.5 images/s, docs/performance.md",
            "at https://developer.nvidia.com/cudnn, 1.5 images/s, docs/performance.md",
        ),
        ("engines/newer is another one", "engines/newer is another one"),
    ],
)
def test_paths_and_hosts(home: Path, message: str, redacted: str) -> None:
    assert redactor(Path("engines/new"))(message.format(home=home)) == redacted

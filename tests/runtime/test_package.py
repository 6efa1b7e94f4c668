"""What importing and running vessel_rt brings in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.frames import make_frame
from vessel_rt.formats.bundle import Bundle

HEAVY = {"torch", "transformers", "onnx", "onnxscript", "vessel_export", "torchvision", "sam2", "peft"}


def modules_after(program: str, *arguments: str) -> set[str]:
    """The top-level modules that are loaded when `program` has run in a fresh interpreter with networking taken away."""
    guard = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network used')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
    )
    report = "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", guard + program + report, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not modules_after("import vessel_rt, vessel_rt.formats.bundle, vessel_rt.cli") & {
        *HEAVY,
        "numpy",
        "PIL",
        "onnxruntime",
        "tokenizers",
        "tqdm",
    }


def test_importing_the_api_imports_no_library_before_it_is_used() -> None:
    """It stays under 50 ms that way; `load` brings in what it needs, without the exporter."""
    standard = modules_after("")
    loaded = modules_after("import vessel_rt; vessel_rt.VesselError, dir(vessel_rt)")
    assert loaded - standard - sys.stdlib_module_names == {"vessel_rt"}
    assert not modules_after("from vessel_rt import load") & {*HEAVY, "onnxruntime", "pydicom", "ray"}


def test_a_whole_run_needs_neither_torch_nor_network(standin: Bundle, tmp_path: Path) -> None:
    make_frame().save(tmp_path / "a.png")
    program = "from vessel_rt.cli import main\nassert main(['infer', sys.argv[1], '--bundle', sys.argv[2], '-o', sys.argv[3]]) == 0"
    loaded = modules_after(program, str(tmp_path / "a.png"), str(standin.folder), str(tmp_path / "out"))
    assert not loaded & HEAVY
    assert "onnxruntime" in loaded
    assert (tmp_path / "out" / "masks" / "a.png").exists()

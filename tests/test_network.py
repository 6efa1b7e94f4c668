"""No command uses the network, and none leaves a file but where it says: observed from below Python, in every child process too."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.paths import ROOT, Tiny

LOOPBACK = ("127.", "::1", "::ffff:127.")
METADATA = "169.254.169.254"  # link-local: where Ray asks which cloud it is in, though its usage statistics are off

# Where each command may leave files, of the folders that it knows of: home, the temporary folder, the working folder.
KEY = "home/.config/vessel-rt/study-codes.key"

pytestmark = pytest.mark.slow

Observe = Callable[..., tuple[list[str], list[str]]]


@pytest.fixture(scope="module")
def observer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("a C compiler on Linux is needed to observe a process's calls")
    library = tmp_path_factory.mktemp("observer") / "observer.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests" / "network_observer.c", "-ldl"], check=True)
    return library


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder for all that a command may write to; its path is short, since Ray makes sockets in it."""
    with tempfile.TemporaryDirectory(prefix="net", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def observe(observer: Path, place: Path) -> Observe:
    """Run a module's command as a user would who has just logged in; what it did on the network, and the files that it left."""

    def run(module: str, arguments: Sequence[str | Path], *, code: int = 0) -> tuple[list[str], list[str]]:
        places = {name: place / name for name in ("home", "temporary", "work")}
        for folder in places.values():
            folder.mkdir(exist_ok=True)
        before = _files(place)
        log = place / "network.log"
        log.unlink(missing_ok=True)
        environment = {
            "PATH": os.environ["PATH"],  # nothing else of the tests' own: some libraries are quiet where CI is set
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(places["home"]),
            "TMPDIR": str(places["temporary"]),
            "LD_PRELOAD": str(observer),
            "NETWORK_LOG": str(log),
        }
        program = f"import sys; from {module} import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)], cwd=places["work"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        log_lines = log.read_text().splitlines() if log.exists() else []
        return log_lines, sorted(_files(place) - before - {"network.log"})

    return run


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def outside(files: Sequence[str], *allowed: str) -> list[str]:
    """The files that lie in none of the `allowed` places."""
    return [file for file in files if not file.startswith(allowed)]


def test_the_observer_sees_a_lookup_and_an_address(observe: Observe, place: Path) -> None:
    module = place / "work" / "caller.py"
    module.parent.mkdir()
    module.write_text(
        "import socket\n"
        "def main(_):\n"
        "    socket.getaddrinfo('localhost', 80)\n"
        "    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))\n"
    )
    calls, _ = observe("caller", [])
    assert {"lookup localhost", "socket ipv4", "route 127.0.0.1"} <= set(calls)


@pytest.mark.parametrize("devices", ["cpu:1", "cpu:2"])
def test_runtime_commands(observe: Observe, fp32_bundle: Path, tiny: Tiny, devices: str) -> None:
    infer = ("infer", tiny.frames, "--bundle", fp32_bundle, "--num-images", "4", "--devices", devices)
    for arguments in (
        (*infer, "-o", "out"),
        ("evaluate", "out", "--gt", tiny.annotations),
        ("report", "out"),
        ("check-data", tiny.annotations, "--images", tiny.frames),
        ("devices", "--bundle", fp32_bundle),
        ("plan", "--bundle", fp32_bundle, "--memory", "24"),
        ("check", "--bundle", fp32_bundle, "--devices", devices, "-o", "checked"),
        (*infer, "-o", "shards/0", "--num-shards", "2", "--shard-id", "0"),
        (*infer, "-o", "shards/1", "--num-shards", "2", "--shard-id", "1"),
        ("merge-shards", "shards/0", "shards/1", "-o", "merged"),
    ):
        calls, files = observe("vessel_rt.cli", arguments)
        assert calls == [], arguments
        assert outside(files, KEY, "work/out/", "work/shards/", "work/merged/", "work/checked/") == [], arguments


def test_exporter_commands(observe: Observe, tiny: Tiny) -> None:
    frame = min(tiny.frames.iterdir())
    original = ("--ckpt", tiny.checkpoint, "--base", tiny.base, "--sam2", tiny.sam2)
    for arguments in (
        ("inspect", tiny.checkpoint),
        ("export", *original, "--out", "bundle", "--recipe", ROOT / "engines" / "cpu.toml"),
        ("verify", "--bundle", "bundle", *original, "--images", frame),
        ("export", *original, "--out", "half", "--no-golden", "--recipe", ROOT / "engines" / "cpu.toml", "--precision", "fp16"),
        ("ranges", "--bundle", "half", "--images", frame),
    ):
        calls, files = observe("vessel_export.cli", arguments)
        assert calls == [], arguments
        assert outside(files, KEY, "work/bundle/", "work/half/") == [], arguments


def test_an_engines_build(observe: Observe, fp16_bundle: Path, place: Path) -> None:
    pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="TensorRT-RTX's provider is not installed")
    shutil.copytree(fp16_bundle, place / "work" / "bundle")
    calls, files = observe(
        "vessel_export.cli", ("build", "--bundle", "bundle", "--describe", "sm86", "--recipe", ROOT / "engines" / "rtx3090.toml")
    )
    assert calls == []
    assert outside(files, "work/bundle/engines/") == []


def test_ray_stays_on_this_host(observe: Observe, fp32_bundle: Path, tiny: Tiny) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("extra ray is not installed")
    arguments = ("infer", tiny.frames, "--bundle", fp32_bundle, "--num-images", "4", "--devices", "cpu:2", "--ray", "-o", "out")
    calls, files = observe("vessel_rt.cli", arguments)
    elsewhere = [call for call in calls if call.startswith(("connect", "sendto")) and not call.split()[1].startswith((*LOOPBACK, METADATA))]
    assert elsewhere == []
    assert outside(files, KEY, "work/out/", "temporary/ray") == []

"""A real cluster of two actors on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.frames import make_frame
from tests.support.runs import many, options, same_results
from vessel_rt.device.providers import Device
from vessel_rt.formats.bundle import Bundle
from vessel_rt.run.infer import infer

# Not imported here: what Ray is told before its import decides on which interfaces it listens.
if importlib.util.find_spec("ray") is None:
    pytest.skip("extra ray is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow

TWO = (Device("cpu"), Device("cpu"))


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray keeps its logs; a socket's path may not be longer."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_two_actors_do_what_one_device_does_and_no_name_reaches_rays_logs(standin: Bundle, tmp_path: Path, session: Path) -> None:
    frames = many(tmp_path / "frames", 20)
    make_frame().save(frames / "Study-Quokka-B.png")
    infer(standin, options(frames, tmp_path / "one"))
    summary = infer(standin, options(frames, tmp_path / "ray", devices=TWO, ray="local"))
    assert (summary.images, summary.failed) == (22, 1)
    same_results(tmp_path / "ray", tmp_path / "one")
    logs = [path for path in session.rglob("*") if path.is_file() and not path.is_symlink()]
    assert logs
    assert not [path for path in logs if b"Quokka" in path.read_bytes()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the actor's process in /proc")
def test_the_frames_of_an_actor_that_is_killed_come_back(standin: Bundle, tmp_path: Path, session: Path) -> None:
    frames = many(tmp_path / "frames", 60)
    infer(standin, options(frames, tmp_path / "one"))
    killed: list[int] = []

    def kill() -> None:
        journal, until = tmp_path / "ray" / "journal.jsonl", time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 1) and time.monotonic() < until:
            time.sleep(0.01)
        actors = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if path.read_bytes().startswith(b"ray::MapWorker")]
        for actor in actors[:1]:
            os.kill(actor, signal.SIGKILL)
            killed.append(actor)

    thread = threading.Thread(target=kill)
    thread.start()
    summary = infer(standin, options(frames, tmp_path / "ray", devices=TWO, ray="local"))
    thread.join()
    assert len(killed) == 1
    assert (summary.images, summary.failed) == (61, 1)
    same_results(tmp_path / "ray", tmp_path / "one")

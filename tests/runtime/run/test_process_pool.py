"""Real processes, really killed."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.support.frames import make_frame
from tests.support.runs import lines, many, options, same_results
from vessel_rt.device.providers import Device
from vessel_rt.errors import DeviceError, VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.frames import Frame
from vessel_rt.results.writer import Entry
from vessel_rt.run import worker_process
from vessel_rt.run.infer import infer
from vessel_rt.run.process_pool import RESTARTS, ProcessPool
from vessel_rt.run.worker_process import Patience, WorkerProcess

TWO = (Device("cpu"), Device("cpu"))

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def test_two_processes_do_what_one_does(standin: Bundle, tmp_path: Path) -> None:
    frames = many(tmp_path / "frames", 23)
    infer(standin, options(frames, tmp_path / "one"))
    summary = infer(standin, options(frames, tmp_path / "two", devices=TWO))
    assert (summary.images, summary.failed) == (24, 1)
    same_results(tmp_path / "two", tmp_path / "one")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["device"] == "cpu, cpu"


@pytest.mark.slow
def test_a_process_that_is_killed_is_started_again(
    standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three times, in the middle of several frames: not one is lost, and the record is that of an uninterrupted run."""
    frames = many(tmp_path / "frames", 40)
    infer(standin, options(frames, tmp_path / "one"))
    run, turns, killed = WorkerProcess.run, itertools.count(), []

    def run_and_kill(self: WorkerProcess, frames: Sequence[Frame]) -> Iterator[Entry]:
        entries = run(self, frames)
        if len(frames) > 1 and next(turns) < 3:  # a frame that is tried alone has been lost once already
            yield next(entries)
            self._child.kill()
            killed.append(self._child.pid)
        yield from entries

    monkeypatch.setattr(WorkerProcess, "run", run_and_kill)
    summary = infer(standin, options(frames, tmp_path / "two", devices=TWO))
    assert len(killed) == 3
    assert (summary.images, summary.failed) == (41, 1)
    same_results(tmp_path / "two", tmp_path / "one")
    assert "died (signal 9); it is restarted" in capfd.readouterr().err


@pytest.mark.slow
def test_a_frame_that_kills_is_tried_twice_and_no_other_fails(standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed by its own graph, for one frame of a size of its own."""
    frames = many(tmp_path / "frames", 12)
    make_frame(1344, 1344).save(frames / "005_deadly.png")
    deadly = (
        "import os; from vessel_rt.model import segmenter; from vessel_rt.run.worker_process import serve\n"
        "prepare = segmenter.Segmenter.prepare\n"
        "segmenter.Segmenter.prepare = lambda self, image: os.abort() if image.width == 1344 else prepare(self, image)\n"
        "serve()"
    )
    monkeypatch.setattr("vessel_rt.run.worker_process._PROGRAM", deadly)
    summary = infer(standin, options(frames, tmp_path / "out", devices=TWO))
    assert (summary.images, summary.failed) == (14, 2)
    errors = {line["image"]: line["error"] for line in lines(tmp_path / "out") if line["status"] == "error"}
    assert errors.keys() == {"004_text.png", "005_deadly.png"}
    assert errors["005_deadly.png"] == "the process that worked on it died twice"


def test_what_a_process_cannot_load_stops_the_run_before_it_begins(standin: Bundle, frames: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("vessel_rt.run.worker_process._PROGRAM", "import sys; sys.exit(3)")
    with pytest.raises(VesselError, match=r"device cpu died \(exit code 3\), before it was ready"):
        infer(standin, options(frames, tmp_path / "out", devices=TWO))
    assert not (tmp_path / "out").exists()


def test_a_bug_in_a_process_shows_its_traceback_without_names(standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    make_frame().save(tmp_path / "in" / "Study-Quokka-B.png")
    broken = (
        "from vessel_rt.run import worker, worker_process\n"
        "def read(frame, rescale): raise RuntimeError(f'no way with {frame.path}')\n"
        "worker.read_frame = read; worker_process.serve()"
    )
    monkeypatch.setattr("vessel_rt.run.worker_process._PROGRAM", broken)
    with pytest.raises(RuntimeError, match="no way with") as caught:
        infer(standin, options(tmp_path / "in", tmp_path / "out", devices=TWO))
    assert "Quokka" not in str(caught.value)


STICKY = """
import itertools
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from vessel_rt.device import session
from vessel_rt.run.worker_process import serve
run, calls = session.Session.run, itertools.count(1)
def run_or_fail(self, feeds, **more):
    with self._faults():
        if {condition}:
            raise Fail("CUDA failure 700")
    return run(self, feeds, **more)
session.Session.run = run_or_fail
serve()
"""


@pytest.mark.slow
def test_processes_whose_devices_begin_to_fail_are_started_again(
    standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    frames = many(tmp_path / "frames", 30)
    infer(standin, options(frames, tmp_path / "one"))
    monkeypatch.setattr("vessel_rt.run.worker_process._PROGRAM", STICKY.format(condition="next(calls) > 35"))
    summary = infer(standin, options(frames, tmp_path / "two", devices=TWO))
    assert (summary.images, summary.failed) == (31, 1)
    same_results(tmp_path / "two", tmp_path / "one")
    assert "CUDA failure 700" in capfd.readouterr().err


@pytest.mark.slow
def test_devices_that_only_fail_are_given_up_and_no_frame_is_blamed(
    standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    frames = many(tmp_path / "frames", 12)
    monkeypatch.setattr("vessel_rt.run.worker_process._PROGRAM", STICKY.format(condition="next(calls) > 2"))  # loading takes two
    with pytest.raises(DeviceError, match="CUDA failure 700"):
        infer(standin, options(frames, tmp_path / "out", devices=TWO))
    assert [line["image"] for line in lines(tmp_path / "out") if line["status"] == "error"] in ([], ["004_text.png"])
    said = capfd.readouterr().err
    assert said.count("is given up") == 2
    assert said.count("is restarted") == 2 * RESTARTS


@pytest.mark.slow
def test_a_device_that_is_given_up_leaves_its_frames_to_the_others(
    standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    frames = many(tmp_path / "frames", 30)
    infer(standin, options(frames, tmp_path / "one"))
    marked = (
        "import dataclasses, os; from vessel_rt.run import worker, worker_process\n"
        "def start(self, stop, say, *more, opened=worker.Job.open):\n"
        "    if self.device.index: worker.read_frame = lambda *_: os.abort()\n"
        "    return opened(dataclasses.replace(self, device=worker.Device('cpu')), stop, say, *more)\n"
        "worker.Job.open = start; worker_process.serve()"
    )
    monkeypatch.setattr("vessel_rt.run.worker_process._PROGRAM", marked)
    summary = infer(standin, options(frames, tmp_path / "two", devices=(Device("cpu"), Device("cpu", 1))))
    assert (summary.images, summary.failed) == (31, 1)
    same_results(tmp_path / "two", tmp_path / "one")
    assert capfd.readouterr().err.count("is given up") == 1


@pytest.mark.slow
def test_a_process_that_makes_no_progress_is_killed_and_its_frames_come_back(
    standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    frames = many(tmp_path / "frames", 40)
    infer(standin, options(frames, tmp_path / "one"))
    run, stopped = WorkerProcess.run, []

    def run_and_stop(self: WorkerProcess, frames: Sequence[Frame]) -> Iterator[Entry]:
        entries = run(self, frames)
        if len(frames) > 1 and not stopped:
            yield next(entries)
            os.kill(self._child.pid, signal.SIGSTOP)
            stopped.append(self._child.pid)
        yield from entries

    monkeypatch.setattr(WorkerProcess, "run", run_and_stop)
    monkeypatch.setattr("vessel_rt.run.infer.ProcessPool", functools.partial(ProcessPool, patience=Patience(stalled=10)))
    summary = infer(standin, options(frames, tmp_path / "two", devices=TWO))
    assert (summary.images, summary.failed) == (41, 1)
    same_results(tmp_path / "two", tmp_path / "one")
    assert "made no progress" in capfd.readouterr().err


def test_batches_are_whole_but_for_the_last_of_each_process(standin: Bundle, tmp_path: Path) -> None:
    frames = many(tmp_path / "frames", 61)
    (frames / "004_text.png").unlink()
    summary = infer(standin, options(frames, tmp_path / "out", batch=4, devices=TWO))
    assert (summary.images, summary.failed) == (61, 0)
    together = [line["batch"] for line in lines(tmp_path / "out", "timings.jsonl")]
    partial = sum(Fraction(1, images) for images in together if images < 4)
    assert partial <= len(TWO)


@pytest.mark.parametrize("sent", [b"", pickle.dumps("half a job")[:-3]], ids=["nothing", "half"])
def test_a_process_whose_parent_is_gone_ends_in_silence(sent: bytes) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", worker_process._PROGRAM], input=sent, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


IMPATIENT = (
    "import functools; from vessel_rt.run import infer, process_pool, worker_process\n"
    "infer.ProcessPool = functools.partial(process_pool.ProcessPool, patience=worker_process.Patience(stopping=2))\n"
)


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that are still there, zombies not counted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(path.parent.name))
    return found


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc")
def test_a_run_that_is_stopped_kills_a_process_that_does_not_answer(standin: Bundle, bitmaps: Path) -> None:
    with begin(standin, bitmaps, "--devices", "cpu:2", before=IMPATIENT) as process:
        os.kill(children(process.pid)[0], signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in err
    assert "did not stop within" in err
    finished = lines(bitmaps / "out")
    assert 0 < len(finished) < 300
    assert all(line["status"] == "ok" for line in finished)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc")
def test_no_process_outlives_a_parent_that_is_killed(standin: Bundle, bitmaps: Path) -> None:
    with begin(standin, bitmaps, "--devices", "cpu:2") as process:
        workers = children(process.pid)
        os.kill(workers[0], signal.SIGSTOP)
        process.kill()
        process.communicate(timeout=60)
    until = time.monotonic() + 60
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(workers) == 2
    assert not any(map(is_alive, workers))


def begin(standin: Bundle, folder: Path, *arguments: str, before: str = "") -> subprocess.Popen[str]:
    """`vessel-rt infer frames -o out`, in a process group of its own, returned when its first entries are there."""
    program = f"{before}import sys; from vessel_rt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        program,
        "infer",
        "frames",
        "-o",
        "out",
        "--bundle",
        str(standin.folder),
        "--device",
        "cpu",
        *arguments,
    ]
    if "--devices" in arguments:
        del command[command.index("--device") : command.index("--device") + 2]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    journal, until = folder / "out" / "journal.jsonl", time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 1) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    return process


@pytest.fixture
def bitmaps(tmp_path: Path) -> Path:
    (tmp_path / "frames").mkdir()
    for number in range(300):
        make_frame(seed=number).save(tmp_path / "frames" / f"{number:03}.bmp")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(), ("--devices", "cpu:2")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_finishes_what_is_in_hand_and_goes_on(
    standin: Bundle, bitmaps: Path, number: signal.Signals, devices: tuple[str, ...]
) -> None:
    with begin(standin, bitmaps, "--json", *devices) as process:
        os.kill(process.pid, number) if devices else os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert "Give the same command again to continue." in err
    done = json.loads(out.splitlines()[-1])
    assert (done["stopped"], done["exit_code"], done["total"]) == (number.name, 128 + number, 300)
    finished = lines(bitmaps / "out")
    assert 0 < len(finished) == done["images"] < 300
    assert {path.name for path in (bitmaps / "out").iterdir()} == {"masks", "overlays", "previews", "results.jsonl", "timings.jsonl"}
    assert {path.name for path in (bitmaps / "out").rglob("*/*")} == {Path(f).name for line in finished for f in line["files"]}
    summary = infer(standin, options(bitmaps / "frames", bitmaps / "out", devices=(Device("cpu"),)))
    assert (summary.images, summary.kept, summary.failed) == (300, len(finished), 0)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(), ("--devices", "cpu:2")])
def test_killed_again_and_again_a_run_ends_as_an_uninterrupted_one(standin: Bundle, bitmaps: Path, devices: tuple[str, ...]) -> None:
    for delay in (0.0, 0.05, 0.15):
        with begin(standin, bitmaps, *devices) as process:
            time.sleep(delay)
            process.kill()
            process.communicate(timeout=60)
    infer(standin, options(bitmaps / "frames", bitmaps / "out", devices=(Device("cpu"),)))
    infer(standin, options(bitmaps / "frames", bitmaps / "once", devices=(Device("cpu"),)))
    same_results(bitmaps / "out", bitmaps / "once")

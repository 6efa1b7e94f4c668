"""Real processes whose standard streams are closed, full, or read by nobody."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vessel_rt.formats.bundle import Bundle

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a shell and /dev/full are needed")

_PROGRAM = "import sys; from vessel_rt.cli import main; sys.exit(main(sys.argv[1:]))"
NOWHERE = ["2>&-", ">&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/full", ">/dev/full 2>/dev/full", "2>&1 | head -c1", ">&- 2>/dev/full"]


def shell(redirected: str, *arguments: str | Path) -> tuple[int, str, str]:
    """The exit code of `vessel-rt`, though it stands in a pipe, and what comes through."""
    command = shlex.join([sys.executable, "-c", _PROGRAM, *map(str, arguments)])
    script = f"set -o pipefail; {command} {redirected}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("devices", ["cpu:1", "cpu:2"])
@pytest.mark.parametrize("redirected", NOWHERE)
def test_the_work_is_done_though_nothing_can_be_said(standin: Bundle, frames: Path, tmp_path: Path, redirected: str, devices: str) -> None:
    code, out, err = shell(redirected, "infer", frames, "-o", tmp_path / "out", "--bundle", standin.folder, "--devices", devices, "-v")
    assert code == 0
    assert "Traceback" not in out + err
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok"] * 3
    assert all((tmp_path / "out" / file).stat().st_size for line in lines for file in line["files"])
    assert (tmp_path / "out" / "run.json").exists()
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full", "2>&1 | head -c1"])
def test_frames_that_fail_count_though_nothing_can_be_said(standin: Bundle, frames: Path, tmp_path: Path, redirected: str) -> None:
    (frames / "b.png").write_bytes(b"")
    command = ["infer", frames, "-o", tmp_path / "out", "--bundle", standin.folder, "--device", "cpu"]
    assert shell(redirected, *command)[0] == 1
    assert (tmp_path / "out" / "run.json").exists()
    assert shell(redirected, "infer", tmp_path / "none", *command[2:])[0] == 1


@pytest.mark.parametrize("command", [["devices"], ["devices", "--json"], ["--help"], ["--version"], ["infer", "--help"]])
def test_what_is_only_printed_has_to_be_printed(command: list[str]) -> None:
    for redirected, said in ((">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")):
        code, _, err = shell(redirected, *command)
        assert code == 1
        [line] = err.splitlines()
        assert said in line
    assert shell(">/dev/full 2>&-", *command) == (1, "", "")
    assert shell("2>&-", *command)[0] == shell("2>/dev/full", *command)[0] == 0


def test_a_reader_that_has_seen_enough_is_told_nothing() -> None:
    code, out, err = shell("| head -c1", "devices", "--json")
    assert (out, err) == ("[", "")
    assert code in (0, 1)  # 0 where all of it was in the pipe before the reader went


def test_bad_usage_is_bad_usage() -> None:
    for redirected in ("2>&-", "2>/dev/full"):
        assert shell(redirected, "fly")[0] == 2


def test_no_file_of_the_run_gets_the_number_of_a_closed_stream(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    """Whatever prints would write into it."""
    noisy = (
        "import os, sys; from vessel_rt import cli; from vessel_rt.results import writer as outputs\n"
        "save = outputs.FrameWriter._save\n"
        "def noisy(*arguments, **how):\n    os.write(1, b'noise'), os.write(2, b'noise')\n    return save(*arguments, **how)\n"
        "outputs.FrameWriter._save = noisy; sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["infer", frames, "-o", tmp_path / "out", "--bundle", standin.folder, "--device", "cpu"]
    command = shlex.join([sys.executable, "-c", noisy, *map(str, arguments)])
    assert subprocess.run(["bash", "-c", f"{command} <&- >&- 2>&-"], check=False, timeout=120).returncode == 0
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"noise" in path.read_bytes()]

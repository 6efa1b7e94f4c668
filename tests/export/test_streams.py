"""Standard output and error that are closed, full or unread: the work is done all the same, and nothing prints a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT, Tiny
from vessel_export.cli import main

RUN = f"{sys.executable} -c 'import sys; from vessel_export.cli import main; sys.exit(main())'"

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def shell(arguments: str, redirections: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """`vessel-export` with `arguments`; its exit code is in the file `code`."""
    script = f"{{ {RUN} {arguments} {redirections}; echo $? >{tmp_path}/code; }}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300, env=_environment())


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def code(tmp_path: Path) -> int:
    return int((tmp_path / "code").read_text())


def test_a_reader_that_goes_is_no_traceback(tiny: Tiny, tmp_path: Path) -> None:
    script = f"{RUN} inspect --json {tiny.checkpoint} 2>{tmp_path}/err | head -c1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=_environment())
    assert done.returncode in (0, 1)  # 0 where all of it was written before `head` went
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("redirections", [">&-", "2>&-", ">&- 2>&-", "0<&- >&- 2>&-"])
def test_closed_streams(tiny: Tiny, tmp_path: Path, redirections: str) -> None:
    done = shell(f"inspect {tiny.checkpoint}", redirections, tmp_path)
    assert code(tmp_path) == int(">&-" in redirections.split())  # what it prints is its work
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("redirections", "expected"), [(">/dev/full", 1), ("2>/dev/full", 0)])
def test_full_streams(tiny: Tiny, tmp_path: Path, redirections: str, expected: int) -> None:
    done = shell(f"inspect {tiny.checkpoint}", redirections, tmp_path)
    assert code(tmp_path) == expected
    assert len(done.stderr.splitlines()) == (redirections == ">/dev/full")


@pytest.mark.slow
@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full", ">&- 2>&-"])
def test_bad_input_without_anyone_to_tell(tmp_path: Path, redirections: str) -> None:
    shell("inspect none.pth", redirections, tmp_path)
    assert code(tmp_path) == 1
    shell("inspect --nonsense", redirections, tmp_path)
    assert code(tmp_path) == 2


@pytest.mark.slow
@pytest.mark.parametrize("redirections", [">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_an_export_is_made_that_nobody_hears_of(tiny: Tiny, tmp_path: Path, redirections: str) -> None:
    inputs = f"--ckpt {tiny.checkpoint} --base {tiny.base} --sam2 {tiny.sam2} --recipe engines/cpu.toml"
    shell(f"export {inputs} --out {tmp_path}/b", redirections, tmp_path)
    assert code(tmp_path) == 0
    assert (tmp_path / "b" / "bundle.json").is_file()


@pytest.mark.parametrize("alpha", ["0", "-1", "nan", "inf", "x"])
def test_an_alpha_that_is_none_is_bad_usage(alpha: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["export", "--ckpt", "x", f"--lora-alpha={alpha}"])
    assert usage.value.code == 2
    assert "--lora-alpha" in capsys.readouterr().err

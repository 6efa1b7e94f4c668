from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vessel_rt.errors import VesselError
from vessel_rt.io.folder_lock import locked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")

_HOLD = """
import sys
from pathlib import Path
from vessel_rt.io.folder_lock import locked
with locked(Path(sys.argv[1]), make=True):
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that has locked `folder`, until its standard input ends."""
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.parametrize("shared", [False, True])
def test_a_folder_that_another_process_has_locked_is_refused(tmp_path: Path, shared: bool) -> None:
    with hold(tmp_path / "new" / "out") as process:
        with pytest.raises(VesselError, match="another command is at work"), locked(tmp_path / "new" / "out", shared=shared):
            pass
        assert (tmp_path / "new" / "out").is_dir()
        process.communicate()
    assert not (tmp_path / "new").exists()  # nothing was put there


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    with hold(tmp_path / "out") as process:
        process.kill()
        process.communicate()
    with locked(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == []


def test_readers_share_a_folder(tmp_path: Path) -> None:
    refused = pytest.raises(VesselError, match="another command is at work")
    with locked(tmp_path, shared=True), locked(tmp_path, shared=True), refused, locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_folders_that_were_made_stay_when_something_is_in_them(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b" / "c", make=True):
        (tmp_path / "a" / "other").write_text("")
    assert (tmp_path / "a").is_dir()
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty", make=True):
        pass
    assert (tmp_path / "empty").is_dir()  # it was there before


def test_a_folder_that_is_not_there_is_not_made_by_readers(tmp_path: Path) -> None:
    with locked(tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()


def test_a_folder_that_vanishes_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the process that made it ends just then."""
    import fcntl

    lock, vanished = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not vanished:
            vanished.append((tmp_path / "out").rmdir())
        lock(descriptor, how)

    monkeypatch.setattr("vessel_rt.io.folder_lock.fcntl.flock", flock)
    with locked(tmp_path / "out", make=True) as held:
        held.check()
        (tmp_path / "out" / "file").write_text("")
    assert vanished


def test_a_folder_that_is_moved_away_is_noticed(tmp_path: Path) -> None:
    with locked(tmp_path / "out", make=True) as held:
        held.check()
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        with pytest.raises(VesselError, match="was moved or replaced"):
            held.check()
        (tmp_path / "out").mkdir()
        with pytest.raises(VesselError, match="was moved or replaced"):
            held.check()


def test_a_link_to_a_folder_is_locked_as_the_folder_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with locked(tmp_path / "link") as held:
        held.check()
        with pytest.raises(VesselError, match="another command is at work"), locked(tmp_path / "out"):
            pass
    (tmp_path / "nowhere").symlink_to("none")
    with pytest.raises(VesselError, match="nowhere: cannot be written"), locked(tmp_path / "nowhere", make=True):
        pass


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("vessel_rt.io.folder_lock.fcntl.flock", flock)
    with locked(tmp_path / "out", make=True) as held:
        held.check()

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from pathlib import Path

import pytest

from vessel_rt.io.files import is_temporary, missing_part, open_regular, read_regular, replacing, require_regular

posix = pytest.mark.skipif(os.name != "posix", reason="FIFOs, sockets and devices of POSIX")


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """What may stand where a file is expected."""
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    os.mkfifo("fifo")
    Path("link").symlink_to("fifo")
    Path("folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    return {name: tmp_path / name for name in ("fifo", "link", "folder", "socket")} | {"zero": Path("/dev/zero")}


@posix
@pytest.mark.parametrize("name", ["fifo", "link", "folder", "socket", "zero"])
def test_what_is_no_regular_file_is_refused_at_once(odd: dict[str, Path], name: str) -> None:
    for reader in (require_regular, open_regular, lambda path: read_regular(path, 10)):
        with pytest.raises(OSError, match=r"not a (regular )?file"):
            reader(odd[name])


@posix
def test_a_fifo_that_takes_a_files_place_meanwhile(odd: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vessel_rt.io.files.require_regular", lambda path: None)
    with pytest.raises(OSError, match="a FIFO"):
        open_regular(odd["fifo"])


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes") as caught:
        read_regular(tmp_path / "file", 4)
    assert caught.value.errno == errno.EFBIG


@posix
def test_a_file_that_says_it_is_empty_is_read_up_to_the_limit_too() -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("there is no /proc")
    with pytest.raises(OSError, match="larger than 16 bytes"):
        read_regular(Path("/proc/self/maps"), 16)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a\0b", "a\ud800"):
        with pytest.raises(FileNotFoundError):
            require_regular(tmp_path / name)
    with pytest.raises(OSError):  # noqa: PT011 - its number depends on the system
        require_regular(tmp_path / ("x" * 300))


def test_which_part_of_a_path_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ward").mkdir()
    (tmp_path / "ward" / "link").symlink_to("nowhere")
    assert missing_part(Path("none.png")) == "it is not in the current folder"
    assert missing_part(Path("ward/none.png")) == "part 2 of 2 of its path does not exist"
    assert missing_part(Path("wrad/sub/none.png")) == "part 1 of 3 of its path does not exist"
    assert missing_part(tmp_path / "ward" / "none.png").startswith(f"part {len(tmp_path.parts) + 1} of {len(tmp_path.parts) + 1} ")
    assert "a link to what is not there" in missing_part(Path("ward/link"))
    assert "2 of 2" in missing_part(Path("ward") / ("x" * 300))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed, in order: `sync <name>` and `rename`."""
    noted: list[str] = []
    rename = os.replace

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        noted.append(f"sync {'temporary' if is_temporary(path) else path.name}")

    def replace(source: Path, target: Path) -> None:
        noted.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return noted


@pytest.mark.skipif(sys.platform != "linux", reason="the names of open files are in /proc")
@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_on_the_disk_before_its_name_is_and_the_name_before_the_block_ends(tmp_path: Path, calls: list[str], sync: bool) -> None:
    with replacing(tmp_path / "a", sync=sync) as temporary:
        temporary.write_text("new")
        assert calls == []
    assert calls == (["sync temporary", "rename", f"sync {tmp_path.name}"] if sync else ["rename"])
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize(("number", "written"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False), (errno.ENOSPC, False)])
def test_a_disk_that_cannot_sync_is_taken_and_one_that_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, written: bool
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "a").write_text("old")
    ends = contextlib.nullcontext() if written else pytest.raises(OSError, match=os.strerror(number))
    with ends, replacing(tmp_path / "a", sync=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == ("new" if written else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

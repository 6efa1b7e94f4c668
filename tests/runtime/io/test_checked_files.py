from __future__ import annotations

import os
import pickle
import sys
import threading
from pathlib import Path

import pytest

from tests.support.leases import has_leases
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.io import checked_files
from vessel_rt.io.checked_files import CheckedFiles, changes, check_files, leases, sha256_of

CONTENT = b"0123456789" * 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    for name in ("a", "weights/b"):
        (tmp_path / name).write_bytes(CONTENT)
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    return tmp_path


@pytest.fixture
def files(folder: Path) -> CheckedFiles:
    found, faults = check_files(folder, {name: FileRecord(len(CONTENT), sha256_of(folder / name)) for name in ("a", "weights/b")})
    assert not faults
    return found


def test_files_that_are_left_alone_are_unchanged(files: CheckedFiles) -> None:
    assert list(changes(files)) == []
    assert list(changes(pickle.loads(pickle.dumps(files)))) == []


def test_content_that_is_written_in_place_is_seen(folder: Path, files: CheckedFiles) -> None:
    with (folder / "a").open("r+b") as file:
        file.write(b"x")
    assert [path for path, _ in changes(files)] == [folder / "a"]


def test_content_that_is_written_in_place_is_seen_though_the_time_is_put_back(folder: Path, files: CheckedFiles) -> None:
    with (folder / "a").open("r+b") as file:
        file.write(b"x")
    os.utime(folder / "a", ns=(10**18, 10**18))
    [(path, what)] = changes(files)
    assert path == folder / "a"
    assert "SHA-256" in what


@pytest.mark.parametrize("size", [0, 5, 20_000])
def test_another_size_is_seen(folder: Path, files: CheckedFiles, size: int) -> None:
    os.truncate(folder / "weights" / "b", size)
    assert [path for path, _ in changes(files)] == [folder / "weights" / "b"]


def test_a_replaced_file_is_seen_though_it_is_equal(folder: Path, files: CheckedFiles) -> None:
    (folder / "new").write_bytes(CONTENT)
    os.utime(folder / "new", ns=(10**18, 10**18))
    os.replace(folder / "new", folder / "a")
    assert [path for path, _ in changes(files)] == [folder / "a"]


def test_a_removed_file_and_a_link_in_its_place_are_seen(folder: Path, files: CheckedFiles) -> None:
    (folder / "a").rename(folder / "c")
    assert [path for path, _ in changes(files)] == [folder / "a"]
    (folder / "a").symlink_to(folder / "c")
    assert [path for path, _ in changes(files)] == [folder / "a"]


def test_a_new_hard_link_and_other_permissions_are_no_change(folder: Path, files: CheckedFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports beside a bundle link to its files. Such a file is hashed once more, not again and again."""
    os.link(folder / "a", folder / "c")
    (folder / "weights" / "b").chmod(0o600)
    assert list(changes(files)) == []
    monkeypatch.setattr(checked_files, "_check", lambda *_: pytest.fail("hashed again"))
    assert list(changes(files)) == []


def test_what_is_read_lies_in_the_folder(folder: Path) -> None:
    record = FileRecord(len(CONTENT), sha256_of(folder / "a"))
    (folder / "linked").symlink_to(folder / "a")
    (folder / "folder").symlink_to(folder / "weights")
    os.mkfifo(folder / "fifo")
    names = ("linked", "folder/b", "fifo", "weights", "a/b", "nowhere")
    found, faults = check_files(folder, dict.fromkeys(names, record))
    assert not found
    assert [fault.partition(" ")[0] for fault in faults] == list(names)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has leases")
def test_a_writer_waits_while_a_lease_is_held(folder: Path) -> None:
    path = folder / "a"
    if not has_leases(path):
        pytest.skip("this file system has no leases")
    with leases([path, folder / "weights" / "b"]) as in_demand:
        assert in_demand() == []
        assert path.read_bytes() == CONTENT  # who only reads does not wait
        writer = threading.Thread(target=os.truncate, args=(path, 5))
        writer.start()
        while not in_demand():
            assert writer.is_alive()
        assert in_demand() == [path]
        assert path.stat().st_size == len(CONTENT)
    writer.join()
    assert path.stat().st_size == 5


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has leases")
def test_a_lease_that_cannot_be_had_is_done_without(folder: Path) -> None:
    with (folder / "a").open("r+b"), leases([folder / "a", folder / "nowhere"]) as in_demand:
        assert in_demand() == []

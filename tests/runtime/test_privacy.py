from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vessel_rt import privacy
from vessel_rt.errors import VesselError
from vessel_rt.privacy import StudyCodes, conceal, remember


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "key"
    first = StudyCodes.load(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert str(path) in capsys.readouterr().err
    assert StudyCodes.load(path).code("S0042") == first.code("S0042") != first.code("S0043")
    assert capsys.readouterr().err == ""
    assert [p.name for p in path.parent.iterdir()] == ["key"]


def test_processes_that_begin_together_have_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        codes = {codes.code("S0042") for codes in pool.map(lambda _: StudyCodes.load(tmp_path / "key"), range(32))}
    assert len(codes) == 1


def test_codes_depend_on_the_key() -> None:
    one, other = StudyCodes(bytes(32)), StudyCodes(b"\1" * 32)
    assert one.code("S0042") != other.code("S0042")
    assert len(one.code("S0042")) == privacy.CODE_DIGITS
    assert one.code(os.fsdecode(b"caf\xe9"))  # not UTF-8


def test_where_the_key_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VESSEL_KEY")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    StudyCodes.load()
    assert (tmp_path / "config" / "vessel-rt" / "study-codes.key").exists()
    monkeypatch.setenv("VESSEL_KEY", str(tmp_path / "other"))
    StudyCodes.load()
    assert (tmp_path / "other").exists()


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_keys_that_are_not_taken(tmp_path: Path) -> None:
    key = tmp_path / "key"
    StudyCodes.load(key)
    with pytest.raises(VesselError, match="may not lie among the results"):
        StudyCodes.load(key, outside=tmp_path)
    key.chmod(0o640)
    with pytest.raises(VesselError, match="others may read this key; chmod 600"):
        StudyCodes.load(key)
    key.chmod(0o600)
    key.write_text("short")
    with pytest.raises(VesselError, match="not a key that vessel-rt made"):
        StudyCodes.load(key)
    with pytest.raises(VesselError, match="no key for study codes"):
        StudyCodes.load(tmp_path / "key" / "below")


@pytest.mark.skipif(os.name != "posix", reason="FIFOs and devices of POSIX")
def test_keys_that_are_no_files_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "folder").mkdir(0o700)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    for path in (tmp_path / "fifo", tmp_path / "folder", tmp_path / "loop", tmp_path / "gone", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(VesselError, match="no key for study codes") as caught:
            StudyCodes.load(path, outside=tmp_path / "out")
        assert "chmod" not in str(caught.value)


def test_a_key_file_of_any_size_is_read_no_further_than_a_key(tmp_path: Path) -> None:
    with (tmp_path / "key").open("wb") as file:
        file.truncate(2**40)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(VesselError, match="not a key that vessel-rt made"):
        StudyCodes.load(tmp_path / "key")


def test_names_are_found_where_they_are_words_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "_known", {})
    remember("in/ward7/S0042.jpg", "c0de")
    remember("S0042_late.jpg", "1ate")
    text = f"open('in/ward7/S0042.jpg') {os.path.abspath('in/ward7/S0042.jpg')} S0042_3.png S0042_late.jpg XS0042 S00421"
    assert conceal(text) == "open('c0de') c0de c0de_3.png 1ate XS0042 S00421"

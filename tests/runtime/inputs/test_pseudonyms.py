from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vessel_rt.errors import VesselError
from vessel_rt.inputs import pseudonyms
from vessel_rt.inputs.pseudonyms import StudyCodes, conceal, remember


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
    assert len(one.code("S0042")) == pseudonyms.CODE_DIGITS
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
    with pytest.raises(VesselError, match="must not lie in the output folder"):
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
    monkeypatch.setattr(pseudonyms, "_known", {})
    remember("in/ward7/S0042.jpg", "c0de")
    remember("S0042_late.jpg", "1ate")
    text = f"open('in/ward7/S0042.jpg') {os.path.abspath('in/ward7/S0042.jpg')} S0042_3.png S0042_late.jpg XS0042 S00421"
    assert conceal(text) == "open('c0de') c0de c0de_3.png 1ate XS0042 S00421"


@pytest.mark.parametrize(
    ("path", "text", "shown"),
    [
        # Short stems: with their suffix or in a path, and nowhere else.
        ("1.png", "line 1, frame 1 of 78: '1.png'", "line 1, frame 1 of 78: '#'"),
        ("in/86.png", "line 86 in 'in/86.png': 86.png: 1.86 s", "line 86 in '#': #: 1.86 s"),
        (
            "86.png",
            "out/masks/86.png out/overlays/86.jpg masks/86_1.png 86_frame_000010.tif",
            "out/masks/# out/overlays/#.jpg masks/#_1.png #_frame_000010.tif",
        ),
        ("1.png", "a-1.png 11.png 0.1.png 1.pngs model_1.png 1_1.npy", "a-1.png 11.png 0.1.png 1.pngs model_1.png 1_1.npy"),
        ("1.png", "PosixPath('1.png'), b'1.png', (1.png) \"1.png\" <1.png>: 1.png.", "PosixPath('#'), b'#', (#) \"#\" <#>: #."),
        ("12345.dcm", "took 12345 ms of 12345.dcm", "took 12345 ms of #"),
        ("a.jpg", "a b a.jpg 'a'", "a b # 'a'"),
        ("1/2", "image 1/2", "image 1/2"),
        ("1", "1 of 1", "1 of 1"),
        # Words that a traceback has anyway.
        ("image.png", "cannot identify image file 'image.png' in read_image", "cannot identify image file '#' in read_image"),
        ("frames", 'File "/lib/vessel_rt/inputs/frames.py", line 3', 'File "/lib/vessel_rt/inputs/frames.py", line 3'),
        # Distinct stems: bare, too, and in names that are made of them.
        ("S0042.png", "KeyError: 'S0042' S0042_1.png, xS0042", "KeyError: '#' #_1.png, xS0042"),
        ("471100.png", "no 471100 here", "no # here"),
        ("quokka.jpg", "quokka: [quokka] quokka.jpg /a/quokka/b", "#: [#] # /a/#/b"),
        ("worker.png", 'File "vessel_rt/run/worker.py" worker', 'File "vessel_rt/run/worker.py" #'),
        ("\u738b\u660e.png", "\u738b\u660e: bare", "#: bare"),
        ("a{0}b c+d(1).png", "'a{0}b c+d(1).png' a{0}b c+d(1)", "'#' #"),
        # As Python writes names.
        ('it\'s "S0042".png', repr('it\'s "S0042".png'), "'#'"),
        ("caf\u00e9s.png", "caf\\xe9s.png 'caf\u00e9s' b'caf\\xc3\\xa9s.png'", "# '#' b'#'"),
        ("back\\slash.jpg", repr("back\\slash.jpg"), "'#'"),
        # What has no letter is no name.
        ("*", "a * b", "a * b"),
        ("..", "a .. b", "a .. b"),
    ],
)
def test_what_is_concealed(path: str, text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pseudonyms, "_known", {})
    remember(path, "#")
    assert conceal(text) == shown


def test_names_that_are_no_utf8_are_concealed_as_bytes_and_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pseudonyms, "_known", {})
    for name in (b"ward-\xe9l\xe8ve.png", "lone\ud800.png".encode("utf-8", "surrogatepass")):
        remember(os.fsdecode(name), "#")
        assert conceal(f"{os.fsdecode(name)!r} {name!r} {os.fsdecode(name)}") == "'#' b'#' #"
    remember("lone\ud800.png", "#")  # from JSON
    assert conceal("lone\ud800.png") == "#"


def test_what_was_put_in_place_of_a_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pseudonyms, "_known", {})
    remember("S0042.png", "0123-S0043.png")
    remember("S0043.png", "another")
    assert conceal("S0042.png S0043.png") == "0123-S0043.png another"

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.frames import CODES, make_frame
from vessel_rt.errors import ImageError, VesselError
from vessel_rt.inputs.frames import Frame, Naming, Selection, find_frames, input_sha256, read_frame
from vessel_rt.inputs.input_files import told_kinds
from vessel_rt.inputs.pseudonyms import conceal


def found(inputs: list[str], **selection: int) -> list[Frame]:
    return find_frames(inputs, Naming(CODES), Selection(**selection))[0]  # type: ignore[arg-type]


def names(frames: list[Frame]) -> list[str]:
    return [frame.path.name for frame in frames]


def test_a_folder_is_sorted_and_not_descended(frames: Path) -> None:
    (frames / "deeper").mkdir()
    for name in ("notes.txt", ".hidden.png", "deeper/d.png", "Z.TIFF"):
        (frames / name).write_bytes(b"")
    assert names(found([str(frames)])) == ["Z.TIFF", "a.jpg", "b.png", "c.tif"]
    assert names(found([str(frames)], num_images=2)) == ["Z.TIFF", "a.jpg"]


def test_files_and_globs_are_joined_and_each_is_taken_once(frames: Path) -> None:
    (frames / "plain").write_bytes(b"")
    inputs = [str(frames / "c.tif"), str(frames / "plain"), str(frames / "*"), str(frames), str(frames / ".." / "frames" / "a.jpg")]
    assert names(found(inputs)) == ["c.tif", "plain", "a.jpg", "b.png"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(frames: Path) -> None:
    shutil.copy(frames / "b.png", frames / "x[1].png")
    assert names(found([str(frames / "x[1].png")])) == ["x[1].png"]


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(VesselError, match="this folder holds no image"):
        found([str(tmp_path / "empty")])
    with pytest.raises(VesselError, match="this pattern holds no image"):
        found([str(tmp_path / "*.png")])
    with pytest.raises(VesselError, match="no such file or folder"):
        found([str(tmp_path / "none.png")])


def test_what_a_frame_is_called(frames: Path) -> None:
    code = CODES.code("b")
    frame = found([str(frames)])[1]
    assert (frame.index, frame.name, frame.image, frame.code) == (1, "b", "b.png", code)
    assert frame.shown == f"frame 2 of 3 ({code})"
    frame = find_frames([str(frames)], Naming(CODES, pseudonymize=True))[0][1]
    assert (frame.name, frame.image, frame.code) == (code, code, code)
    frame = find_frames([str(frames)], Naming(CODES, show_names=True))[0][1]
    assert (frame.name, frame.shown) == ("b", str(frames / "b.png"))


def test_errors_name_no_file_unless_they_may(tmp_path: Path) -> None:
    with pytest.raises(VesselError, match=r"^input 1 of 1: no such file or folder: part \d+ of \d+ of its path"):
        found([str(tmp_path / "none.png")])
    with pytest.raises(VesselError, match=r"none\.png: no such file"):
        find_frames([str(tmp_path / "none.png")], Naming(CODES, show_names=True))


def test_a_mistyped_path_is_told_by_its_missing_part(frames: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(frames.parent)
    for text, says in (
        ("frames/none.png", "part 2 of 2 of its path does not exist"),
        ("Quokka/frames/a.jpg", "part 1 of 3 of its path does not exist"),
        ("frames/a.jpg/b.png", "part 3 of 3 of its path does not exist"),
        ("fraems", "it is not in the current folder"),
    ):
        with pytest.raises(VesselError, match=rf"^input 2 of 2: no such file or folder: {says}; --show-names") as caught:
            found(["frames", text])
        assert text not in str(caught.value)


@pytest.mark.parametrize("other", ["a.png", "elsewhere/a.jpg", "A.jpg"])
def test_two_images_of_one_stem_stop_the_run_before_it_begins(tmp_path: Path, other: str) -> None:
    for name in ("a.jpg", other):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        make_frame().save(tmp_path / "in" / name)
    if len({path.resolve() for path in (tmp_path / "in").rglob("[aA].*")}) < 2:
        pytest.skip("this file system does not tell a from A")
    inputs = [str(tmp_path / "in" / "a.jpg"), str(tmp_path / "in" / other)]
    with pytest.raises(VesselError, match=rf"^input 1 of 2 and input 2 of 2: .*{CODES.code('a') if other[0] == 'a' else ''}.*-o$"):
        found(inputs)
    with pytest.raises(VesselError) as caught:
        find_frames(inputs, Naming(CODES, show_names=True))
    assert all(path in str(caught.value) for path in inputs)


def test_two_files_of_one_stem_in_a_folder_are_told_by_place(frames: Path) -> None:
    shutil.copy(frames / "b.png", frames / "B.bmp")
    with pytest.raises(VesselError, match=r"^input 1 of 1, file 1 of 4 and input 1 of 1, file 3 of 4: two files of the same name"):
        found([str(frames)])


def test_two_files_of_one_study_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vessel_rt.inputs.pseudonyms.CODE_DIGITS", 1)  # 16 codes
    for number in range(17):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(VesselError, match=r"^input 1 of 1, file \d+ of 17 and input 1 of 1, file \d+ of 17: two files of one study code"):
        found([str(tmp_path)])


@pytest.fixture
def nested(frames: Path) -> Path:
    """Files of one name in several folders."""
    for folder in ("one", "two/deep", ".hidden", "out/masks"):
        (frames / folder).mkdir(parents=True)
        shutil.copy(frames / "b.png", frames / folder / "b.png")
    (frames / "two" / "loop").symlink_to(frames)
    (frames / "two" / "notes.txt").write_text("")
    return frames


def test_subfolders_are_searched_on_request(nested: Path) -> None:
    assert names(found([str(nested)])) == ["a.jpg", "b.png", "c.tif"]
    assert find_frames([str(nested)], Naming(CODES)).skipped == {"input 1 of 1": {"subfolder": 3}}
    taken = find_frames([str(nested)], Naming(CODES), Selection(recursive=True), output=nested / "out")
    assert [frame.image for frame in taken.frames] == ["a.jpg", "b.png", "c.tif", "one/b.png", "two/deep/b.png"]
    assert taken.names == ["a", "b", "c", "one__b", "two__deep__b"]
    assert [frame.code for frame in taken.frames] == [CODES.code(name) for name in taken.names]
    assert taken.skipped == {"input 1 of 1": {".txt": 1, "subfolder": 2}}, "the output folder, and a link that leads round in a circle"
    coded = find_frames([str(nested)], Naming(CODES, pseudonymize=True), Selection(recursive=True), output=nested)
    assert coded.names == [CODES.code(name) for name in ("a", "b", "c")], "nothing in the output folder itself is searched"


def test_names_that_folders_make_alike_are_refused(nested: Path) -> None:
    shutil.copy(nested / "b.png", nested / "one__b.png")
    with pytest.raises(VesselError, match=r"^input 1 of 1, file \d of \d and input 1 of 1, file \d of \d: two files of the same name"):
        find_frames([str(nested)], Naming(CODES), Selection(recursive=True))


def test_folders_are_concealed_like_files(nested: Path) -> None:
    (nested / "one").rename(nested / "Quokka")
    find_frames([str(nested)], Naming(CODES), Selection(recursive=True))
    text = f"{nested}/Quokka/b.png, Quokka/b.png, Quokka__b: in Quokka"
    assert "Quokka" not in conceal(text)


def test_a_folder_with_subfolders_alone_points_to_the_option(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(VesselError, match=r"1 subfolder; --recursive"):
        found([str(tmp_path)])


def test_shards_take_whole_files_in_turn_and_keep_their_places(frames: Path) -> None:
    for number in range(4):
        shutil.copy(frames / "b.png", frames / f"d{number}.png")
    shards = [found([str(frames)], shards=3, shard=shard) for shard in range(3)]
    assert [names(shard) for shard in shards] == [["a.jpg", "d0.png", "d3.png"], ["b.png", "d1.png"], ["c.tif", "d2.png"]]
    assert sorted(frame.index for shard in shards for frame in shard) == list(range(7))
    assert find_frames([str(frames)], Naming(CODES), Selection(shards=3))[1] == ["a", "b", "c", "d0", "d1", "d2", "d3"]


def make_pages(path: Path, count: int = 5) -> Path:
    pages = [Image.fromarray(np.full((4, 6), 10 * page, np.uint8)) for page in range(count)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def test_pages_are_frames_only_when_frames_are_asked_for(tmp_path: Path) -> None:
    make_pages(tmp_path / "a.tif")
    shutil.copy(tmp_path / "a.tif", tmp_path / "b.jpg")  # what a file is called does not matter
    make_pages(tmp_path / "c.tif", 1)
    (whole, *_) = find_frames([str(tmp_path / "a.tif")], Naming(CODES)).frames
    assert (whole.name, whole.number) == ("a", None)
    with pytest.raises(ImageError, match=r"5 pages.*--frames"):
        read_frame(whole)
    chosen = find_frames([str(tmp_path)], Naming(CODES), Selection(slice(1, None, 3))).frames
    assert [(frame.name, frame.number) for frame in chosen] == [
        ("a_frame_000001", 1),
        ("a_frame_000004", 4),
        ("b_frame_000001", 1),
        ("b_frame_000004", 4),
        ("c", None),
    ]
    assert [read_frame(frame).getpixel((0, 0)) for frame in chosen] == [(level,) * 3 for level in (10, 40, 10, 40, 0)]


def test_what_is_not_taken_is_counted_by_kind(frames: Path) -> None:
    (frames / "deeper").mkdir()
    (frames / "deeper.dcm").mkdir()
    for name in ("notes.txt", "more.TXT", ".hidden", "moving.gif", "plain", "XA.1.2.3", "DICOMDIR", "Quokka.4711", "x.quokka"):
        (frames / name).write_bytes(b"text")
    os.mkfifo(frames / "pipe")
    (frames / "gone.txt").symlink_to("nowhere")
    found = find_frames([str(frames / "a.jpg"), str(frames)], Naming(CODES))
    assert [frame.path.name for frame in found.frames] == ["a.jpg", "b.png", "c.tif"]
    assert found.skipped == {
        "input 2 of 2": {".gif": 1, ".txt": 3, "other": 1, "special file": 1, "subfolder": 2, "without a suffix": 4},
    }
    assert told_kinds({".gif": 1, ".txt": 3, "subfolder": 2}) == "1 .gif, 3 .txt, 2 subfolders"
    shown = find_frames([str(frames)], Naming(CODES, show_names=True)).skipped["input 1 of 1"]
    assert shown[".quokka"] == 1
    assert find_frames([str(frames / "*.[jt]*")], Naming(CODES)).skipped == {"input 1 of 1": {".txt": 2}}
    assert find_frames([str(frames / "**")], Naming(CODES)).skipped["input 1 of 1"].get("subfolder") is None


def test_a_folder_without_an_image_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(VesselError, match=r"this folder holds no image \(.*\), but 2 \.txt"):
        found([str(tmp_path)])


def test_what_is_called_as_an_image_and_cannot_be_read_is_a_frame(frames: Path) -> None:
    for name in ("d.png", "e", "f.dcm"):
        (frames / name).symlink_to("nowhere")
    (frames / "g").symlink_to("g")
    os.mkfifo(frames / "h.jpg")
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(str(frames / "i.bmp"))
        (frames / "j.dcm").symlink_to("/dev/zero")
        taken = found([str(frames)])
        assert names(taken) == ["a.jpg", "b.png", "c.tif", "d.png", "e", "f.dcm", "g", "h.jpg", "i.bmp", "j.dcm"]
        for frame in taken[3:]:
            for read in (lambda frame=frame: input_sha256(frame.path), lambda frame=frame: read_frame(frame)):
                with pytest.raises(ImageError, match=r"no such file|not a regular file|symbolic links"):
                    read()
    assert find_frames([str(frames)], Naming(CODES), Selection(slice(None))).names == [frame.name for frame in taken]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that root cannot read")
def test_a_file_without_a_suffix_that_cannot_be_read_is_a_frame(frames: Path) -> None:
    (frames / "d").symlink_to("/proc/self/mem")  # regular, and its first byte is an error
    assert names(found([str(frames)])) == ["a.jpg", "b.png", "c.tif", "d"]
    with pytest.raises(ImageError, match="cannot be read"):
        input_sha256(frames / "d")


def test_an_input_that_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone[1].png").symlink_to("nowhere")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(VesselError, match=r"^input 1 of 1: not a regular file$"):
            found([str(path)])
    with pytest.raises(VesselError, match=r"^input 1 of 1: no such file or folder: .* is a link to what is not there"):
        found([str(tmp_path / "gone[1].png")])


def test_characters_that_a_terminal_obeys_are_escaped(tmp_path: Path) -> None:
    name = "a\x1b]0;title\x07\r\n\u202e\x9b.png"
    (tmp_path / name).write_bytes(b"")
    (frame,) = find_frames([str(tmp_path)], Naming(CODES, show_names=True)).frames
    assert frame.shown == str(tmp_path / r"a\x1b]0;title\x07\r\n\u202e\x9b.png")
    with pytest.raises(VesselError) as caught:
        find_frames([str(tmp_path / "none\x1b.png")], Naming(CODES, show_names=True))
    assert "\x1b" not in str(caught.value)

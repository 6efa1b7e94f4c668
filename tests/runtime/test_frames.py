from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runtime.conftest import CODES, make_frame
from vessel_rt.errors import VesselError
from vessel_rt.frames import Frame, Naming, Selection, find_frames


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
        with pytest.raises(VesselError, match=rf"^input 2 of 2: no such file or folder: {says}") as caught:
            found(["frames", text])
        assert text not in str(caught.value)


@pytest.mark.parametrize("other", ["a.png", "elsewhere/a.jpg", "A.jpg"])
def test_two_images_of_one_stem_stop_the_run_before_it_begins(tmp_path: Path, other: str) -> None:
    for name in ("a.jpg", other):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        make_frame().save(tmp_path / "in" / name)
    if len({path.resolve() for path in (tmp_path / "in").rglob("[aA].*")}) < 2:
        pytest.skip("this file system does not tell a from A")
    with pytest.raises(VesselError, match=r"frame 2 of 2 \(.*\): its results would overwrite those of frame 1 of 2"):
        found([str(tmp_path / "in" / "a.jpg"), str(tmp_path / "in" / other)])


def test_parts_are_dealt_out_and_keep_their_places(frames: Path) -> None:
    for number in range(4):
        shutil.copy(frames / "b.png", frames / f"d{number}.png")
    parts = [found([str(frames)], parts=3, part=part) for part in range(3)]
    assert [names(part) for part in parts] == [["a.jpg", "d0.png", "d3.png"], ["b.png", "d1.png"], ["c.tif", "d2.png"]]
    assert sorted(frame.index for part in parts for frame in part) == list(range(7))
    assert find_frames([str(frames)], Naming(CODES), Selection(parts=3))[1] == ["a", "b", "c", "d0", "d1", "d2", "d3"]

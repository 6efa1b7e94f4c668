"""Series: which files are the frames of one cine, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.support.frames import CODES
from vessel_rt.errors import VesselError
from vessel_rt.inputs.frames import Found, Naming, Selection, find_frames
from vessel_rt.inputs.input_files import InputFile, flat_stem
from vessel_rt.inputs.pseudonyms import conceal
from vessel_rt.inputs.series import Series, find_series


def series_of(*names: str) -> list[Series]:
    paths = [Path("in") / name for name in names]
    files = [InputFile(path, flat_stem(path.relative_to("in")), path.name, path.name) for path in paths]
    return find_series(files, lambda file: file.place)


def members(series: list[Series]) -> list[tuple[str, list[int]]]:
    return [(one.name, list(one.files)) for one in series]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["img_0001.png", "img_0002.png"], [("img", [1, 2])]),
        (["a_10.png", "a_9.png", "a_100.png"], [("a", [9, 10, 100])]),
        (["X_07_frame_000086.jpg", "X_07_frame_000087.jpg", "X_08_frame_000001.jpg"], [("X_07_frame", [86, 87])]),
        (["1_raw.png", "2_raw.png"], [("raw", [1, 2])]),
        (["f3-a.png", "f4-a.png"], [("f-a", [3, 4])]),
        (["0001.png", "0002.png"], [("in", [1, 2])]),
        (["deep/0001.png", "deep/0002.png", "other/0003.png"], [("deep", [1, 2])]),
        (["IM0001", "IM0002"], [("IM", [1, 2])]),
        (["1.2.840.7", "1.2.840.9"], [("1.2.840", [7, 9])]),
        (["a_1.png", "b_2.png", "c.png", "a_1.jpg"], []),
        (["a_1.PNG", "a_2.png"], [("a", [1, 2])]),
        (["x20240101123000.png", "x20240101123001.png"], []),
        (["٣.png", "٤.png"], []),
    ],
)  # fmt: skip
def test_the_rule_on_names(names: list[str], expected: list[tuple[str, list[int]]]) -> None:
    assert members(series_of(*names)) == expected


def test_missing_numbers_are_counted() -> None:
    [one] = series_of("a_3.png", "a_7.png", "a_4.png")
    assert one.missing == 2


def test_one_number_twice_and_one_name_twice_are_refused() -> None:
    with pytest.raises(VesselError, match=r"a_1\.png and a_01\.png: frame 1"):
        series_of("a_1.png", "a_01.png")
    with pytest.raises(VesselError, match=r"a_1\.png and a-1\.png: two series of the same name"):
        series_of("a_1.png", "a_2.png", "a-1.png", "a-2.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two series, of which one has a gap, and two other images."""
    for name in ("b_2.png", "b_10.png", "a_1.png", "a_2.png", "a_3.png", "b_11.png", "plain.png", "c_7.png"):
        Image.new("L", (30, 20)).save(tmp_path / name)
    return tmp_path


def found(folder: Path, naming: Naming | None = None, **selection: int) -> Found:
    return find_frames([str(folder)], naming or Naming(CODES), Selection(slice(None), series=True, **selection))  # type: ignore[arg-type]


def test_frames_of_series_follow_one_another(folder: Path) -> None:
    frames = found(folder).frames
    assert [frame.name for frame in frames] == ["a_1", "a_2", "a_3", "b_2", "b_10", "b_11", "c_7", "plain"]
    assert [frame.index for frame in frames] == list(range(8))
    assert [(frame.series.name, frame.series.number) for frame in frames if frame.series] == [
        ("a", 1), ("a", 2), ("a", 3), ("b", 2), ("b", 10), ("b", 11),
    ]  # fmt: skip
    assert all(frame.number is None for frame in frames)
    assert len({frame.cine for frame in frames}) == 4


def test_what_is_told(folder: Path) -> None:
    code = CODES.code
    assert found(folder).told == (
        f"series: 2 cines from 6 files; gaps in the numbers: 1 ({code('b')} lacks 7); single images: 2 ({code('c_7')}, {code('plain')})"
    )
    assert "(b lacks 7)" in found(folder, Naming(CODES, show_names=True)).told
    assert find_frames([str(folder)], Naming(CODES)).told == ""


def test_names_are_hidden(folder: Path) -> None:
    for name in ("Quokka_1.png", "Quokka_2.png"):
        Image.new("L", (30, 20)).save(folder / name)
    naming = Naming(CODES, pseudonymize=True)
    one = next(frame.series for frame in found(folder, naming).frames if frame.series)
    assert one.name == one.code == CODES.code("Quokka")
    assert "Quokka" not in conceal("Quokka.tif")


def test_a_series_is_not_split_between_shards(folder: Path) -> None:
    shards = [found(folder, shards=2, shard=shard).frames for shard in range(2)]
    assert [[frame.name for frame in frames] for frames in shards] == [["a_1", "a_2", "a_3", "c_7"], ["b_2", "b_10", "b_11", "plain"]]


def test_frames_of_several_sizes_are_refused(folder: Path) -> None:
    Image.new("L", (40, 20)).save(folder / "b_3.png")
    with pytest.raises(VesselError, match=rf"series {CODES.code('b')}: .*file 6 .*30x20 pixels, .*file 7 .*40x20"):
        found(folder)
    (folder / "b_3.png").write_bytes(b"damaged")  # fails when it is read
    assert len(found(folder).frames) == 9


def test_multi_frame_files_are_cines_of_their_own(folder: Path) -> None:
    pages = [Image.new("L", (30, 20))] * 2
    for name in ("c_8.tif", "c_9.tif"):
        pages[0].save(folder / name, save_all=True, append_images=pages[1:])
    frames = found(folder).frames
    assert [(frame.path.name, frame.number) for frame in frames if frame.number is not None] == [
        ("c_8.tif", 0), ("c_8.tif", 1), ("c_9.tif", 0), ("c_9.tif", 1),
    ]  # fmt: skip
    pages[0].save(folder / "b.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(VesselError, match="two cines of the same name"):
        found(folder)

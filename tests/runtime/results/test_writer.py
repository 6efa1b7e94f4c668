from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from tests.support.frames import make_frame, placed, preview
from tests.support.journals import box_mask, files, result_with
from vessel_rt.errors import VesselError
from vessel_rt.inputs.frames import Frame
from vessel_rt.io.files import replacing, writing
from vessel_rt.model.segmenter import Mask
from vessel_rt.results.writer import Entry, FrameWriter, draw_overlay, failure, mask_record


def write(folder: Path, frames: list[Frame], count: int = 1) -> list[Entry]:
    for kind in ("masks", "overlays", "previews"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    writer = FrameWriter(folder, [frame.name for frame in frames], "s")
    return [writer.write(frame, "0", make_frame(), [result_with(*[box_mask(3, 5, 20, 30)] * count)]) for frame in frames]


def test_what_is_written_of_a_frame(tmp_path: Path) -> None:
    first, second = box_mask(3, 5, 20, 30), box_mask(0, 0, 0, 0)
    frame, failed = placed("in/a.jpg", "in/b.jpg")
    write(tmp_path, [])
    entry = FrameWriter(tmp_path, ["a", "b"], "s").write(frame, "1" * 64, make_frame(), [result_with(first, second)])
    assert files(tmp_path) == {"masks/a.png", "masks/a_1.png", "overlays/a.jpg", preview("a")} == set(entry.lines[0]["files"])
    ([a], [b]) = entry.lines, failure(failed, ["Where?"], "an empty file", "s").lines
    assert list(a) == list(b)
    assert [(key, a[key]) for key in list(a)[:12]] == [
        ("schema", 1),
        ("index", 0),
        ("image", "a.jpg"),
        ("frame", None),
        ("name", "a"),
        ("code", frame.code),
        ("question", "Where?"),
        ("status", "ok"),
        ("error", None),
        ("width", 96),
        ("height", 64),
        ("answer", "It is [SEG]."),
    ]
    assert (a["input"], a["settings"]) == ("1" * 64, "s")
    assert (b["index"], b["status"], b["error"], b["answer"], b["masks"], b["files"]) == (1, "error", "an empty file", None, [], {})
    assert entry.timings == [
        {
            "schema": 1,
            "index": 0,
            "code": frame.code,
            "question": "Where?",
            "drafted": 6,
            "accepted": 5,
            "decode_steps": 7,
            "batch": 1,
            "ms": {"read": 1.235},
        }
    ]
    for record, mask in zip(a["masks"], (first, second), strict=True):
        written = Image.open(tmp_path / record["file"])
        assert (written.mode, written.size) == ("L", (96, 64))
        np.testing.assert_array_equal(np.asarray(written), mask * np.uint8(255))
        np.testing.assert_array_equal(coco.decode(record["rle"]).astype(bool), mask)
        assert record["area"] == mask.sum()
        assert (record["iou"], record["object_score"]) == (0.5, 2.25)
    assert [record["box"] for record in a["masks"]] == [[3, 5, 20, 30], None]
    assert Image.open(tmp_path / "overlays" / "a.jpg").size == (96, 64)


def test_scores_have_as_many_digits_as_are_meaningful() -> None:
    record = mask_record(Mask(box_mask(3, 5, 20, 30), 0.91264449, 12.34567), None)
    assert (record["iou"], record["object_score"]) == (0.913, 12.35)


def test_a_preview_is_the_frame_in_small(tmp_path: Path) -> None:
    write(tmp_path, [])
    large = make_frame(1000, 400)
    mask = np.zeros((400, 1000), np.bool_)
    FrameWriter(tmp_path, ["a"], "s").write(placed("a.png")[0], "0", large, [result_with(mask)])
    with Image.open(tmp_path / preview("a")) as small:
        assert small.size == (512, 205)


def test_two_questions_number_their_masks_on(tmp_path: Path) -> None:
    write(tmp_path, [])
    results = [result_with(box_mask(0, 0, 9, 9)), result_with(box_mask(0, 0, 5, 5))]
    entry = FrameWriter(tmp_path, ["a"], "s").write(placed("a.png")[0], "0", make_frame(), results)
    assert [[mask["file"] for mask in line["masks"]] for line in entry.lines] == [["masks/a.png"], ["masks/a_1.png"]]
    assert [sorted(line["files"]) for line in entry.lines] == [
        ["masks/a.png", "overlays/a.jpg", preview("a")],
        ["masks/a_1.png", "overlays/a.jpg", preview("a")],
    ]


def test_a_second_mask_does_not_take_another_images_name(tmp_path: Path) -> None:
    entries = write(tmp_path, placed("a.png", "A_1.png"), count=3)
    assert [[mask["file"] for mask in entry.lines[0]["masks"]] for entry in entries] == [
        ["masks/a.png", "masks/a_2.png", "masks/a_3.png"],
        ["masks/A_1.png", "masks/A_1_1.png", "masks/A_1_2.png"],
    ]


def test_a_frame_that_is_cut_short_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vessel_rt.results.writer._preview", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, placed("a.png"), count=2)
    assert files(tmp_path) == set()


def test_nothing_but_pixels_reaches_a_picture(tmp_path: Path) -> None:
    """Pillow writes the comment of a JPEG into the JPEG that is made of it; read_image takes it off."""
    from vessel_rt.inputs.images import read_image

    exif = Image.Exif()
    exif[0x013B] = "Study 0042 artist"
    make_frame().save(tmp_path / "a.jpg", exif=exif, comment=b"Study 0042 comment")
    write(tmp_path, [])
    FrameWriter(tmp_path, ["a"], "s").write(placed("a.jpg")[0], "0", read_image(tmp_path / "a.jpg"), [result_with(box_mask(0, 0, 9, 9))])
    written = [path for path in tmp_path.rglob("*/*") if path.is_file()]
    assert len(written) == 3
    assert not [path for path in written if b"0042" in path.read_bytes()]


def test_replacing_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["f"]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(VesselError, match=r"the mask: cannot be written \(No such file"),
        writing("the mask"),
        replacing(tmp_path / "no" / "f") as f,
    ):
        f.write_text("")


def test_overlay_colours_each_mask_and_leaves_the_rest() -> None:
    image = Image.new("RGB", (96, 64), (100, 100, 100))
    overlay = np.asarray(draw_overlay(image, [box_mask(10, 10, 20, 20), box_mask(50, 10, 60, 20)]))
    inside, other, outside = overlay[15, 15], overlay[15, 55], overlay[40, 40]
    assert outside.tolist() == [100, 100, 100]
    assert len({tuple(inside), tuple(other), tuple(outside)}) == 3
    assert overlay[10, 10].tolist() != inside.tolist()  # outlined
    np.testing.assert_array_equal(np.asarray(draw_overlay(image, [])), np.asarray(image))


def test_names_and_questions_that_text_files_stumble_over(tmp_path: Path) -> None:
    strange = dataclasses.replace(result_with(box_mask(0, 0, 9, 9)), question="a\u2028b\u0085c")
    [frame] = placed(os.fsdecode(b"caf\xe9.png"))  # not UTF-8
    write(tmp_path, [])
    entry = FrameWriter(tmp_path, [frame.name], "s").write(frame, "0", make_frame(), [strange])
    assert json.loads(json.dumps(entry.lines[0]))["image"] == frame.image

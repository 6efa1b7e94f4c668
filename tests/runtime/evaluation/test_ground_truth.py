from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.frames import CODES
from tests.support.image_files import png
from vessel_rt.errors import VesselError
from vessel_rt.evaluation.annotations import rasterized
from vessel_rt.evaluation.ground_truth import concepts_in, read_truth

SQUARE = [0, 0, 10, 0, 10, 10, 0, 10]


def line(name: str, **more: Any) -> dict[str, Any]:
    return {"index": 0, "code": "c0de", "name": name, "frame": None, "width": 60, "height": 40, **more}


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_concepts_are_found_in_the_questions_order() -> None:
    assert concepts_in("Please segment Catheter and vessel.", {"vessel", "catheter", "stent"}) == ["catheter", "vessel"]
    assert concepts_in("Please segment main vessel.", {"vessel", "main vessel"}) == ["main vessel"]
    assert concepts_in("Where?", {"vessel"}) == concepts_in("Where?", set()) == []


def test_polygons_of_one_concept_and_items_of_one_image_are_joined(tmp_path: Path) -> None:
    far = [40, 20, 50, 20, 50, 30, 40, 30]
    items = [{"image": "a.jpg", "mask": [[SQUARE]], "text": ["Vessel."]}, {"image": "a.jpg", "mask": [[far]], "text": ["vessel"]}]
    mask = read_truth(written(tmp_path / "a.json", items)).mask(line("a"), "vessel")
    assert mask is not None
    assert mask.sum() == 200
    np.testing.assert_array_equal(mask, rasterized([SQUARE, far], 40, 60))


def test_frames_are_found_by_stem_and_by_study_code(tmp_path: Path) -> None:
    items = [{"image": name, "mask": [[SQUARE]], "text": ["vessel"]} for name in ("sub/a.jpg", "cine_frame_000010.png")]
    path = written(tmp_path / "a.json", items)
    plain, coded = read_truth(path), read_truth(path, CODES)
    for name in ("a", "cine_frame_000010"):
        assert plain.mask(line(name), "vessel") is not None
    for name in (CODES.code("a"), CODES.code("cine") + "_frame_000010", CODES.code("cine_frame_000010")):
        assert plain.mask(line(name), "vessel") is None
        assert coded.mask(line(name), "vessel") is not None
    assert coded.mask(line("b"), "vessel") is None
    assert coded.mask(line("a"), "catheter") is None


def test_a_folder_of_masks(tmp_path: Path) -> None:
    drawn = np.zeros((40, 60), np.uint8)
    drawn[:5] = 255
    Image.fromarray(drawn).save(tmp_path / "a_gt.png")
    Image.fromarray(drawn // 255).save(tmp_path / "b_mask.png")  # ones
    Image.fromarray(255 - drawn).save(tmp_path / "a.png")  # the frame itself
    truth = read_truth(tmp_path, CODES)
    assert truth.concepts("Where?") == [None]
    for name in ("a", "b", CODES.code("b")):
        np.testing.assert_array_equal(truth.mask(line(name), None), drawn > 0)
    assert truth.mask(line("c"), None) is None
    with pytest.raises(VesselError, match=r"frame 1 \(c0de\) is 60x40 pixels, the frame 61x40"):
        truth.mask(line("a", width=61), None)


def test_a_page_for_each_frame_of_a_cine(tmp_path: Path) -> None:
    pages = np.zeros((3, 40, 60), np.bool_)
    for number, page in enumerate(pages):
        page[: 5 * number] = True
    first, *others = map(Image.fromarray, pages)
    first.save(tmp_path / "a.tif", save_all=True, append_images=others, compression="group4")
    truth = read_truth(tmp_path, CODES)
    for number, page in enumerate(pages):
        for name in ("a", CODES.code("a")):
            found = truth.mask(line(f"{name}_frame_{number:06}", frame=number), None)
            np.testing.assert_array_equal(found, page)
    assert truth.mask(line("b_frame_000000", frame=0), None) is None
    with pytest.raises(VesselError, match=r"frame 1 \(c0de\).* 3 pages"):
        truth.mask(line("a_frame_000003", frame=3), None)


def test_folders_that_are_not_taken(tmp_path: Path) -> None:
    with pytest.raises(VesselError, match="no masks in this folder"):
        read_truth(tmp_path)
    for name in ("a_gt.png", "a_mask.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    with pytest.raises(VesselError, match="two masks for one stem"):
        read_truth(tmp_path)


@pytest.mark.parametrize(
    "item",
    [
        {"image": "a.png", "mask": [[SQUARE]], "text": []},
        {"mask": [], "text": []},
        {"image": 1, "mask": [], "text": []},
        {"image": "a.png", "mask": [], "text": []},
        {"image": "a.png", "mask": [[SQUARE[:7]]], "text": ["vessel"]},
        {"image": "a.png", "mask": [[SQUARE, []]], "text": ["vessel"]},
        {"image": "a.png", "mask": [[SQUARE]], "text": [" "]},
        3,
    ],
)
def test_faults_are_refused_with_the_item_and_the_mend(tmp_path: Path, item: Any) -> None:
    sound = {"image": "b.png", "mask": [[SQUARE]], "text": ["vessel"]}
    with pytest.raises(VesselError, match=r"a\.json: item 1\b.*, and 1 more faults.*vessel-rt check-data.*--fix"):
        read_truth(written(tmp_path / "a.json", [sound, item, item]))


def test_polygons_that_change_nothing_in_the_image_are_refused_too(tmp_path: Path) -> None:
    items = [{"image": "a.png", "mask": [[SQUARE], [[100, 0, 110, 0, 110, 9]]], "text": ["vessel", "vessel"]}]
    truth = read_truth(written(tmp_path / "a.json", items))
    with pytest.raises(VesselError, match=r"item 0, of frame 1 \(c0de\): outside the image .*vessel-rt check-data"):
        truth.mask(line("a"), "vessel")
    assert truth.mask(line("a", width=200), "vessel") is not None


def test_two_images_of_one_stem_are_not_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"image": name, "mask": [[SQUARE]], "text": ["vessel"]} for name in ("a.png", "a.jpg")]))
    with pytest.raises(VesselError, match=r"a\.json: item 1 .* stem"):
        read_truth(path)


def test_images_in_subfolders_are_found_by_folder_and_name(tmp_path: Path) -> None:
    images = ("one/a.png", "two/a.png", "two/b.png", "c.png", "two/c.png")
    path = written(tmp_path / "a.json", [{"image": name, "mask": [[SQUARE]], "text": ["vessel"]} for name in images])
    truth = read_truth(path, CODES)
    for name in ("one__a", "two__a", "two__b", "b", "two__c", CODES.code("one__a"), CODES.code("b")):
        assert truth.mask(line(name), "vessel") is not None, name
    for name in ("a", "c", CODES.code("a")):  # of either folder
        with pytest.raises(VesselError, match=r"a\.json: .*frame 1 \(c0de\).*--recursive"):
            truth.mask(line(name), "vessel")


def test_masks_of_any_depth(tmp_path: Path) -> None:
    drawn = np.zeros((40, 60), np.bool_)
    drawn[:5] = True
    for number, (dtype, brightest) in enumerate([(np.uint8, 1), (np.uint16, 1), (np.uint16, 65535), (np.uint16, 600), (np.int32, 70000)]):
        Image.fromarray((drawn * brightest).astype(dtype)).save(tmp_path / f"{number}.tif")
    Image.fromarray(drawn.astype(np.float32)).save(tmp_path / "5.tif")
    Image.fromarray(drawn).save(tmp_path / "6.png")
    truth = read_truth(tmp_path)
    for number in range(7):
        np.testing.assert_array_equal(truth.mask(line(str(number)), None), drawn)


def _page(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60), dtype=np.uint8))


def test_masks_that_cannot_be_read(tmp_path: Path) -> None:
    _page(0).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    (tmp_path / "text.png").write_text("This is not an image.")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere")
    _page(0).save(tmp_path / "pages.tif", save_all=True, append_images=[_page(1)])
    Image.new("1", (9000, 10)).save(tmp_path / "wide.png")
    Image.fromarray(np.full((40, 60), np.nan, np.float32)).save(tmp_path / "nan.tif")
    for name in ["half", "text", "empty", "folder", "gone", "pages", "wide", "nan", *_special_files(tmp_path)]:
        with pytest.raises(VesselError, match=r"the mask of frame 1 \(c0de\): ") as caught:
            read_truth(tmp_path).mask(line(name), None)
        assert f"{name}." not in str(caught.value)


def _special_files(folder: Path) -> list[str]:
    if os.name != "posix":
        return []
    os.mkfifo(folder / "queue.png")
    (folder / "nought.png").symlink_to("/dev/zero")
    return ["queue", "nought"]


@pytest.mark.parametrize("kind", ["uint16", "float", "uint32", "palette", "bits", "one gray", "16-bit colour"])
def test_drawn_masks_of_any_depth_are_read(tmp_path: Path, kind: str) -> None:
    drawn = np.zeros((40, 60), np.bool_)
    drawn[10:20, 15:30] = True
    if kind == "one gray":
        drawn[:] = True
    images = {
        "uint16": Image.fromarray(drawn * np.uint16(40_000)),
        "float": Image.fromarray(drawn.astype(np.float32)),
        "uint32": Image.fromarray(drawn * np.int32(2**31 - 1)),
        "palette": Image.fromarray(drawn.astype(np.uint8) * np.uint8(255)).convert("P"),
        "bits": Image.fromarray(drawn),
        "one gray": Image.fromarray(drawn * np.uint16(777)),
    }
    if kind == "16-bit colour":
        (tmp_path / "a_gt.png").write_bytes(png(np.repeat((drawn * np.uint16(60_000))[..., None], 3, axis=2)))
    else:
        images[kind].save(tmp_path / f"a_gt.{'tif' if kind in ('float', 'uint32') else 'png'}")
    np.testing.assert_array_equal(read_truth(tmp_path).mask(line("a"), None), drawn)


def test_a_drawn_mask_that_is_no_single_picture_is_named(tmp_path: Path) -> None:
    page = Image.new("L", (60, 40))
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page])
    with pytest.raises(VesselError, match=r"frame 1 \(c0de\): 2 pages"):
        read_truth(tmp_path).mask(line("a"), None)
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(VesselError, match="not a regular file"):
        read_truth(tmp_path).mask(line("b"), None)

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from tests.runtime.conftest import make_frame
from vessel_rt.errors import VesselError
from vessel_rt.outputs import OutputFolder, draw_overlay, replacing
from vessel_rt.segmenter import Mask, Result


def result_with(*masks: np.ndarray) -> Result:
    return Result("Where?", "It is [SEG].", (1, 2), 6, 5, 7, 1, {"read": 1.23456}, tuple(Mask(mask, 0.5, 2.25) for mask in masks))


def box_mask(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((64, 96), np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def lines(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, names: list[str], count: int = 1, overwrite: bool = False) -> None:
    with OutputFolder(folder, [Path(name) for name in names], overwrite) as outputs:
        for name in names:
            outputs.write_results(Path(name), make_frame(), [result_with(*[box_mask(3, 5, 20, 30)] * count)])


def test_what_is_written_of_an_image(tmp_path: Path) -> None:
    first, second = box_mask(3, 5, 20, 30), box_mask(0, 0, 0, 0)
    with OutputFolder(tmp_path / "out", [Path("in/a.jpg"), Path("in/b.jpg")]) as outputs:
        outputs.write_results(Path("in/a.jpg"), make_frame(), [result_with(first, second)])
        outputs.write_error(Path("in/b.jpg"), ["Where?"], "in/b.jpg: an empty file")
        outputs.write_run({"seconds": 1})
    out = tmp_path / "out"
    assert files(out) == {"masks/a.png", "masks/a_1.png", "overlays/a.jpg", "results.jsonl", "run.json"}
    a, b = lines(out)
    assert list(a) == list(b)
    assert (a["image"], a["question"], a["status"], a["error"], a["answer"]) == ("a.jpg", "Where?", "ok", None, "It is [SEG].")
    assert (a["drafted"], a["accepted"], a["decode_steps"], a["batch"]) == (6, 5, 7, 1)
    assert a["ms"] == {"read": 1.235}
    assert b == {
        "image": "b.jpg",
        "question": "Where?",
        "status": "error",
        "error": "in/b.jpg: an empty file",
        "answer": None,
        "drafted": None,
        "accepted": None,
        "decode_steps": None,
        "batch": None,
        "ms": {},
        "masks": [],
    }
    for record, mask in zip(a["masks"], (first, second), strict=True):
        written = Image.open(out / record["file"])
        assert (written.mode, written.size) == ("L", (96, 64))
        np.testing.assert_array_equal(np.asarray(written), mask * np.uint8(255))
        np.testing.assert_array_equal(coco.decode(record["rle"]).astype(bool), mask)
        assert record["area"] == mask.sum()
        assert (record["iou"], record["object_score"]) == (0.5, 2.25)
    assert [record["box"] for record in a["masks"]] == [[3, 5, 20, 30], None]
    assert Image.open(out / "overlays" / "a.jpg").size == (96, 64)


def test_two_images_of_one_stem_stop_the_run_before_it_begins(tmp_path: Path) -> None:
    for other in ("a.png", "elsewhere/a.jpg", "A.jpg"):
        with pytest.raises(VesselError, match=r"would overwrite those of in/a\.jpg"):
            OutputFolder(tmp_path / "out", [Path("in/a.jpg"), Path(other)])
    assert not (tmp_path / "out").exists()


def test_a_second_mask_does_not_take_another_images_name(tmp_path: Path) -> None:
    write(tmp_path / "out", ["a.png", "a_1.png"], count=3)
    assert [[mask["file"] for mask in line["masks"]] for line in lines(tmp_path / "out")] == [
        ["masks/a.png", "masks/a_2.png", "masks/a_3.png"],
        ["masks/a_1.png", "masks/a_1_1.png", "masks/a_1_2.png"],
    ]


def test_a_folder_that_is_not_empty_needs_overwrite(tmp_path: Path) -> None:
    write(tmp_path, ["a.png"])
    with pytest.raises(VesselError, match=r"not empty.*--overwrite"):
        OutputFolder(tmp_path, [Path("a.png")])
    file = tmp_path / "run.json"
    file.write_text("")
    with pytest.raises(VesselError, match="is a file"):
        OutputFolder(file, [Path("a.png")], overwrite=True)


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "b.png"], count=2)
    foreign = [tmp_path / "notes.txt", tmp_path / "masks" / "corrected.png", tmp_path / "masks" / "c_gt.png"]
    for path in foreign:
        path.write_text("mine")
    (tmp_path / "masks" / ".1-2.tmp").write_text("of a run that was killed")
    write(tmp_path, ["c.png"], overwrite=True)
    assert files(tmp_path) == {
        "masks/c.png",
        "overlays/c.jpg",
        "results.jsonl",
        "notes.txt",
        "masks/corrected.png",
        "masks/c_gt.png",
    }
    assert {path.read_text() for path in foreign} == {"mine"}


@pytest.mark.parametrize("name", ["masks/c.png", "masks/c_1.png", "overlays/c.jpg", "masks/C.png"])
def test_a_foreign_file_in_the_way_stops_the_run(tmp_path: Path, name: str) -> None:
    write(tmp_path, ["a.png"])
    (tmp_path / name).write_text("mine")
    with pytest.raises(VesselError, match="would be overwritten, and is not a result"):
        write(tmp_path, ["c.png"], overwrite=True)
    assert (tmp_path / name).read_text() == "mine"
    assert (tmp_path / "masks" / "a.png").exists()


def test_results_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("something else\n")
    with pytest.raises(VesselError, match="not written by vessel-rt"):
        OutputFolder(tmp_path, [Path("a.png")], overwrite=True)


def test_results_cannot_point_outside_their_folder(tmp_path: Path) -> None:
    victim = tmp_path / "victim.png"
    victim.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_text(
        json.dumps({"image": "../../victim.jpg", "masks": [{"file": "../victim.png"}, {"file": str(victim)}]})
    )
    write(out, ["c.png"], overwrite=True)
    assert victim.read_text() == "mine"


def test_an_input_is_never_removed(tmp_path: Path) -> None:
    write(tmp_path, ["a.png"])
    with pytest.raises(VesselError, match="both an input and a result"):
        OutputFolder(tmp_path, [tmp_path / "overlays" / "a.jpg"], overwrite=True)


def test_an_interrupted_run_keeps_whole_lines_and_has_no_run_json(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path, [Path("a.png"), Path("b.png")]) as outputs:  # noqa: PT012
        outputs.write_results(Path("a.png"), make_frame(), [result_with(box_mask(0, 0, 1, 1))])
        raise KeyboardInterrupt
    assert files(tmp_path) == {"masks/a.png", "overlays/a.jpg", "results.jsonl"}
    assert [line["image"] for line in lines(tmp_path)] == ["a.png"]


def test_an_image_that_is_cut_short_leaves_no_file_without_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vessel_rt.outputs.draw_overlay", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, ["a.png"], count=2)
    assert files(tmp_path) == {"results.jsonl"}


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
    with pytest.raises(VesselError, match="nowhere/f: cannot be written"), replacing(tmp_path / "nowhere" / "f") as temporary:
        temporary.write_text("")


def test_overlay_colours_each_mask_and_leaves_the_rest() -> None:
    image = Image.new("RGB", (96, 64), (100, 100, 100))
    overlay = np.asarray(draw_overlay(image, [box_mask(10, 10, 20, 20), box_mask(50, 10, 60, 20)]))
    inside, other, outside = overlay[15, 15], overlay[15, 55], overlay[40, 40]
    assert outside.tolist() == [100, 100, 100]
    assert len({tuple(inside), tuple(other), tuple(outside)}) == 3
    assert overlay[10, 10].tolist() != inside.tolist()  # outlined
    np.testing.assert_array_equal(np.asarray(draw_overlay(image, [])), np.asarray(image))


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """A file may grow by a few bytes only: the second image's line does not fit, and neither half of it nor its mask stays."""
    with pytest.raises(VesselError, match="cannot be written"), OutputFolder(tmp_path / "out", [Path("a.png"), Path("b.png")]) as outputs:  # noqa: PT012
        outputs.write_results(Path("a.png"), make_frame(), [result_with(box_mask(0, 0, 9, 9))])
        size = (tmp_path / "out" / "results.jsonl.partial").stat().st_size
        write = outputs._results.write

        def full(text: bytes) -> int:
            if outputs._results.tell() > size:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(text[:10])

        outputs._results = FullDisk(outputs._results, full)  # type: ignore[assignment]
        outputs.write_results(Path("b.png"), make_frame(), [result_with(box_mask(0, 0, 9, 9))])
    assert files(tmp_path / "out") == {"masks/a.png", "overlays/a.jpg", "results.jsonl"}
    assert [line["image"] for line in lines(tmp_path / "out")] == ["a.png"]
    write_again = OutputFolder(tmp_path / "out", [Path("a.png")], overwrite=True)
    with write_again:
        pass


class FullDisk:
    """A file whose writes are `write`."""

    def __init__(self, file: Any, write: Any) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_names_and_questions_that_text_files_stumble_over(tmp_path: Path) -> None:
    strange = dataclasses.replace(result_with(box_mask(0, 0, 9, 9)), question="a\u2028b\u0085c")
    name = Path(os.fsdecode(b"caf\xe9.png"))  # not UTF-8
    with OutputFolder(tmp_path, [name]) as outputs:
        outputs.write_results(name, make_frame(), [strange])
    assert json.loads((tmp_path / "results.jsonl").read_bytes())["question"] == strange.question
    OutputFolder(tmp_path, [name], overwrite=True)

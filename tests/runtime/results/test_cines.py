from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tests.support.dicom_files import ENHANCED_XA, ID, JPEG, NAME, REPORT, RLE, cut, item, jpeg, make_dicom
from tests.support.frames import CODES, make_frame, placed
from tests.support.standin import build_standin
from vessel_rt.cli import main
from vessel_rt.errors import VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.frames import Naming, Selection
from vessel_rt.model.result import Mask, Result
from vessel_rt.results.cines import write_cines
from vessel_rt.results.writer import FrameWriter, failure
from vessel_rt.run.infer import InferOptions, infer
from vessel_rt.run.summary import Summary
from vessel_rt.run.worker import WorkOptions

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # of files that are cut short


def make_cine(path: Path, frames: int = 3, **attributes: Any) -> Path:
    """Dark bars that sink from frame to frame; the stand-in finds them."""
    pictures = np.full((frames, 64, 96), 200, np.uint8)
    for number, picture in enumerate(pictures):
        picture[4 * number : 4 * number + 16] = 30
    return make_dicom(path, pictures, **attributes)


def run(bundle: Bundle, inputs: Path, output: Path, *questions: str, frames: slice = slice(None)) -> Summary:
    work = WorkOptions(questions or ("Please segment vessel in this image.",), threads=1)
    return infer(bundle, InferOptions((str(inputs),), output, Naming(CODES), work, Selection(frames), quiet=True))


def pages(path: Path) -> list[npt.NDArray[np.uint8]]:
    with Image.open(path) as file:
        found = []
        for page in range(file.n_frames):
            file.seek(page)
            assert file.mode == "L"
            found.append(np.array(file))
        return found


def mask_of(output: Path, name: str) -> npt.NDArray[np.uint8]:
    with Image.open(output / "masks" / f"{name}.png") as image:
        return np.array(image)


def lines(output: Path) -> list[Any]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def box(left: int, size: int = 10) -> npt.NDArray[np.bool_]:
    mask = np.zeros((64, 96), np.bool_)
    mask[5 : 5 + size, left : left + size] = True
    return mask


def answered(output: Path, frames: Sequence[tuple[str, int, Sequence[Sequence[npt.NDArray[np.bool_]]] | None]]) -> None:
    """Results of frames of cines, by what was answered to each question; None: the frame failed."""
    for folder in ("masks", "overlays", "previews"):
        (output / folder).mkdir(parents=True)
    cines = placed(*(f"{cine}_frame_{number:06}.dcm" for cine, number, _ in frames))
    writer, questions = FrameWriter(output, [frame.name for frame in cines], "s"), ["Where?", "What else?"]
    with (output / "results.jsonl").open("w") as file:
        for frame, (_, number, answers) in zip(cines, frames, strict=True):
            frame = dataclasses.replace(frame, number=number)
            if answers is None:
                entry = failure(frame, questions, "cut short", "s")
            else:
                results = [
                    Result(question, "[SEG].", (1, 2), 6, 5, 7, 1, {}, tuple(Mask(mask, 0.5, 2.0) for mask in masks))
                    for question, masks in zip(questions, answers, strict=False)
                ]
                entry = writer.write(frame, "0", make_frame(), results)
            file.writelines(json.dumps(line) + "\n" for line in entry.lines)
    write_cines(output)


def test_pages_are_the_masks_of_the_frames_in_order(standin: Bundle, tmp_path: Path) -> None:
    make_cine(tmp_path / "in.dcm", 12)
    summary = run(standin, tmp_path / "in.dcm", tmp_path / "out", frames=slice(2, 12, 3))
    assert (summary.images, summary.failed, summary.masks) == (4, 0, 4)
    found = pages(tmp_path / "out" / "cines" / "in.tif")
    assert len(found) == 4
    for page, number in zip(found, (2, 5, 8, 11), strict=True):
        np.testing.assert_array_equal(page, mask_of(tmp_path / "out", f"in_frame_{number:06}"))
        assert set(np.unique(page)) == {0, 255}
    assert not np.array_equal(found[0], found[3])
    assert names(tmp_path / "out" / "cines") == ["in.tif"]
    assert names(tmp_path / "out" / "masks") == [f"in_frame_{number:06}.png" for number in (2, 5, 8, 11)]
    first = lines(tmp_path / "out")[0]
    assert (first["image"], first["frame"], first["name"]) == ("in.dcm", 2, "in_frame_000002")


def test_frames_backwards_are_pages_forwards(standin: Bundle, tmp_path: Path) -> None:
    make_cine(tmp_path / "in.dcm")
    run(standin, tmp_path / "in.dcm", tmp_path / "out", frames=slice(None, None, -1))
    assert [line["frame"] for line in lines(tmp_path / "out")] == [2, 1, 0]
    for number, page in enumerate(pages(tmp_path / "out" / "cines" / "in.tif")):
        np.testing.assert_array_equal(page, mask_of(tmp_path / "out", f"in_frame_{number:06}"))


def test_a_single_picture_has_no_tiff(standin: Bundle, tmp_path: Path) -> None:
    make_dicom(tmp_path / "a.dcm", np.asarray(make_frame().convert("L")))
    assert run(standin, tmp_path / "a.dcm", tmp_path / "out").failed == 0
    assert names(tmp_path / "out" / "masks") == ["a.png"]
    assert not (tmp_path / "out" / "cines").exists()


def test_two_questions_give_two_tiffs(standin: Bundle, tmp_path: Path) -> None:
    make_cine(tmp_path / "in.dcm")
    run(standin, tmp_path / "in.dcm", tmp_path / "out", "Where?", "What else?")
    assert names(tmp_path / "out" / "cines") == ["in.tif", "in_1.tif"]
    for name, suffix in (("in", ""), ("in_1", "_1")):
        for number, page in enumerate(pages(tmp_path / "out" / "cines" / f"{name}.tif")):
            np.testing.assert_array_equal(page, mask_of(tmp_path / "out", f"in_frame_{number:06}{suffix}"))


def test_an_answer_without_a_mask_gives_an_empty_page(tmp_path: Path) -> None:
    frames = [("a", 0, [[box(3)], []]), ("a", 1, [[], [box(40)]]), ("a", 2, [[box(5), box(60)], [box(70)]])]
    answered(tmp_path / "out", frames)
    empty = np.zeros((64, 96), np.bool_)
    expected = {"a": [box(3), empty, box(5)], "a_1": [empty, empty, box(60)], "a_2": [empty, box(40), box(70)]}
    assert names(tmp_path / "out" / "cines") == [f"{name}.tif" for name in expected]
    for name, masks in expected.items():
        np.testing.assert_array_equal(pages(tmp_path / "out" / "cines" / f"{name}.tif"), np.stack(masks) * np.uint8(255))


def test_answers_without_any_mask_give_no_tiff(tmp_path: Path) -> None:
    bundle = build_standin(tmp_path / "standin", answer="None.")
    make_cine(tmp_path / "in.dcm")
    summary = run(bundle, tmp_path / "in.dcm", tmp_path / "out")
    assert (summary.images, summary.without_mask) == (3, 3)
    assert not (tmp_path / "out" / "cines").exists()


def test_a_tiff_does_not_take_another_cines_name(tmp_path: Path) -> None:
    answers = [[box(3)], [box(40)]]
    answered(tmp_path / "out", [("a", 0, answers), ("A_1", 0, [[box(70)], [box(80)]])])
    expected = {"a": 3, "a_2": 40, "A_1": 70, "A_1_1": 80}
    assert names(tmp_path / "out" / "cines") == sorted(f"{name}.tif" for name in expected)
    for name, left in expected.items():
        np.testing.assert_array_equal(pages(tmp_path / "out" / "cines" / f"{name}.tif")[0], box(left) * np.uint8(255))


def test_a_cine_of_which_a_frame_failed_has_no_tiff(tmp_path: Path) -> None:
    answered(tmp_path / "out", [("a", 0, [[box(3)], []]), ("a", 1, None), ("b", 0, [[box(3)], []])])
    assert names(tmp_path / "out" / "cines") == ["b.tif"]


def test_a_damaged_frame_leaves_the_others_their_masks(standin: Bundle, tmp_path: Path) -> None:
    pictures = [make_frame(seed=seed).convert("L") for seed in range(3)]
    codes = [jpeg(picture) for picture in pictures]
    codes[1] = codes[1][: len(codes[1]) // 2]
    make_dicom(tmp_path / "in.dcm", np.stack([np.asarray(picture) for picture in pictures]), JPEG, PixelData=codes)
    summary = run(standin, tmp_path / "in.dcm", tmp_path / "out")
    assert (summary.images, summary.failed, summary.masks) == (3, 1, 2)
    assert names(tmp_path / "out" / "masks") == ["in_frame_000000.png", "in_frame_000002.png"]
    assert not (tmp_path / "out" / "cines").exists()


def test_a_tiff_follows_its_cine_and_is_kept_when_that_is_cut_short(standin: Bundle, tmp_path: Path) -> None:
    make_cine(tmp_path / "in.dcm")
    run(standin, tmp_path / "in.dcm", tmp_path / "out")
    before = pages(tmp_path / "out" / "cines" / "in.tif")
    make_cine(tmp_path / "in.dcm", PhotometricInterpretation="MONOCHROME1")
    run(standin, tmp_path / "in.dcm", tmp_path / "out")
    after = pages(tmp_path / "out" / "cines" / "in.tif")
    assert not np.array_equal(before, after)
    cut(tmp_path / "in.dcm", -1000)  # it claims more frames than it holds: one input that fails, and no frames
    with pytest.raises(VesselError, match="results of 3 frames that are not among these inputs"):
        run(standin, tmp_path / "in.dcm", tmp_path / "out")
    assert names(tmp_path / "out" / "cines") == ["in.tif"]
    assert run(standin, tmp_path / "in.dcm", tmp_path / "new").failed == 1


def test_a_mask_that_is_gone_is_an_error_and_leaves_no_tiff(tmp_path: Path) -> None:
    frames = [("a", 0, [[box(3)]]), ("a", 1, [[box(5)]])]
    answered(tmp_path / "out", frames)
    os.remove(tmp_path / "out" / "cines" / "a.tif")
    os.remove(tmp_path / "out" / "masks" / "a_frame_000001.png")
    with pytest.raises(VesselError, match=r"a mask of .* cannot be read for the TIFF of its cine"):
        write_cines(tmp_path / "out")
    assert names(tmp_path / "out" / "cines") == []


def test_a_tiff_has_nothing_of_the_file_but_masks(standin: Bundle, tmp_path: Path) -> None:
    make_cine(tmp_path / "in.dcm")
    run(standin, tmp_path / "in.dcm", tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.*"):
        content = path.read_bytes().lower()
        assert not [word for word in (NAME.lower().encode(), ID.encode()) if word in content], path.name


def test_encodings_and_windows_end_in_the_same_masks(standin: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    deep = np.stack([np.asarray(make_frame(seed=seed).convert("L"), np.uint16) for seed in range(2)])
    window = item(FrameVOILUTSequence=item(WindowCenter=128, WindowWidth=256))
    make_dicom(folder / "a.dcm", deep.astype(np.uint8))
    make_dicom(folder / "b.dcm", deep, RLE, BitsStored=12, WindowCenter=128, WindowWidth=256)
    make_dicom(folder / "c.dcm", deep, BitsStored=12, SOPClassUID=ENHANCED_XA, SharedFunctionalGroupsSequence=window)
    make_dicom(folder / "d.dcm", 255 - deep.astype(np.uint8), PhotometricInterpretation="MONOCHROME1")
    make_dicom(folder / "I0000012", np.stack([deep.astype(np.uint8)] * 3, axis=-1))
    assert run(standin, folder, tmp_path / "out").failed == 0
    cines = [pages(tmp_path / "out" / "cines" / f"{name}.tif") for name in ("I0000012", "a", "b", "c", "d")]
    for cine in cines:
        np.testing.assert_array_equal(cine, cines[0])


def test_a_folder_of_good_and_bad_files(standin: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    picture = np.asarray(make_frame().convert("L"))
    make_frame().save(folder / "a.jpg")
    make_cine(folder / "b.dcm")
    make_dicom(folder / "c.dcm", picture)
    bad = {
        "d_report.dcm": "a DICOM file without pixel data",
        "e_cut.dcm": "its pixels cannot be read",
        "f_cut_cine.dcm": "cut short: its pixel data end before they should",
        "g_encrypted.dcm": "not a DICOM file, or an encrypted one",
        "h_attributes.dcm": "its attributes are encrypted",
        "i_text.jpg": "not a JPG",
    }
    make_dicom(folder / "d_report.dcm", None, SOPClassUID=REPORT)
    cut(make_dicom(folder / "e_cut.dcm", picture), -1000)
    cut(make_dicom(folder / "f_cut_cine.dcm", picture[None], JPEG, PixelData=[jpeg(make_frame().convert("L"))] * 2, NumberOfFrames=2), -900)
    (folder / "g_encrypted.dcm").write_bytes(np.random.default_rng(0).bytes(4000))
    make_dicom(folder / "h_attributes.dcm", None, EncryptedAttributesSequence=item(EncryptedContent=ID.encode()))
    (folder / "i_text.jpg").write_text(f"{NAME} {ID}")
    assert main(["infer", str(folder), "-o", str(out), "--bundle", str(standin.folder), "--device", "cpu", "--threads", "1", "-q"]) == 1

    failed = [line for line in lines(out) if line["status"] == "error"]
    assert [(line["image"], line["frame"]) for line in failed] == [
        ("d_report.dcm", None),
        ("e_cut.dcm", None),
        ("f_cut_cine.dcm", 0),
        ("f_cut_cine.dcm", 1),
        ("g_encrypted.dcm", None),
        ("h_attributes.dcm", None),
        ("i_text.jpg", None),
    ]
    for line in failed:
        assert line["error"].startswith(bad[line["image"]])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(failed)
    for text, line in zip(said, failed, strict=True):
        assert text == f"vessel-rt: error: frame {line['index'] + 1} of 12 ({line['code']}): {line['error']}"
    assert names(out / "masks") == ["a.png", *(f"b_frame_{number:06}.png" for number in range(3)), "c.png"]
    assert names(out / "cines") == ["b.tif"]
    assert json.loads((out / "run.json").read_text())["counts"]["failed"] == 7

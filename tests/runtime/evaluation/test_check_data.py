"""A file with each kind of mismatch, and what is made of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.frames import CODES, make_frame
from vessel_rt.cli import main
from vessel_rt.errors import VesselError
from vessel_rt.evaluation.annotations import KINDS
from vessel_rt.evaluation.check_data import Checked, check_data, write_fixed
from vessel_rt.evaluation.ground_truth import read_truth
from vessel_rt.inputs.frames import Naming

S = [10, 10, 30, 10, 30, 30, 10, 30]  # a square in an image of 96x64
T = [50, 10, 70, 10, 70, 30, 50, 30]
U = [30, 40, 50, 40, 40, 60]


def item(image: str, *objects: tuple[Any, Any]) -> dict[str, Any]:
    return {"image": image, "mask": [polygons for polygons, _ in objects], "text": [text for _, text in objects]}


GOOD = item("good.png", ([S], "vessel"), ([T], "catheter"))

# Of each kind: what is wrong, and what is left of it.
BAD: dict[str, list[tuple[Any, Any]]] = {
    "form": [
        ("text", None),
        ({"image": "good.png", "mask": []}, None),
        ({"image": 3, "mask": [], "text": []}, None),
        ({"image": "../secret.png", "mask": [[S]], "text": ["vessel"]}, None),
        ({"image": "good.png", "mask": {}, "text": []}, None),
        ({"image": "good.png", "mask": [[S]], "text": [3]}, None),
    ],
    "duplicate image": [(GOOD, None), (item("good.png", ([T], "Catheter.")), None)],
    "image named twice": [(item("good.png", ([T], "stent")), item("good.png", ([T], "stent")))],
    "missing image": [(item("none.png", ([S], "vessel")), None)],
    "unreadable image": [(item("half.png", ([S], "vessel")), None), (item("text.jpg", ([S], "vessel")), None)],
    "more masks than texts": [
        ({"image": "b.png", "mask": [[S], [T]], "text": ["vessel"]}, item("b.png", ([S], "vessel"), ([T], "vessel"))),
        ({"image": "b.png", "mask": [[S], [T], [S]], "text": ["vessel", "catheter"]}, None),
        ({"image": "b.png", "mask": [[S]], "text": []}, None),
    ],
    "more texts than masks": [
        ({"image": "b.png", "mask": [[S]], "text": ["vessel", "Vessel."]}, item("b.png", ([S], "vessel"))),
        ({"image": "b.png", "mask": [[S]], "text": ["vessel", "catheter"]}, None),
    ],
    "no mask": [(item("b.png"), None), ({"image": "b.png", "mask": [], "text": ["vessel"]}, None)],
    "empty text": [(item("b.png", ([S], "vessel"), ([T], " ")), item("b.png", ([S], "vessel"))), (item("b.png", ([S], ".")), None)],
    "empty polygon": [
        (item("b.png", ([S, []], "vessel")), item("b.png", ([S], "vessel"))),
        (item("b.png", ([[1, 1, 2, 2]], "vessel")), None),
        (item("b.png", ([], "vessel")), None),
    ],
    "coordinates": [
        (item("b.png", ([S, [1, 2, 3, 4, 5, 6, 7]], "vessel")), item("b.png", ([S], "vessel"))),
        (item("b.png", ([["x", 2, 3, 4, 5, 6]], "vessel")), None),
        (item("b.png", ([[float("nan"), 2, 3, 4, 5, 6]], "vessel")), None),
        (item("b.png", ([[True, 2, 3, 4, 5, 6]], "vessel")), None),
        (item("b.png", (["polygon"], "vessel")), None),
        (item("b.png", (None, "vessel"), ([T], "catheter")), item("b.png", ([T], "catheter"))),
        (item("b.png", ([[0, 0, 1e9, 0, 1e9, 1e9]], "vessel")), None),
        (item("b.png", ([[0, 0, 10**400, 0, 10**400, 9]], "vessel")), None),
    ],
    "outside the image": [
        (item("b.png", ([S, [196, 0, 200, 0, 200, 9, 196, 9]], "vessel")), item("b.png", ([S], "vessel"))),
        (item("b.png", ([[-9, 0, -1, 0, -1, 9]], "vessel")), None),
    ],
    "partly outside the image": [(item("b.png", ([[80, 0, 120, 0, 120, 9, 80, 9]], "vessel")),) * 2],
    "no area": [(item("b.png", ([S, [5, 5, 5, 5, 5, 5]], "vessel")), item("b.png", ([S], "vessel")))],
    "duplicate object": [
        (item("b.png", ([U], "vessel"), ([U], "Vessel.")), item("b.png", ([U], "vessel"))),
        (item("b.png", ([S, U], "vessel"), ([S, U, []], "vessel")), item("b.png", ([S, U], "vessel"))),
    ],
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("good.png", "b.png"):
        make_frame().save(folder / name)
    (folder / "half.png").write_bytes((folder / "b.png").read_bytes()[:900])
    (folder / "text.jpg").write_text("This is not an image.")
    return folder


def check(tmp_path: Path, items: Any) -> Checked:
    (tmp_path / "annotations.json").write_text(json.dumps(items))
    return check_data(tmp_path / "annotations.json", tmp_path / "images", Naming(CODES))


def test_there_is_a_case_for_every_kind() -> None:
    assert {*BAD, "without annotation"} == set(KINDS)


@pytest.mark.parametrize(("kind", "bad", "left"), [(kind, *case) for kind, cases in BAD.items() for case in cases])
def test_each_mismatch_is_found_and_what_is_sound_is_kept(images: Path, tmp_path: Path, kind: str, bad: Any, left: Any) -> None:
    checked = check(tmp_path, [GOOD, bad])
    kinds = {problem.kind for problem in checked.problems} - {"without annotation"}
    assert kind in kinds
    assert kinds <= {kind, "empty polygon"}
    assert list(checked.sound) == [GOOD, *([left] if left else [])]
    assert checked.faults == (
        0 if kind in ("partly outside the image", "image named twice") else len([p for p in checked.problems if p.kind in kinds])
    )


def test_a_sound_file(images: Path, tmp_path: Path) -> None:
    checked = check(tmp_path, [GOOD])
    assert (checked.items, checked.faults, checked.sound) == (1, 0, (GOOD,))
    assert [problem.kind for problem in checked.problems] == ["without annotation"] * 3


def test_the_whole_bad_file_by_the_command_line(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [GOOD, *(case for cases in BAD.values() for case, _ in cases)] + [
        {"image": "b.png", "mask": [[S], [T], [S]], "text": ["a", "b"]}
    ] * 20
    make_frame().save(images / "unnamed.png")
    path, fixed = tmp_path / "bad.json", tmp_path / "sound.json"
    path.write_text(json.dumps(bad))
    command = ["check-data", str(path), "--images", str(images)]
    assert main([*command, "--fix", str(fixed)]) == 1
    out, err = capsys.readouterr()
    assert f"items: {len(bad)}" in out
    for kind in KINDS:
        assert f"  {kind}: " in out
    assert "    23  more masks than texts" in out
    assert "and 18 more" in out
    assert "half" not in out + err
    assert read_truth(fixed).concepts("vessel and catheter") == ["vessel", "catheter"]
    assert main(["check-data", str(fixed), "--images", str(images), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["kinds"]) == {"image named twice", "without annotation", "partly outside the image"}
    dropped = json.loads((tmp_path / "sound.dropped.json").read_text())
    assert {problem["kind"] for problem in dropped} == set(KINDS)
    assert main([*command, "--fix", str(fixed)]) == 1
    assert "already exists" in capsys.readouterr().err


def test_names_are_shown_when_they_may_be(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text(json.dumps([item("none.png", ([S], "vessel"))]))
    assert main(["check-data", str(tmp_path / "bad.json"), "--images", str(images), "--show-names"]) == 1
    assert "item 0 (none.png)" in capsys.readouterr().out


def test_files_that_are_no_annotations(images: Path, tmp_path: Path) -> None:
    with pytest.raises(VesselError, match="not a list of annotated images, but an object"):
        check(tmp_path, {})
    with pytest.raises(VesselError, match="no such folder"):
        check_data(tmp_path / "annotations.json", tmp_path / "none", Naming(CODES))
    (tmp_path / "annotations.json").write_text('[{"image": ')
    with pytest.raises(VesselError, match=r"annotations\.json: cannot be read \(.*line 1 column"):
        check_data(tmp_path / "annotations.json", images, Naming(CODES))


def test_a_fix_of_a_sound_file_is_that_file(images: Path, tmp_path: Path) -> None:
    write_fixed(check(tmp_path, [GOOD]), tmp_path / "fixed.json")
    assert json.loads((tmp_path / "fixed.json").read_text()) == [GOOD]


# Of a file with such an item `evaluate` makes the masks that it makes without it; the images themselves it does not look at.
HARMLESS = {"duplicate image", "image named twice", "partly outside the image", "duplicate object"}
OF_FILES = {"missing image", "unreadable image"}


@pytest.mark.parametrize(("kind", "bad"), [(kind, bad) for kind, cases in BAD.items() if kind not in OF_FILES for bad, _ in cases])
def test_evaluate_takes_and_refuses_what_this_does(tmp_path: Path, kind: str, bad: Any) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([GOOD, bad]))

    def masks() -> None:
        truth = read_truth(path)
        for name in ("good", "b"):
            for concept in ("vessel", "catheter"):
                truth.mask({"index": 0, "code": "c0de", "name": name, "width": 96, "height": 64}, concept)

    if kind in HARMLESS and not any([] in polygons for polygons in bad["mask"]):
        masks()
    else:
        with pytest.raises(VesselError, match=r"item 1\b.*vessel-rt check-data"):
            masks()


def test_a_name_that_is_too_long_is_a_missing_image(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps([item("w" * 300 + ".png", ([S], "vessel")), GOOD]))
    assert main(["check-data", str(tmp_path / "a.json"), "--images", str(images), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["kinds"]["missing image"]["count"] == 1
    assert json.loads(out)["sound"] == 1
    assert "images" not in err + out.replace("image", "")


@pytest.mark.skipif(os.name != "posix", reason="FIFOs and devices of POSIX")
def test_images_that_are_no_files_are_not_opened(images: Path, tmp_path: Path) -> None:
    os.mkfifo(images / "fifo.png")
    (images / "zero.png").symlink_to("/dev/zero")
    (images / "loop.png").symlink_to("loop.png")
    (images / "folder.png").mkdir()
    names = ("fifo.png", "zero.png", "folder.png", "loop.png", "good.png/b.png")
    checked = check(tmp_path, [GOOD, *(item(name, ([S], "vessel")) for name in names)])
    kinds = [problem.kind for problem in checked.problems if problem.kind != "without annotation"]
    assert kinds == ["unreadable image"] * 3 + ["missing image"] * 2


@pytest.mark.skipif(os.name != "posix", reason="FIFOs and devices of POSIX")
@pytest.mark.parametrize("option", ["annotations", "--images", "--fix"])
def test_arguments_that_are_no_files(images: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "annotations.json").write_text(json.dumps([GOOD]))
    os.mkfifo(tmp_path / "fifo")
    for odd in (tmp_path / "fifo", Path("/dev/zero"), images if option != "--images" else images / "good.png"):
        given = {"annotations": tmp_path / "annotations.json", "--images": images, "--fix": tmp_path / "fixed.json"} | {option: odd}
        arguments = [str(given.pop("annotations")), *(str(part) for pair in given.items() for part in pair)]
        assert main(["check-data", *arguments]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"vessel-rt: error: {odd}: ")
        assert not (tmp_path / "fixed.json").exists()


def test_no_fix_replaces_anything(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "annotations.json").write_text(json.dumps([GOOD]))
    (tmp_path / "sound.dropped.json").write_text("mine")
    command = ["check-data", str(tmp_path / "annotations.json"), "--images", str(images), "--fix", str(tmp_path / "sound.json")]
    assert main(command) == 1
    assert "sound.dropped.json: already exists" in capsys.readouterr().err
    assert (tmp_path / "sound.dropped.json").read_text() == "mine"
    assert not (tmp_path / "sound.json").exists()


def test_a_fix_that_cannot_be_written_leaves_nothing(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = check(tmp_path, [GOOD])
    write_text = Path.write_text

    def full(path: Path, text: str, **more: Any) -> int:
        if "good.png" in text:
            raise OSError(28, "No space left on device")
        return write_text(path, text, **more)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(VesselError, match="No space left"):
        write_fixed(checked, tmp_path / "fixed.json")
    assert not list(tmp_path.glob("*fixed*"))

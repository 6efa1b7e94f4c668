"""A file with each kind of mismatch, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.conftest import CODES, make_frame
from vessel_rt.annotations import read_truth
from vessel_rt.check_data import KINDS, Checked, check_data, write_fixed
from vessel_rt.cli import main
from vessel_rt.errors import VesselError
from vessel_rt.frames import Naming

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
    assert "is there already" in capsys.readouterr().err


def test_names_are_shown_when_they_may_be(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text(json.dumps([item("none.png", ([S], "vessel"))]))
    assert main(["check-data", str(tmp_path / "bad.json"), "--images", str(images), "--show-names"]) == 1
    assert "item 0 (none.png)" in capsys.readouterr().out


def test_files_that_are_no_annotations(images: Path, tmp_path: Path) -> None:
    with pytest.raises(VesselError, match="not a list of annotated images, but dict"):
        check(tmp_path, {})
    with pytest.raises(VesselError, match="no such folder"):
        check_data(tmp_path / "annotations.json", tmp_path / "none", Naming(CODES))
    (tmp_path / "annotations.json").write_text('[{"image": ')
    with pytest.raises(VesselError, match=r"annotations\.json: cannot be read \(.*line 1 column"):
        check_data(tmp_path / "annotations.json", images, Naming(CODES))


def test_a_fix_of_a_sound_file_is_that_file(images: Path, tmp_path: Path) -> None:
    write_fixed(check(tmp_path, [GOOD]), tmp_path / "fixed.json")
    assert json.loads((tmp_path / "fixed.json").read_text()) == [GOOD]

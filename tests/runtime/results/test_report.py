from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.frames import CODES, make_frame, preview
from tests.support.paths import ROOT
from tests.support.runs import lines, options
from vessel_rt.errors import VesselError
from vessel_rt.evaluation.evaluate import evaluate
from vessel_rt.formats.bundle import Bundle
from vessel_rt.results import report
from vessel_rt.results.report import write_report
from vessel_rt.results.rle import decode_rle, encode_rle
from vessel_rt.run.infer import infer

COUNT, FAILED, WITHOUT_MASK = 60, 7, 3  # frames, and the places of the one that fails and the one that shows nothing
HOSTILE = "</script><!--<script><img src=x onerror=alert(1)>&amp;'\""


class Page(HTMLParser):
    """The elements of a page, and the data in it by what they are of."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.data: dict[str, list[Any]] = {}
        self._kind: str | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._kind = dict(attrs).get("data-of")

    def handle_data(self, data: str) -> None:
        if self._kind:
            self.data.setdefault(self._kind, []).append(json.loads(data))
            self._kind = None


def name_of(place: int) -> str:
    return f"S0001(0000000001)_4-1_1_{place:08d}"


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change each line of a JSON Lines file, or the one value of a JSON file."""
    path.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in _values(path)))


def _values(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


@pytest.fixture(scope="session")
def finished(standin: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over frames of which one cannot be read, with masks of many areas; not to be written to."""
    frames, out = tmp_path_factory.mktemp("frames"), tmp_path_factory.mktemp("report") / "out"
    for place in range(COUNT):
        make_frame(seed=place).save(frames / f"{name_of(place)}.png")
    (frames / f"{name_of(FAILED)}.png").write_bytes(b"")
    infer(standin, options(frames, out))
    rewrite(out / "results.jsonl", _with_another_mask)
    write_report(out)
    return out


def _with_another_mask(line: dict[str, Any]) -> dict[str, Any]:
    if line["status"] != "ok" or line["index"] == WITHOUT_MASK:
        return line | {"masks": []}
    mask = np.zeros((line["height"], line["width"]), np.bool_)
    mask[20:40, 10 : 12 + (7 * line["index"]) % COUNT] = True
    return line | {"masks": [line["masks"][0] | {"area": int(mask.sum()), "rle": encode_rle(mask)}]}


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def judged(out: Path, tmp_path: Path) -> Path:
    """The same, compared with masks that were drawn for most of its frames."""
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for place in range(COUNT - 5):
        mask = np.zeros((64, 96), np.uint8)
        mask[22:44, 12:50] = 255
        Image.fromarray(mask).save(drawn / f"{name_of(place)}.png")
    evaluate(out, drawn, codes=CODES)
    return out


def test_infer_leaves_a_report_with_each_frame_once(out: Path) -> None:
    found = Page(out / "report.html").data
    assert [facts["label"] for facts in found["facts"]] == [CODES.code(name_of(place)) for place in range(COUNT)]
    assert [facts["error"] is not None for facts in found["facts"]] == [place == FAILED for place in range(COUNT)]
    assert found["run"] == [{"run": json.loads((out / "run.json").read_text()), "evaluation": None}]
    with Image.open(io.BytesIO(base64.b64decode(found["shapes"][0]["picture"]))) as picture:
        assert picture.size == (96, 64)
    assert found["shapes"][FAILED] == {"picture": "", "masks": [[]], "truths": []}


def test_the_same_files_give_the_same_bytes(judged: Path) -> None:
    first = write_report(judged).read_bytes()
    assert write_report(judged).read_bytes() == first
    assert {path.name for path in judged.iterdir()} >= {"report.html", "results.jsonl", "evaluation.json"}
    assert not list(judged.glob(".*"))


def test_names_are_shown_only_where_the_run_was_told_to(standin: Bundle, judged: Path, frames: Path, tmp_path: Path) -> None:
    (judged / "run.json").rename(tmp_path / "run.json")
    for kept in (False, True):  # a run that was stopped, and one that was not
        if kept:
            shutil.copy(tmp_path / "run.json", judged / "run.json")
        text = write_report(judged).read_text()
        assert not [hidden for hidden in ("S0001", "0000000001", ".png", str(judged)) if hidden in text]
    infer(standin, options(frames, tmp_path / "named", "Where?", "What?"))
    assert "a.jpg" not in (tmp_path / "named" / "report.html").read_text()
    rewrite(tmp_path / "named" / "run.json", lambda run: run | {"options": run["options"] | {"show_names": True}})
    facts = Page(write_report(tmp_path / "named")).data["facts"]
    assert [fact["label"] for fact in facts] == ["a.jpg", "b.png", "c.tif"]
    assert [mask["file"] for answer in facts[0]["answers"] for mask in answer["masks"]] == ["masks/a.png", "masks/a_1.png"]


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
@pytest.mark.parametrize(("name", "address"), [(b"a \xff#?", "masks/a%20%FF%23%3F.png"), (b"\xc3\xa9%", "masks/%C3%A9%25.png")])
def test_links_of_masks_are_addresses(standin: Bundle, frames: Path, tmp_path: Path, name: bytes, address: str) -> None:
    """Of any name: a part of a name that is not UTF-8 would stop the page's code."""
    for path in (frames / "b.png", frames / "c.tif"):
        path.unlink()
    (frames / "a.jpg").rename(frames / f"{os.fsdecode(name)}.jpg")
    infer(standin, options(frames, tmp_path / "out"))
    rewrite(tmp_path / "out" / "run.json", lambda run: run | {"options": run["options"] | {"show_names": True}})
    [facts] = Page(write_report(tmp_path / "out")).data["facts"]
    assert facts["answers"][0]["masks"][0]["file"] == address


def test_what_was_drawn_comes_with_its_frame(judged: Path) -> None:
    found = Page(write_report(judged)).data
    assert found["run"][0]["evaluation"].keys() == {"truth", "metrics", "summary"}
    assert [len(facts["truths"]) for facts in found["facts"]] == [int(place < COUNT - 5 and place != FAILED) for place in range(COUNT)]
    assert found["facts"][0]["truths"][0]["dice"] == lines(judged, "evaluation.json")[0]["images"][0]["dice"]
    assert decode_rle(found["shapes"][0]["truths"][0]).sum() == 22 * 38


def test_times_of_all_questions_are_counted_once(standin: Bundle, frames: Path, tmp_path: Path) -> None:
    infer(standin, options(frames, tmp_path / "out", "Where?", "What?"))
    first, second = (timing["ms"] for timing in lines(tmp_path / "out", "timings.jsonl")[:2])
    ms = Page(tmp_path / "out" / "report.html").data["facts"][0]["ms"]
    assert ms == first | {"upsample": round(first["upsample"] + second["upsample"], 3)}


def test_no_text_becomes_markup(judged: Path) -> None:
    before = Page(write_report(judged))
    rewrite(
        judged / "results.jsonl",
        lambda line: line | {"question": HOSTILE, "answer": HOSTILE, "code": HOSTILE, "error": line["error"] and HOSTILE},
    )
    rewrite(judged / "run.json", lambda run: run | {"device": HOSTILE})
    after = Page(write_report(judged))
    assert after.tags == before.tags
    assert after.data["facts"][FAILED]["error"] == after.data["facts"][0]["label"] == HOSTILE


def test_many_pictures_are_made_smaller_until_they_fit(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (512, 512), dtype=np.uint8)
    for path in (out / "previews").iterdir():
        Image.fromarray(noise).save(path, quality=80)
    whole = Page(write_report(out)).data["shapes"][0]["picture"]
    assert base64.b64decode(whole) == (out / preview(name_of(0))).read_bytes()
    monkeypatch.setattr(report, "_PICTURES", COUNT * 30_000)
    for shapes in Page(write_report(out)).data["shapes"]:
        assert len(base64.b64decode(shapes["picture"])) <= 30_000


def test_a_long_page_has_the_pictures_that_matter_and_links_the_others(
    out: Path, tmp_path: Path, judged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "EMBEDDED", 30)
    path = write_report(judged)
    found = Page(path).data
    place_of = {facts["label"]: place for place, facts in enumerate(found["facts"])}
    inside = {place for place, shapes in enumerate(found["shapes"]) if shapes["picture"]}
    linked = {place for place, shapes in enumerate(found["shapes"]) if "file" in shapes}
    assert (len(inside), len(linked)) == (30, COUNT - 1 - 30)
    assert not inside & linked
    assert FAILED not in inside | linked  # it has no picture
    assert {place for place, facts in enumerate(found["facts"]) if facts["linked"]} == linked
    for label, place in place_of.items():
        if place in linked:
            assert found["shapes"][place]["file"] == f"previews/{label}.jpg"
            assert (judged / "previews" / f"{label}.jpg").is_file()
    dice = {truth["index"]: truth["dice"] for truth in lines(judged, "evaluation.json")[0]["images"]}
    ranked = sorted(dice, key=lambda place: (dice[place], place))
    assert set(ranked[:10]) <= inside
    middle = len(ranked) // 2
    assert set(ranked[middle - 4 : middle + 4]) <= inside
    assert all(
        shapes["masks"] == other["masks"] for shapes, other in zip(found["shapes"], Page(out / "report.html").data["shapes"], strict=True)
    )
    assert not [hidden for hidden in ("S0001", "0000000001", ".png") if hidden in path.read_text()]


@pytest.mark.parametrize("count", [0, 1, 299, 300, 301, 700, 5000])
@pytest.mark.parametrize("alike", [False, True])
def test_which_pictures_are_in_the_page(count: int, alike: bool) -> None:
    """Places with gaps, as failed frames leave them."""
    scores = {3 * place: 0.5 if alike else (7 * place % count) / count for place in range(count)}
    found = report.chosen(scores)
    assert len(found) == min(count, report.EMBEDDED)
    assert found <= scores.keys()
    ranked = sorted(scores, key=lambda place: (scores[place], place))
    assert {*ranked[:100], *ranked[count // 2 : count // 2 + 1]} <= found
    if count == 5000:
        places = sorted(found)
        assert places[0] < 300 * 3
        assert max(after - before for before, after in itertools.pairwise(places)) <= 3 * 60


def test_frames_without_a_score_are_only_spread() -> None:
    scores = {place: math.inf if place % 2 else place / 1000 for place in range(1000)}
    found = report.chosen(scores)
    assert {*range(0, 200, 2), *range(460, 540, 2)} <= found
    assert any(place % 2 for place in found)


def test_a_frame_without_a_mask_is_among_the_worst(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "EMBEDDED", 3)
    shapes = Page(write_report(out)).data["shapes"]
    assert shapes[WITHOUT_MASK]["picture"]
    assert sum(bool(of_frame["picture"]) for of_frame in shapes) == 3


def test_the_page_grows_by_less_than_a_picture_for_each_frame_beyond_the_bound(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_report(out).stat().st_size
    monkeypatch.setattr(report, "EMBEDDED", 1)
    pictures = sum(path.stat().st_size for path in (out / "previews").iterdir())
    assert whole - write_report(out).stat().st_size > pictures


def test_previews_that_are_called_as_their_frames_are_shown_and_never_linked(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As earlier versions called them."""
    before = Page(write_report(out)).data["shapes"]
    for place in range(COUNT):
        if place != FAILED:
            (out / preview(name_of(place))).rename(out / "previews" / f"{name_of(place)}.jpg")
    rewrite(out / "results.jsonl", _with_names_of_previews)
    assert Page(write_report(out)).data["shapes"] == before
    monkeypatch.setattr(report, "EMBEDDED", 1)
    shapes = Page(write_report(out)).data["shapes"]
    assert sum(bool(of_frame["picture"]) for of_frame in shapes) == 1
    assert not any("file" in of_frame for of_frame in shapes)


def _with_names_of_previews(line: dict[str, Any]) -> dict[str, Any]:
    now, earlier = preview(line["name"]), f"previews/{line['name']}.jpg"
    return line | {"files": {earlier if file == now else file: sha256 for file, sha256 in line["files"].items()}}


def test_previews_that_were_removed_are_left_out(out: Path) -> None:
    shutil.rmtree(out / "previews")
    assert {shapes["picture"] for shapes in Page(write_report(out)).data["shapes"]} == {""}


def test_a_report_never_reads_outside_its_folder(out: Path) -> None:
    make_frame().save(out / "elsewhere.jpg")
    rewrite(out / "results.jsonl", lambda line: line | {"name": "../elsewhere"})
    with pytest.raises(VesselError, match="name: not the name of a file"):
        write_report(out)


def test_a_run_that_was_stopped_before_its_first_frame_has_a_report(out: Path) -> None:
    (out / "run.json").unlink()
    for name in ("results.jsonl", "timings.jsonl"):
        (out / name).write_text("")
    assert Page(write_report(out)).data == {"run": [{"run": None, "evaluation": None}]}


def test_a_folder_that_is_not_a_runs_is_said_to_be_so(out: Path, tmp_path: Path) -> None:
    with pytest.raises(VesselError, match=r"results\.jsonl: missing"):
        write_report(tmp_path)
    (out / preview(name_of(0))).write_bytes(b"not a picture")
    with pytest.raises(VesselError, match=f"previews: the picture of {CODES.code(name_of(0))} cannot be read"):
        write_report(out)
    shutil.rmtree(out / "previews")
    (out / "report.html").unlink()
    for name, text in (("evaluation.json", "{}"), ("timings.jsonl", ""), ("run.json", "{}"), ("results.jsonl", '{"index": 0}\n')):
        before = (out / name).read_text() if (out / name).exists() else None
        (out / name).write_text(text)
        with pytest.raises(VesselError, match=r"not (in the format of this version|of the same frames)"):
            write_report(out)
        (out / name).unlink() if before is None else (out / name).write_text(before)
    assert not (out / "report.html").exists()
    assert not list(out.glob(".*"))


@pytest.fixture
def tracked(out: Path) -> Path:
    """The same, its frames being those of a cine of which frame 30 was asked about."""
    cine = {"image": "cine.dcm", "propagated_from": [30]}

    def frame_of_cine(line: dict[str, Any]) -> dict[str, Any]:
        place = line["index"]
        moment = {"frame": place, "time_ms": 50.0 * place, "code": f"0123456789ab_frame_{place:06}", "name": f"cine_frame_{place:06}"}
        return line | cine | moment | ({"propagated_from": None} if place == 30 else {})

    rewrite(out / "results.jsonl", frame_of_cine)
    write_report(out)
    return out


def test_the_page_says_how_steady_the_masks_of_a_cine_are(tracked: Path) -> None:
    found = Page(tracked / "report.html").data
    assert found["cine"] == [{"cine": "0123456789ab", "label": "0123456789ab"}]
    assert [facts["number"] for facts in found["facts"] if facts["asked"]] == [30]
    before: Any = None
    for line, facts in zip(lines(tracked), found["facts"], strict=True):
        mask = decode_rle(line["masks"][0]["rle"]) if line["masks"] else None
        for shown in facts["answers"][0]["masks"]:
            expected = None if before is None else round(float((mask & before).sum() / (mask | before).sum()), 4)
            assert shown.get("stability") == expected
        before = mask


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    """What report_page.mjs finds when it uses a report in Chromium."""
    chromium, node = shutil.which("chromium"), shutil.which("node")
    if not (chromium and node):
        pytest.skip("chromium or node is not installed")
    playwright = Path(os.environ.get("PLAYWRIGHT_CORE") or ROOT / ".venv" / "browser" / "node_modules" / "playwright-core")
    if not playwright.is_dir():
        pytest.skip("playwright-core is not installed: make browser, or let PLAYWRIGHT_CORE name its folder")
    script = str(ROOT / "tests" / "support" / "report_page.mjs")
    return lambda path: json.loads(_node(node, script, str(path), chromium, str(playwright)))


def _node(node: str, *arguments: str) -> str:
    done = subprocess.run([node, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_page_works_in_a_browser(judged: Path, browse: Callable[[Path], Any]) -> None:
    found = browse(write_report(judged))
    labels = [CODES.code(name_of(place)) for place in range(COUNT)]
    assert (found["errors"], found["requests"], found["sideways"]) == ([], [], [])
    assert found["order"] == labels

    shown = lines(judged)
    areas = {line["code"]: line["masks"][0]["area"] if line["masks"] else None for line in shown}
    known = [label for label in labels if areas[label] is not None]
    without = [labels[WITHOUT_MASK], labels[FAILED]]  # last, whatever the direction
    assert found["sorted"]["area"]["ascending"] == sorted(known, key=lambda label: areas[label] or 0) + without
    assert found["sorted"]["area"]["descending"] == sorted(known, key=lambda label: -(areas[label] or 0)) + without
    assert found["sorted"]["code"]["descending"] == sorted(labels, reverse=True)
    scores = {truth["index"]: truth["dice"] for truth in lines(judged, "evaluation.json")[0]["images"]}
    by_dice = [labels[place] for place in sorted(scores, key=lambda place: scores[place])]
    assert found["sorted"]["Dice"]["ascending"][: len(by_dice)] == by_dice
    assert found["filtered"] == {
        "all": labels,
        "failed": [labels[FAILED]],
        "no mask": [labels[WITHOUT_MASK]],
        "low Dice": [labels[place] for place in range(COUNT) if scores.get(place, 1) < 0.7],
    }
    assert found["searched"] == labels[-1:]

    assert 0 < found["thumbnailsAtFirst"] < COUNT - 1
    assert 0 < found["thumbnailsAtTheEnd"] < COUNT - 1
    assert found["lastIsDrawn"]
    masks = [[decode_rle(mask["rle"]) for mask in line["masks"]] for line in shown]
    places = [[np.flatnonzero(mask.T) for mask in of_line] for of_line in masks]
    assert found["decoded"] == [[[len(place), int(place.sum())] for place in of_line] for of_line in places]

    assert found["changed"] == dict.fromkeys("ocge]1", True)
    assert [found[key] for key in ("opened", "restored", "sideBySide", "closed", "help")] == [True] * 5
    assert found["walked"] == [labels[1], labels[2], labels[1], labels[0]]
    assert found["focused"] == labels[0]


@pytest.mark.slow
def test_pictures_beside_the_page_are_loaded_when_they_are_shown(
    judged: Path, browse: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = 20  # the first ones
    monkeypatch.setattr(report, "chosen", lambda scores: frozenset(range(embedded)))
    path = write_report(judged)
    found = browse(path)
    assert (found["errors"], found["sideways"]) == ([], [])
    labels = [CODES.code(name_of(place)) for place in range(COUNT)]
    linked = {(judged / "previews" / f"{label}.jpg").as_uri() for label in labels[embedded:]}
    assert set(found["requests"]) <= linked
    assert dict(found["fromFiles"])[labels[-1]]
    assert all(from_file == (labels.index(label) >= embedded) for label, from_file in found["fromFiles"])
    assert f"The pictures of {COUNT - embedded} of {COUNT} frames are in the folder previews/" in found["text"]


@pytest.mark.slow
def test_a_cine_is_played_in_a_browser(tracked: Path, browse: Callable[[Path], Any]) -> None:
    found = browse(tracked / "report.html")
    assert (found["errors"], found["requests"], found["sideways"]) == ([], [], [])
    shown = COUNT - 1  # without the frame that failed
    assert found["cine"] == {
        "frames": shown,
        "first": "1.50 s · asked",
        "charts": 2,
        "sought": f"{50 * (COUNT - 1) / 1000:.2f} s",
        "movesTheMark": True,
        "redrawn": True,
        "plays": True,
        "pauses": True,
    }


@pytest.mark.slow
def test_a_page_of_failures_and_hostile_texts_works_in_a_browser(out: Path, browse: Callable[[Path], Any]) -> None:
    failed: dict[str, Any] = {
        "status": "error",
        "error": HOSTILE,
        "question": HOSTILE,
        "answer": None,
        "masks": [],
        "width": None,
        "height": None,
    }
    rewrite(out / "results.jsonl", lambda line: line | failed)
    rewrite(out / "timings.jsonl", lambda line: line | {"ms": {}})
    found = browse(write_report(out))
    assert (found["errors"], found["requests"], found["sideways"]) == ([], [], [])
    assert len(found["filtered"]["failed"]) == COUNT
    assert found["text"].count(HOSTILE) >= COUNT
    assert HOSTILE in found["facts"]


@pytest.mark.slow
def test_another_question_may_leave_nothing_of_the_list(
    standin: Bundle, frames: Path, tmp_path: Path, browse: Callable[[Path], Any]
) -> None:
    infer(standin, options(frames, tmp_path / "out", "Where?", "What?", "Which?"))
    empty = {"Where?": 3, "What?": 1, "Which?": 0}
    rewrite(tmp_path / "out" / "results.jsonl", lambda line: line | ({"masks": []} if line["index"] < empty[line["question"]] else {}))
    found = browse(write_report(tmp_path / "out"))
    assert (found["errors"], found["requests"]) == ([], [])
    assert found["asked"] == [[False, 0], [True, 1]]

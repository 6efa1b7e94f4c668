"""Tracking in the runtime: what is run for each frame, what is kept, and which bundles can do it. Parity: tests/export/parity."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vessel_export.parity.verify_cine import drawn_cine
from vessel_rt.device.deployment import deploy
from vessel_rt.device.providers import Device
from vessel_rt.errors import BundleError, ImageError, VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.profiles import MOST_CONDITIONING
from vessel_rt.model.cine import CineSegmenter
from vessel_rt.model.decoding import Generation
from vessel_rt.model.result import Pixels
from vessel_rt.model.segmenter import Segmenter

QUESTION = "Please segment vessel in this image."


@pytest.fixture(scope="module")
def segmenter(fp32_bundle: Path) -> Iterator[CineSegmenter]:
    with CineSegmenter(deploy(Bundle.load(fp32_bundle), Device("cpu"))) as loaded:
        yield loaded


def test_the_first_frames_are_asked_about_and_the_others_tracked(segmenter: CineSegmenter) -> None:
    results = list(segmenter.segment_cine(drawn_cine(7), QUESTION))
    assert [result.propagated_from for result in results] == [None] * 5 + [(0, 1, 2, 3, 4)] * 2
    assert len({result.answer for result in results}) == 1
    assert all(len(result.masks) == 1 and result.masks[0].pixels.shape == (512, 512) for result in results)
    assert "sam2_memory_attention" in results[5].ms
    assert not {"language_model", "vision_encoder", "sam2_mask_decoder"} & results[5].ms.keys()


def test_each_frame_is_encoded_once(segmenter: CineSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    run = segmenter._encode
    monkeypatch.setattr(segmenter, "_encode", lambda batch, ms: encoded.append(len(batch)) or run(batch, ms))
    questions = [QUESTION, "Please segment vessel and catheter in this image."]
    frames = [segmenter.prepare_frame(frame, place) for place, frame in enumerate(drawn_cine(6))]
    results = list(segmenter.run_cine(frames, questions))
    assert encoded == [1] * 6
    assert [len(one) for one in results] == [2] * 6
    alone = list(segmenter.segment_cine(drawn_cine(6), QUESTION))
    for both, one in zip(results, alone, strict=True):
        assert np.array_equal(both[0].masks[0].pixels, one.masks[0].pixels)


def test_a_cine_shorter_than_what_the_language_model_sees(segmenter: CineSegmenter) -> None:
    assert [result.propagated_from for result in segmenter.segment_cine(drawn_cine(2), QUESTION)] == [None] * 2


def test_an_answer_without_a_mask_gives_none_on_any_frame(segmenter: CineSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = segmenter._language_model.generate

    def maskless(*args: object, **more: object) -> object:
        return [type(one)(one.token_ids, one.seg_states[:0], 0, 0, 0) for one in generate(*args, **more)]  # type: ignore[arg-type]

    monkeypatch.setattr(segmenter._language_model, "generate", maskless)
    monkeypatch.setattr(segmenter, "_encode", lambda *_: pytest.fail("nothing needs SAM2"))
    assert [result.masks for result in segmenter.segment_cine(drawn_cine(6), QUESTION)] == [()] * 6


def test_frames_are_read_as_they_are_needed(segmenter: CineSegmenter) -> None:
    read: list[int] = []

    def frames() -> Iterator[Image.Image]:
        for place, frame in enumerate(drawn_cine(8)):
            read.append(place)
            yield frame

    results = segmenter.segment_cine(frames(), QUESTION)
    next(results)
    assert len(read) == 5
    for _ in range(5):
        next(results)
    assert len(read) in (6, 7)  # the next one is encoded meanwhile


def test_encoding_the_next_frame_meanwhile_changes_no_bit(segmenter: CineSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for ahead in (True, False):
        monkeypatch.setattr(segmenter, "_encodes_ahead", ahead)
        found.append([result.masks[0] for result in segmenter.segment_cine(drawn_cine(9), QUESTION)])
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one.pixels, other.pixels)
        assert (one.iou, one.object_score) == (other.iou, other.object_score)


def test_a_frame_that_cannot_be_read_ends_the_cine(segmenter: CineSegmenter) -> None:
    def frames() -> Iterator[Image.Image]:
        yield from drawn_cine(6)
        raise ImageError("damaged")

    results = segmenter.segment_cine(frames(), QUESTION)
    assert len([next(results) for _ in range(6)]) == 6
    with pytest.raises(ImageError, match="damaged"):
        next(results)


class Shown:
    """The frames of a drawn cine for `run_from`; `asked` and `order` are the places that were read, `unreadable` those that cannot be."""

    def __init__(self, count: int, unreadable: Sequence[int] = ()) -> None:
        self.frames, self.unreadable = drawn_cine(count), unreadable
        self.asked: list[int] = []
        self.order: list[int] = []

    def __call__(self, places: Sequence[int], prepare: Callable[[Image.Image], Pixels]) -> Iterator[tuple[int, Pixels]]:
        for place in places:
            if place not in self.unreadable:
                pixels = prepare(self.frames[place])
                (self.asked if len(pixels.tiles) else self.order).append(place)
                yield place, pixels


def test_chosen_frames_are_asked_about_and_the_others_tracked_from_them(segmenter: CineSegmenter) -> None:
    shown = Shown(9)
    found = dict(segmenter.run_from([5, 3], range(9), shown, [QUESTION]))
    assert (shown.asked, shown.order) == ([5, 3], [2, 1, 0, 4, 6, 7, 8])
    assert {place for place, [result] in found.items() if result.propagated_from is None} == {3, 5}
    assert all(result.propagated_from in (None, (3, 5)) for [result] in found.values())
    alone = segmenter.segment(shown.frames[3], QUESTION)
    assert found[3][0].answer == alone.answer
    assert np.array_equal(found[3][0].masks[0].pixels, alone.masks[0].pixels)


def test_frames_that_cannot_be_read_are_left_out(segmenter: CineSegmenter) -> None:
    assert dict(segmenter.run_from([5, 3], range(7), Shown(7, unreadable=[5, 1]), [QUESTION])).keys() == {0, 2, 3, 4, 6}
    with pytest.raises(ImageError, match="none of the frames"):
        list(segmenter.run_from([5], range(7), Shown(7, unreadable=[5]), [QUESTION]))


def test_a_frame_whose_answer_has_other_objects_is_tracked(segmenter: CineSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = segmenter._generate

    def differs(batch: Sequence[Pixels], questions: Sequence[str], ms: dict[str, float]) -> list[list[Generation]]:
        [[one]] = generate(batch, questions, ms)
        return [[dataclasses.replace(one, seg_states=np.repeat(one.seg_states, next(counts), axis=0))]]

    counts = iter([1, 2, 1])
    monkeypatch.setattr(segmenter, "_generate", differs)
    found = dict(segmenter.run_from([2, 4, 1], range(6), Shown(6), [QUESTION]))
    assert {place for place, [result] in found.items() if result.propagated_from is None} == {1, 2}
    assert found[4][0].propagated_from == (1, 2)
    assert all(len(result.masks) == 1 for [result] in found.values())


@pytest.mark.parametrize("score", [-0.5, 0.0, 0.5])
def test_an_object_that_is_not_there_has_an_empty_mask(segmenter: CineSegmenter, monkeypatch: pytest.MonkeyPatch, score: float) -> None:
    """On frames that are tracked, and in their memories. The path of Sa2VA ignores the score."""
    session, remembered = segmenter._sessions["sam2_tracking_decoder"], []
    run, remember = session.run, segmenter._remembered

    def scored(*args: Any, **more: Any) -> Any:
        return {**run(*args, **more), "object_score": np.array([score], np.float32)}

    def spied(features: Any, prediction: Any, ms: Any) -> Any:
        remembered.append(prediction["low_res_logits"].max() <= -1024)
        return remember(features, prediction, ms)

    monkeypatch.setattr(session, "run", scored)
    monkeypatch.setattr(segmenter, "_remembered", spied)
    found = dict(segmenter.run_from([1], range(3), Shown(3), [QUESTION]))
    assert remembered == [False, score <= 0, score <= 0]
    assert found[1][0].masks[0].area > 0
    if score <= 0:
        assert [found[place][0].masks[0].area for place in (0, 2)] == [0, 0]
    list(segmenter.segment_cine(drawn_cine(6), QUESTION))
    assert remembered[3:] == [False] * 6


def test_a_score_that_denies_the_mask_of_an_answer_empties_none(segmenter: CineSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **more: {**run(*args, **more), "object_score": np.array([-0.5], np.float32)}

    for name in ("sam2_mask_decoder", "sam2_tracking_decoder"):
        monkeypatch.setattr(segmenter._sessions[name], "run", denied(segmenter._sessions[name].run))
    found = dict(segmenter.run_from([1], range(3), Shown(3), [QUESTION]))
    assert all(result.masks[0].area > 0 for [result] in found.values())


def test_what_it_refuses(segmenter: CineSegmenter, standin: Bundle) -> None:
    with pytest.raises(VesselError, match="without frames"):
        list(segmenter.segment_cine([], QUESTION))
    with pytest.raises(VesselError, match="empty"):
        list(segmenter.segment_cine(drawn_cine(1), " "))
    states = np.zeros((1, segmenter._bundle.language_model.hidden_size), np.float32)
    [memory] = segmenter.condition(segmenter.prepare_frame(drawn_cine(1)[0], 9), states).memories
    many = [dict.fromkeys(range(MOST_CONDITIONING + 1), memory)]
    with pytest.raises(VesselError, match=str(MOST_CONDITIONING)):
        next(segmenter.propagate(many, []))
    with pytest.raises(BundleError, match="older version"):
        CineSegmenter(deploy(standin, Device("cpu")))


def test_single_frames_do_not_load_the_graphs_of_cines(fp32_bundle: Path) -> None:
    with Segmenter(deploy(Bundle.load(fp32_bundle), Device("cpu"))) as alone:
        assert alone._sessions.keys() == alone._bundle.stages.keys()

"""Tracking in the runtime: what is run for each frame, what is kept, and which bundles can do it. Parity: tests/export/parity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
    assert len(read) == 6


def test_a_frame_that_cannot_be_read_ends_the_cine(segmenter: CineSegmenter) -> None:
    def frames() -> Iterator[Image.Image]:
        yield from drawn_cine(6)
        raise ImageError("damaged")

    results = segmenter.segment_cine(frames(), QUESTION)
    assert len([next(results) for _ in range(6)]) == 6
    with pytest.raises(ImageError, match="damaged"):
        next(results)


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

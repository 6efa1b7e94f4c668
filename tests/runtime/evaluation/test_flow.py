"""Masks that move with the optical flow of drawn frames whose motion is known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter

from vessel_rt.evaluation.cines import CineScores
from vessel_rt.evaluation.flow import SIDE, Shown, Warp, load_warp
from vessel_rt.evaluation.metrics import iou

pytest.importorskip("skimage", reason="the extra `evaluate` is not installed")


@pytest.fixture(scope="module")
def warp() -> Warp:
    return load_warp()


def scene(width: int, height: int, right: float, down: float) -> tuple[Image.Image, npt.NDArray[np.bool_]]:
    """Clouds, moved by so many pixels, and a mask that moves with them."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2 * height, 2 * width), dtype=np.uint8))
    clouds = np.asarray(noise.filter(ImageFilter.GaussianBlur(width / 30)), np.float32)
    clouds = (clouds - clouds.min()) * (255 / np.ptp(clouds))
    moved = Image.fromarray(clouds).transform(
        (width, height), Image.Transform.AFFINE, (1, 0, width / 2 - right, 0, 1, height / 2 - down), Image.Resampling.BILINEAR
    )
    rows, columns = np.indices((height, width))
    mask = (abs(columns - right - width / 2) < width / 20) & (abs(rows - down - height / 2) < height / 4)
    return moved.convert("L"), mask


@pytest.mark.parametrize(("width", "height"), [(160, 120), (600, 400)])
def test_a_mask_moves_with_what_is_seen(warp: Warp, width: int, height: int) -> None:
    """Also if the frame is larger than the images of the flow."""
    (before, mask), (now, truth) = scene(width, height, 0, 0), scene(width, height, width / 50, -height / 60)
    moved = warp(mask, Shown.of(before), Shown.of(now))
    assert moved.shape == (height, width)
    assert iou(mask, truth) < 0.7 < 0.93 < iou(moved, truth)


def test_frames_are_reduced() -> None:
    shown = Shown.of(Image.new("RGB", (1024, 512), (255, 0, 0)))
    assert shown.gray.shape == (SIDE // 2, SIDE)
    assert shown.gray.dtype == np.float32
    assert 0 < shown.gray.max() < 1
    assert Shown.of(Image.new("L", (50, 5))).gray.shape == (5, 50)


def test_the_flow_of_a_pair_is_computed_once() -> None:
    pairs = []

    def still(now: npt.NDArray[np.float32], before: npt.NDArray[np.float32], **_: object) -> npt.NDArray[np.float32]:
        pairs.append((before[0, 0], now[0, 0]))
        return np.zeros((2, *now.shape), np.float32)

    warp = Warp(still, lambda mask, places, **_: mask)
    frames = [Shown(np.full((4, 4), value, np.float32)) for value in range(3)]
    scores, mask = CineScores(warp), np.ones((4, 4), np.bool_)
    for frame in frames:
        for concept in ("vessel", "catheter"):
            scores.add("a", "a.dcm", "Where?", concept, mask, mask, frame)
    assert pairs == [(0, 1), (1, 2)]
    assert [score.warped_stability for score in scores.scores()] == [1, 1]


def test_stability_of_a_vessel_that_moves(warp: Warp) -> None:
    """Predictions that follow the vessel are steady once motion is taken out; one that flickers is not."""
    scores = CineScores(warp)
    for place in range(4):
        image, mask = scene(160, 120, 3 * place, place)
        shown = Shown.of(image)
        scores.add("a", "a.dcm", "Where?", "vessel", mask, mask, shown)
        scores.add("a", "a.dcm", "Where?", "catheter", mask if place % 2 else np.roll(mask, 9, 1), mask, shown)
    vessel, catheter = scores.scores()
    assert vessel.stability < 0.75 < 0.93 < vessel.warped_stability == vessel.true_warped_stability
    assert catheter.warped_stability < 0.5 < catheter.true_warped_stability

"""The measure of contrast on cines of known contrast, and which frames it chooses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from tests.support.paths import ROOT
from vessel_rt.inputs.dicom import frame_count, read_dicom
from vessel_rt.inputs.images import read_levels
from vessel_rt.model.contrast import SIDE, choose_frames, contrast_of, reduced

TINY = ROOT / "examples" / "tiny"
Gray = npt.NDArray[np.uint8]


@pytest.mark.parametrize("code", ["S0101", "S0102"])
def test_the_generated_cines(code: str) -> None:
    """The chosen frames are filled as the ground truth says; the first frames have no contrast agent."""
    path = TINY / "cines" / f"{code}.dcm"
    count = frame_count(path) or 0
    areas = np.array([np.count_nonzero(read_levels(TINY / "cines" / "vessel" / f"{code}.tif", page)) for page in range(count)])
    contrast = contrast_of(reduced(read_dicom(path, number)) for number in range(count))
    chosen = choose_frames(contrast)
    assert len(chosen) > 1
    assert (areas[chosen] > 0.8 * areas.max()).all()
    assert areas[chosen[0]] > 0.9 * areas.max()
    assert contrast[areas == 0].max() < contrast[chosen].min()


def drawn(filled: float, place: int, *, collimator: bool = False, text: bool = False) -> Gray:
    """A frame of 512 pixels with a catheter and ribs that are always there, noise, and a vessel of which `filled` is there."""
    rng = np.random.default_rng(place)
    picture = Image.new("L", (512, 512), 150)
    draw = ImageDraw.Draw(picture)
    for y in (100, 300):
        draw.line((0, y, 511, y + 60), fill=120, width=12)
    draw.line((50, 0, 200, 200), fill=60, width=8)
    draw.line((200, 200, 200 + int(250 * filled), 200 + int(200 * filled)), fill=90, width=14)
    gray = np.asarray(picture) + rng.normal(0, 5, (512, 512))
    if collimator:
        gray[:, :120] = gray[400:] = 8
    picture = Image.fromarray(np.clip(gray, 0, 255).astype(np.uint8))
    if text:
        ImageDraw.Draw(picture).text((380, 460), f"{place:03} 17:0{place % 10}", fill=255, font_size=28)
    return np.asarray(picture)


@pytest.mark.parametrize("disturbed", [{}, {"collimator": True}, {"text": True}, {"collimator": True, "text": True}])
def test_contrast_follows_the_vessel(disturbed: dict[str, bool]) -> None:
    """Not the collimator, the catheter, ribs or changing digits."""
    filled = [0] * 6 + [0.3, 0.6, 0.9] + [1] * 8 + [0.8, 0.4] + [0] * 6
    contrast = contrast_of(reduced(Image.fromarray(drawn(share, place, **disturbed))) for place, share in enumerate(filled))
    assert all(filled[place] == 1 for place in choose_frames(contrast))
    assert np.corrcoef(contrast, filled)[0, 1] > 0.9


def test_frames_that_do_not_change() -> None:
    assert contrast_of([reduced(Image.fromarray(drawn(1, 0)))] * 3).tolist() == [0, 0, 0]
    assert contrast_of([reduced(Image.fromarray(drawn(1, 0)))]).tolist() == [0]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 40])
def test_each_frame_has_a_contrast(count: int) -> None:
    """Also cines that are shorter than the smoothing."""
    frames = np.full((count, 8, 8), 100, np.uint8)
    frames[-1, 4] = 20  # the vessel is on the last frame only
    contrast = contrast_of(frames)
    assert contrast.shape == (count,)
    assert (count == 1) == (contrast[-1] == 0)
    assert contrast.argmax() == count - 1


def test_frames_are_reduced_to_one_size() -> None:
    assert reduced(Image.new("RGB", (1024, 512))).shape == (SIDE // 2, SIDE)
    assert reduced(Image.new("RGB", (300, 5)), (SIDE, 64)).shape == (64, SIDE)
    assert reduced(Image.new("RGB", (8000, 1))).shape == (1, SIDE)


@pytest.mark.parametrize(
    ("contrast", "chosen"),
    [
        ([3], [0]),
        ([0, 0, 5, 0], [2]),
        ([1] * 4, [0]),
        ([1] * 30, [0, 29, 14]),
        ([0] * 10 + [9] * 8 + [10] + [9] * 9 + [0] * 5, [18, 27, 10]),
        ([0, 9, 0, 0, 0, 0, 0, 0, 10, 0], [8]),  # a gap between them
        ([0] * 5 + [8, 8, 10, 8, 8, 8, 8], [7]),  # too near
    ],
)
def test_what_is_chosen(contrast: list[float], chosen: list[int]) -> None:
    """The best first; then the farthest in the filled part around it, at least 6 frames apart."""
    assert choose_frames(contrast) == chosen

"""Against MONAI and scikit-image, which the runtime does not need."""

from __future__ import annotations

import functools
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import skimage.morphology
import torch
from monai.metrics import ConfusionMatrixMetric, compute_dice, compute_hausdorff_distance, compute_iou
from PIL import Image
from scipy.ndimage import binary_dilation, gaussian_filter

from tests.support.paths import ROOT
from vessel_rt.evaluation import metrics
from vessel_rt.evaluation.ground_truth import read_truth
from vessel_rt.evaluation.metrics import (
    METRICS,
    bootstrap_interval,
    boundary_f,
    cldice,
    dice,
    hd95,
    iou,
    sensitivity,
    skeletonize,
    specificity,
)

NOTHING = np.zeros((40, 60), np.bool_)
ALL = np.ones((40, 60), np.bool_)


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = NOTHING.copy()
    mask[y0:y1, x0:x1] = True
    return mask


@functools.cache
def shapes() -> list[np.ndarray]:
    """Blobs of all sizes that touch the borders, noise, single pixels and lines, and the vessels of the example's frames."""
    rng = np.random.default_rng(0)
    found = [box(0, 0, 1, 1), box(59, 39, 60, 40), box(0, 0, 60, 1), box(20, 0, 22, 40), ALL, ~box(10, 10, 12, 12)]
    for _ in range(60):
        height, width = rng.integers(5, 150, 2)
        found.append(gaussian_filter(rng.standard_normal((height, width)), rng.uniform(0.3, 6)) > rng.uniform(-0.02, 0.05))
    truth = read_truth(ROOT / "examples" / "tiny" / "annotations.json")
    for path in sorted((ROOT / "examples" / "tiny" / "frames").iterdir())[:2]:
        mask = truth.mask({"name": path.stem, "height": 512, "width": 512}, "vessel")
        assert mask is not None
        found.append(mask)
    return [mask for mask in found if mask.any()]


@functools.cache
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Each shape with itself moved, with itself and noise, and with another of its size."""
    rng = np.random.default_rng(1)
    made = []
    for mask in shapes():
        made.append((np.roll(mask, (2, -3), (0, 1)), mask))
        made.append((gaussian_filter(mask + 0.4 * rng.standard_normal(mask.shape), 1) > 0.5, mask))
        made.append((gaussian_filter(rng.standard_normal(mask.shape), 2) > 0.01, mask))
    return [(predicted, truth) for predicted, truth in made if predicted.any()]


def by_monai(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(mask))[None, None].float()


def test_overlaps_equal_monais() -> None:
    for predicted, truth in pairs():
        p, t = by_monai(predicted), by_monai(truth)
        assert dice(predicted, truth) == pytest.approx(compute_dice(p, t).item(), abs=1e-6)  # float32 there
        assert iou(predicted, truth) == pytest.approx(compute_iou(p, t).item(), abs=1e-6)
        for ours, name in ((sensitivity, "sensitivity"), (specificity, "specificity")):
            metric = ConfusionMatrixMetric(metric_name=name)
            metric(p, t)
            theirs = metric.aggregate()[0].item()
            if not math.isnan(ours(predicted, truth)):  # where it is not defined, MONAI's aggregate says 0
                assert ours(predicted, truth) == pytest.approx(theirs, abs=1e-6)


def davis_f(foreground: np.ndarray, gt: np.ndarray) -> float:
    """As f_measure in davis2017-evaluation: boundaries, which are made thicker with a disk."""
    reach = np.ceil(0.008 * np.linalg.norm(gt.shape))
    boundaries = []
    for mask in (foreground, gt):
        east, south, southeast = np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)
        east[:, :-1], south[:-1], southeast[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        boundary = (mask ^ east) | (mask ^ south) | (mask ^ southeast)
        boundary[-1] = mask[-1] ^ east[-1]
        boundary[:, -1] = mask[:, -1] ^ south[:, -1]
        boundary[-1, -1] = False
        boundaries.append(boundary)
    one, other = boundaries
    disk = skimage.morphology.disk(int(reach))
    near_other, near_one = binary_dilation(other, disk), binary_dilation(one, disk)
    if not one.any() and other.any():
        precision, recall = 1.0, 0.0
    elif one.any() and not other.any():
        precision, recall = 0.0, 1.0
    elif not one.any() and not other.any():
        precision, recall = 1.0, 1.0
    else:
        precision, recall = (one & near_other).sum() / one.sum(), (other & near_one).sum() / other.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def test_f_is_that_of_davis() -> None:
    for predicted, truth in pairs():
        assert boundary_f(predicted, truth) == pytest.approx(davis_f(predicted, truth), abs=1e-12)
    for predicted, truth in ((NOTHING, NOTHING), (NOTHING, box(3, 3, 9, 9)), (box(3, 3, 9, 9), NOTHING), (ALL, NOTHING), (ALL, ALL)):
        assert boundary_f(predicted, truth) == davis_f(predicted, truth)


def test_hd95_equals_monais() -> None:
    for predicted, truth in pairs():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI's own, of masks that are everything
            theirs = compute_hausdorff_distance(by_monai(predicted), by_monai(truth), include_background=True, percentile=95).item()
        assert hd95(predicted, truth) == pytest.approx(theirs, abs=1e-3)  # there, the rank to interpolate at is float32


@pytest.mark.parametrize("order", ["C", "F"])
def test_skeletons_equal_scikit_images(order: str) -> None:
    for mask in shapes():
        np.testing.assert_array_equal(skeletonize(np.array(mask, order=order)), skimage.morphology.skeletonize(mask))  # type: ignore[call-overload]


def test_every_neighbourhood_is_decided_as_in_scikit_image() -> None:
    """A pixel with each of the 256 neighbourhoods, alone and among noise."""
    rng = np.random.default_rng(2)
    for code in range(256):
        ring = [bool(code >> place & 1) for place in range(8)]
        for surroundings in range(40):
            mask = rng.random((9, 9)) < rng.uniform(0, 0.9) if surroundings else np.zeros((9, 9), np.bool_)
            mask[3:6, 3:6] = np.array([*ring[:4], True, *ring[4:]]).reshape(3, 3)
            np.testing.assert_array_equal(skeletonize(mask), skimage.morphology.skeletonize(mask))


def authors_cldice(predicted: np.ndarray, truth: np.ndarray) -> float:
    """As its authors' code has it, for masks that are not empty."""
    found = (predicted & skimage.morphology.skeletonize(truth)).sum() / skimage.morphology.skeletonize(truth).sum()
    precision = (truth & skimage.morphology.skeletonize(predicted)).sum() / skimage.morphology.skeletonize(predicted).sum()
    return float(2 * precision * found / (precision + found)) if precision + found else 0.0


def test_cldice_is_its_authors() -> None:
    for predicted, truth in pairs():
        assert cldice(predicted, truth) == pytest.approx(authors_cldice(predicted, truth), abs=1e-12)


DATA = Path(os.environ.get("VESSEL_DATA", ROOT.parent / "shared" / "data")) / "angiograms"


@pytest.mark.skipif(not DATA.is_dir(), reason="the angiograms of VESSEL_DATA are not here")
def test_cldice_of_vessels_drawn_by_hand_is_its_authors() -> None:
    rng = np.random.default_rng(3)
    for path in sorted(DATA.glob("*_gt.png"))[:10]:
        with Image.open(path) as image:
            truth = np.asarray(image.convert("L")) > 127
        predicted = gaussian_filter(truth + 0.6 * rng.standard_normal(truth.shape), 1) > 0.5
        assert cldice(predicted, truth) == pytest.approx(authors_cldice(predicted, truth), abs=1e-12)


def test_cldice_looks_at_lines_not_at_widths() -> None:
    thick, thinner, broken = box(5, 10, 55, 17), box(5, 12, 55, 15), box(5, 10, 55, 17) & ~box(25, 0, 35, 40)
    assert cldice(thinner, thick) == 1
    assert dice(thinner, thick) < 0.7
    assert cldice(broken, thick) < 0.95


def test_values_that_can_be_counted_by_hand() -> None:
    left, right = box(0, 0, 10, 10), box(5, 0, 15, 10)
    assert (dice(left, right), iou(left, right)) == (0.5, 1 / 3)
    assert (sensitivity(left, right), specificity(left, right)) == (0.5, 1 - 50 / 2300)
    assert hd95(left, left) == 0
    assert hd95(box(0, 0, 1, 1), box(3, 4, 4, 5)) == 5


def test_empty_masks() -> None:
    some = box(0, 0, 5, 5)
    assert [METRICS[name](NOTHING, NOTHING) for name in ("dice", "iou", "cldice", "hd95")] == [1, 1, 1, 0]
    assert [METRICS[name](some, NOTHING) for name in ("dice", "iou", "cldice")] == [0, 0, 0]
    assert [METRICS[name](NOTHING, some) for name in ("dice", "iou", "cldice", "sensitivity")] == [0, 0, 0, 0]
    assert math.isnan(hd95(some, NOTHING))
    assert math.isnan(hd95(NOTHING, some))
    assert math.isnan(sensitivity(some, NOTHING))
    assert math.isnan(specificity(some, ALL))


def test_the_interval_of_a_mean() -> None:
    values = list(np.random.default_rng(0).normal(0.8, 0.1, 400))
    low, high = bootstrap_interval(values)  # type: ignore[misc]
    assert low < np.mean(values) < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 20, rel=0.05)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)
    assert bootstrap_interval([0.5]) is bootstrap_interval([]) is None


def test_many_images_do_not_take_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.random.default_rng(0).random(50))
    whole = bootstrap_interval(values)
    monkeypatch.setattr(metrics, "_AT_ONCE", 1000)
    assert bootstrap_interval(values) == whole

"""What the model sees of an image, and where training images come from.

Preprocessing follows Sa2VA's inference code (modeling_sa2va_chat.py: dynamic_preprocess, DirectResize): the language model sees tiles of
448 px and a thumbnail, SAM2 sees the whole image resized without its aspect.
"""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generator import CONCEPTS, Frame, generate, generate_cine
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor

__all__ = [
    "HELD_OUT",
    "MASK_SIDE",
    "Pool",
    "Sample",
    "cine_pool",
    "compressed",
    "generated_pool",
    "mask_pixels",
    "rasterize",
    "read_real",
    "simplified",
    "tile_pixels",
    "warp",
]

HELD_OUT = (5, 10, 15, 20, 25, 30, 35, 40)
"""Numbers of the real frames that no training sees: every fifth."""

MASK_SIDE = 256
"""Side of the masks that losses are taken on, in pixels: twice SAM2's low-res mask, because vessels are thin."""

_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training image: `gray` uint8 [side, side] as SAM2 sees it, `masks` float32 [concepts, MASK_SIDE, MASK_SIDE] (the share of each
    cell that is covered), and what questions about it can ask. `annotated` tells which concepts somebody looked for."""

    gray: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    annotated: tuple[bool, ...]
    root: tuple[float, float]
    subtracted: bool


Pool = Sequence[Sample]


def _normalize(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    return (pixels - _MEAN) / _STD


def mask_pixels(image: Image.Image, side: int) -> Tensor:
    """SAM2's view of an RGB image: float32 [3, side, side]."""
    return _normalize(image.convert("RGB").resize((side, side)))


def _grid(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """Columns and rows of tiles: the ratio closest to the image's; of equal ones the larger if the image has half its area."""
    grids = sorted({(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most}, key=lambda g: g[0] * g[1])
    best, least = (1, 1), float("inf")
    for columns, rows in grids:
        difference = abs(width / height - columns / rows)
        if difference < least or (difference == least and width * height > 0.5 * side * side * columns * rows):
            best, least = (columns, rows), difference
    return best


def tile_pixels(image: Image.Image, side: int = 448, most: int = 12) -> Tensor:
    """The language model's view of an image: float32 [tiles, 3, side, side], the thumbnail last when there is more than one tile."""
    image = image.convert("RGB")
    columns, rows = _grid(image.width, image.height, side, most)
    resized = image.resize((side * columns, side * rows))
    tiles = [resized.crop((c * side, r * side, (c + 1) * side, (r + 1) * side)) for r in range(rows) for c in range(columns)]
    if len(tiles) > 1:
        tiles.append(image.resize((side, side)))
    return torch.stack([_normalize(tile) for tile in tiles])


def rasterize(polygons: list[list[float]], height: int, width: int) -> NDArray[np.uint8]:
    """The union of polygons as uint8 [height, width] of 0 and 1, by pycocotools as in Sa2VA's finetune dataset."""
    if not polygons:
        return np.zeros((height, width), dtype=np.uint8)
    mask: NDArray[np.uint8] = coco.decode(coco.merge(coco.frPyObjects(polygons, height, width)))
    return mask


def simplified(polygon: list[float], height: int, width: int) -> list[float]:
    """The polygon without the vertices that no pixel of its mask depends on."""
    kept, mask, place = list(zip(polygon[::2], polygon[1::2], strict=True)), rasterize([polygon], height, width), 0
    while place < len(kept) and len(kept) > 3:
        fewer = kept[:place] + kept[place + 1 :]
        if np.array_equal(rasterize([[value for vertex in fewer for value in vertex]], height, width), mask):
            kept = fewer
        else:
            place += 1
    return [value for vertex in kept for value in vertex]


def _coverage(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(mask * 255).resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BOX))


def _sample(frame: Frame, side: int) -> Sample:
    height, width = frame.image.shape
    gray = np.asarray(Image.fromarray(frame.image).resize((side, side)))
    masks = np.stack([_coverage(rasterize(frame.polygons[name], height, width)) for name in CONCEPTS])
    return Sample(gray, masks, (True,) * len(CONCEPTS), frame.root, frame.subtracted)


def _generate(task: tuple[int, int, int]) -> Sample:
    """One sample of the pool: half of the frames as coarse as the real ones (300 px), the rest up to SAM2's own size."""
    seed, index, side = task
    rng = np.random.default_rng([seed, 0, index])
    short = 300 if rng.random() < 0.55 else int(rng.integers(280, side + 1))
    ratio = 1.0 if rng.random() < 0.75 else float(rng.uniform(0.75, 1.33))
    while True:
        frame = generate(rng, max(short, int(short / ratio)), max(short, int(short * ratio)))
        sample = _sample(frame, side)
        if sample.masks[0].mean() > 255 * 0.01:
            return sample


def generated_pool(seed: int, count: int, side: int, processes: int) -> Pool:
    """`count` generated frames with their masks, the same for the same seed."""
    with multiprocessing.get_context("spawn").Pool(processes) as workers:
        return workers.map(_generate, [(seed, index, side) for index in range(count)], chunksize=16)


def compressed(rng: np.random.Generator, frames: list[Image.Image]) -> list[Image.Image]:
    """The frames of a cine after JPEG, JPEG 2000 or nothing, all of them at the same quality."""
    options: dict[str, Any] = {"format": "JPEG", "quality": int(rng.integers(25, 95))}
    if rng.random() < 0.5:
        options = {"format": "JPEG2000", "irreversible": True, "quality_mode": "rates", "quality_layers": [float(rng.uniform(8, 80))]}
    if rng.random() < 0.2:
        return frames
    streams = [io.BytesIO() for _ in frames]
    for frame, stream in zip(frames, streams, strict=True):
        frame.save(stream, **options)
    return [Image.open(stream) for stream in streams]


def _cine_samples(task: tuple[int, int, int]) -> list[Sample]:
    """Six frames of a cine, as coarse as those that SAM2's memory learns from: two without vessels, and four of the others."""
    seed, index, side = task
    rng = np.random.default_rng([seed, 6, index])
    short = 300 if rng.random() < 0.5 else int(rng.integers(300, 420))
    frames = generate_cine(rng, 24, short, short, f"S{index:04d}")
    empty = [place for place, frame in enumerate(frames) if not frame.polygons["vessel"]]
    filled = [place for place, frame in enumerate(frames) if frame.polygons["vessel"]]
    chosen = [*rng.choice(empty, min(2, len(empty)), replace=False), *rng.choice(filled, 4, replace=False)]
    images = compressed(rng, [Image.fromarray(frames[place].image) for place in chosen])
    shown = [dataclasses.replace(frames[place], image=np.asarray(image)) for place, image in zip(chosen, images, strict=True)]
    return [_sample(frame, side) for frame in shown]


def cine_pool(seed: int, count: int, side: int, processes: int) -> Pool:
    """Frames of `count` generated cines, a third of them from before the contrast: the same for the same seed."""
    with multiprocessing.get_context("spawn").Pool(processes) as workers:
        return [
            sample for samples in workers.map(_cine_samples, [(seed, i, side) for i in range(count)], chunksize=4) for sample in samples
        ]


def read_real(folder: Path, side: int) -> dict[int, Sample]:
    """The real frames N.png with N_gt.png of `folder`; only vessels are annotated there."""
    samples = {}
    for path in sorted(folder.glob("*_gt.png")):
        number = int(path.name.removesuffix("_gt.png"))
        mask = (np.asarray(Image.open(path).convert("L")) > 127).astype(np.uint8)
        gray = np.asarray(Image.open(folder / f"{number}.png").convert("L").resize((side, side)))
        masks = np.stack([_coverage(mask), np.zeros((MASK_SIDE, MASK_SIDE), np.uint8)])
        samples[number] = Sample(gray, masks, (True, False), (0.0, 0.0), False)
    return samples


def warp(
    rng: np.random.Generator, sample: Sample, turn: float, zoom: float, stretch: float = 1.0
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The sample flipped, turned by up to `turn` degrees, zoomed by up to a factor `zoom`, stretched one way by up to a factor `stretch`,
    with another tone: gray and masks (0 to 1)."""
    gray, masks = sample.gray.astype(np.float32), sample.masks.astype(np.float32) / 255
    if turn or zoom > 1:
        angle, factor = np.deg2rad(rng.uniform(-turn, turn)), zoom ** rng.uniform(-1, 1)
        matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / factor
        if stretch > 1:
            matrix = matrix @ np.diag([stretch ** rng.uniform(-1, 1), 1])
        centre = rng.uniform(0.4, 0.6, 2)
        gray = _affine(gray, matrix, centre, "nearest")
        masks = np.stack([_affine(mask, matrix, centre, "constant") for mask in masks])
    quarter, flip = int(rng.integers(4)), bool(rng.integers(2))
    gray, masks = np.rot90(gray, quarter), np.rot90(masks, quarter, axes=(1, 2))
    if flip:
        gray, masks = gray[:, ::-1], masks[:, :, ::-1]
    gray = 255 * (np.clip(gray, 0, 255) / 255) ** np.exp(rng.uniform(-0.35, 0.35))
    gray = (gray - 128) * rng.uniform(0.75, 1.3) + 128 + rng.uniform(-25, 25)
    return np.clip(np.rint(gray), 0, 255).astype(np.uint8), np.ascontiguousarray(masks)


def _affine(image: NDArray[np.float32], matrix: NDArray[np.float64], centre: NDArray[np.float64], mode: str) -> NDArray[np.float32]:
    side = image.shape[0]
    offset = centre * side - matrix @ np.array([side / 2, side / 2])
    warped: NDArray[np.float32] = ndimage.affine_transform(image, matrix, offset, order=1, mode=mode)
    return warped

"""Animations: what Pillow reads back, and their bounds."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from vessel_rt.results.animation import MOST_FRAMES, write_animation


def written(pictures: list[Image.Image], durations: list[float]) -> Image.Image:
    file = io.BytesIO(b"before")
    file.seek(6)
    write_animation(file, pictures.__getitem__, durations)
    assert file.tell() == len(file.getvalue())
    return Image.open(io.BytesIO(file.getvalue()[6:]), formats=("WEBP",))


def gray(level: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def test_frames_and_their_durations() -> None:
    animation = written([gray(level) for level in (0, 100, 200)], [40, 66.6, 500])
    assert (animation.format, animation.size, animation.n_frames, animation.info["loop"]) == ("WEBP", (64, 48), 3, 0)  # type: ignore[attr-defined]
    ends = []
    for number, level in enumerate((0, 100, 200)):
        animation.seek(number)
        assert np.abs(np.asarray(animation.convert("L")).astype(int) - level).max() < 5
        ends.append(animation.info["timestamp"] + animation.info["duration"])
    assert ends == [40, 107, 607]


def test_pictures_become_small_and_of_one_size() -> None:
    animation = written([gray(50, (1024, 768)), gray(90, (30, 20))], [66.0] * 2)
    assert animation.size == (512, 384)
    animation.seek(1)
    assert np.abs(np.asarray(animation.convert("L")).astype(int) - 90).max() < 5
    assert written([gray(50, (2000, 1))] * 2, [66.0] * 2).size == (512, 1)


def test_a_long_cine_is_thinned() -> None:
    asked: list[int] = []

    def picture(number: int) -> Image.Image:
        asked.append(number)
        return gray(number % 256, (8, 8))

    file = io.BytesIO()
    write_animation(file, picture, [10.0] * (2 * MOST_FRAMES + 1))
    animation = Image.open(io.BytesIO(file.getvalue()))
    assert animation.n_frames == 201  # type: ignore[attr-defined]
    assert max(asked) == 600
    animation.load()
    assert animation.info["duration"] == 30


def test_frames_that_compress_badly_lose_quality_and_size() -> None:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (512, 512, 3), np.uint8)) for _ in range(4)]
    file = io.BytesIO()
    write_animation(file, lambda number: noise[number % 4], [66.0] * 40)
    assert len(file.getvalue()) < 2_100_000
    assert max(Image.open(io.BytesIO(file.getvalue())).size) < 512

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vessel_rt.bundle import MaskSpec, TileSpec
from vessel_rt.errors import ImageError
from vessel_rt.image import MAX_SIDE, mask_pixels, read_image, tile_grid, tile_pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TILES = TileSpec(448, 1, 12, True, 256, MEAN, STD)
MASK = MaskSpec(1024, 256, MEAN, STD)

# One size for every grid, sizes at which the area rule decides, odd ones, and extremes.
SIZES = [(448 * columns, 448 * rows) for columns in range(1, 13) for rows in range(1, 13) if columns * rows <= 12]
SIZES += [(512, 512), (633, 634), (634, 634), (800, 800), (1024, 1024), (2000, 2000), (300, 300), (560, 448), (561, 448), (1120, 896)]
SIZES += [(641, 479), (479, 641), (1240, 1024), (777, 1333), (1000, 37), (1, 1), (1, 999), (999, 1)]


def random_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * 10_007 + height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalize(image: Image.Image) -> torch.Tensor:
    """torchvision's ToTensor and Normalize, written with the operations that torchvision calls."""
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return tensor.sub_(torch.tensor(MEAN).view(-1, 1, 1)).div_(torch.tensor(STD).view(-1, 1, 1))


def grid_by_the_book(width: int, height: int) -> tuple[int, int]:
    """InternVL's rule, step by step over the set of all grids."""
    grids: set[tuple[int, int]] = set()
    for n in range(1, 13):
        for i in range(1, n + 1):
            for j in range(1, n + 1):
                if 1 <= i * j <= 12:
                    grids.add((i, j))
    best, best_difference = (1, 1), float("inf")
    for grid in sorted(grids, key=lambda g: g[0] * g[1]):
        difference = abs(width / height - grid[0] / grid[1])
        if difference < best_difference:
            best, best_difference = grid, difference
        elif difference == best_difference and width * height > 0.5 * 448 * 448 * grid[0] * grid[1]:
            best = grid
    return best


def tiles_by_the_book(image: Image.Image) -> torch.Tensor:
    columns, rows = grid_by_the_book(*image.size)
    resized = image.resize((columns * 448, rows * 448))
    tiles = [resized.crop((x * 448, y * 448, x * 448 + 448, y * 448 + 448)) for y in range(rows) for x in range(columns)]
    if len(tiles) > 1:
        tiles.append(image.resize((448, 448)))
    return torch.stack([normalize(tile.resize((448, 448), Image.Resampling.BICUBIC)) for tile in tiles])


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_tiles_equal_the_transcription_to_the_bit(size: tuple[int, int]) -> None:
    image = random_image(*size)
    found, expected = tile_pixels(image, TILES), tiles_by_the_book(image).numpy()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_the_sizes_above_give_every_number_of_tiles() -> None:
    grids = {tile_grid(*size, TILES) for size in SIZES}
    assert {columns * rows for columns, rows in grids} == set(range(1, 13))
    assert tile_grid(512, 512, TILES) == (1, 1)
    assert tile_grid(1024, 1024, TILES) == (3, 3)


def test_grid_agrees_on_many_sizes() -> None:
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 3000, (3000, 2)).tolist():
        assert tile_grid(width, height, TILES) == grid_by_the_book(width, height)


def test_half_precision_is_the_rounded_float32() -> None:
    image = random_image(900, 460)
    np.testing.assert_array_equal(tile_pixels(image, TILES, np.float16), tile_pixels(image, TILES).astype(np.float16))


@pytest.mark.parametrize("size", [(512, 512), (641, 333), (1024, 1024), (2, 3)], ids=str)
def test_mask_pixels_equal_the_transcription_to_the_bit(size: tuple[int, int]) -> None:
    image = random_image(*size)
    expected = normalize(image.resize((1024, 1024)))[None].numpy()
    np.testing.assert_array_equal(mask_pixels(image, MASK), expected)


def saved(tmp_path: Path, image: Image.Image, name: str, **options: Any) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


GRAY = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.JPG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_reads_as_pillow_converts(tmp_path: Path, name: str, mode: str) -> None:
    path = saved(tmp_path, Image.fromarray(GRAY).convert(mode), name)
    image = read_image(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))


def test_sixteen_bit_gray_is_clipped_as_pillow_clips_it(tmp_path: Path) -> None:
    values = np.array([[0, 100, 255], [256, 4000, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        image = np.asarray(read_image(saved(tmp_path, Image.fromarray(values), name)))
        np.testing.assert_array_equal(image[..., 0], [[0, 100, 255], [255, 255, 255]])


def test_alpha_is_dropped(tmp_path: Path) -> None:
    rgba = np.full((4, 4, 4), 200, np.uint8)
    rgba[..., 3] = 0
    assert np.asarray(read_image(saved(tmp_path, Image.fromarray(rgba), "a.png"))).min() == 200
    la = np.full((4, 4, 2), 77, np.uint8)
    la[..., 1] = 10
    assert np.asarray(read_image(saved(tmp_path, Image.fromarray(la), "b.png"))).max() == 77


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert np.asarray(read_image(saved(tmp_path, image, "a.png"))).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_exif_rotation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert read_image(saved(tmp_path, Image.new("RGB", (20, 10)), "a.jpg", exif=exif)).size == (20, 10)


def test_the_first_page_is_taken(tmp_path: Path) -> None:
    pages = [Image.new("L", (3, 3), value) for value in (10, 20)]
    path = saved(tmp_path, pages[0], "a.tif", save_all=True, append_images=pages[1:])
    assert np.asarray(read_image(path)).max() == 10


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"Not an image at all.\n" * 20, "not a JPG, PNG, TIFF or BMP image"),
        (encoded(random_image(64, 64), "GIF"), "not a JPG, PNG, TIFF or BMP image"),
        (encoded(random_image(200, 200), "JPEG")[:9000], "cannot be decoded"),
        (encoded(random_image(200, 200), "PNG")[:9000], "cannot be decoded"),
        (encoded(random_image(200, 200), "TIFF")[:9000], "cannot be decoded|not a JPG"),
        (encoded(random_image(200, 200), "BMP")[:9000], "cannot be decoded"),
        (encoded(Image.new("L", (MAX_SIDE + 1, 1)), "PNG"), "too many"),
    ],
    ids=["empty", "text", "gif", "half jpg", "half png", "half tiff", "half bmp", "too wide"],
)
def test_bad_files_say_what_is_wrong_and_not_which_they_are(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    assert "bad" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="cannot be decoded"):
        read_image(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP"])
def test_damage_anywhere_is_an_image_error_or_an_image(tmp_path: Path, kind: str) -> None:
    content, rng = encoded(random_image(40, 30), kind), np.random.default_rng(0)
    path = tmp_path / "bad"
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(content), 400), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ImageError):
            assert read_image(path).mode == "RGB"

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from tests.support.image_files import png, tiff
from vessel_rt.errors import ImageError
from vessel_rt.formats.bundle import MaskSpec, TileSpec
from vessel_rt.inputs.images import MAX_SIDE, Rescale, page_count, read_image, read_levels
from vessel_rt.inputs.tiff import page_offsets
from vessel_rt.model.preprocess import mask_pixels, tile_grid, tile_pixels

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


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.JPG", "a.webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_reads_as_pillow_converts(tmp_path: Path, name: str, mode: str) -> None:
    path = saved(tmp_path, Image.fromarray(GRAY).convert(mode), name)
    image = read_image(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))


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


SIXTEEN = np.array([[0, 100, 255], [256, 4000, 65535]], np.uint16)


def deep_files(folder: Path) -> dict[str, tuple[Path, npt.NDArray[Any], bool]]:
    """Gray of more than 8 bits in every form that Pillow reads: the file, its values, and whether 0 is white."""
    kinds: dict[str, tuple[npt.NDArray[Any], dict[int, tuple[int, int]]]] = {
        "unsigned 16": (SIXTEEN, {}),
        "unsigned 16, white is zero": (SIXTEEN, {262: (3, 0)}),
        "signed 16": (SIXTEEN.view(np.int16), {339: (3, 2)}),
        "signed 8": (SIXTEEN.astype(np.uint8).view(np.int8), {339: (3, 2)}),
        "unsigned 32": (SIXTEEN.astype(np.uint32) * np.uint32(65537), {}),
        "signed 32": (SIXTEEN.astype(np.int32) - 9, {339: (3, 2)}),
        "float": ((SIXTEEN / 65535).astype(np.float32), {339: (3, 3)}),
    }
    files: dict[str, tuple[Path, npt.NDArray[Any], bool]] = {}
    for name, (values, tags) in kinds.items():
        (folder / f"{name}.tif").write_bytes(tiff(values, tags))
        files[name] = (folder / f"{name}.tif", values, "white" in name)
    files["PNG"] = (saved(folder, Image.fromarray(SIXTEEN), "deep.png"), SIXTEEN, False)
    files["LZW"] = (saved(folder, Image.fromarray(SIXTEEN), "lzw.tif", compression="tiff_lzw"), SIXTEEN, False)
    return files


def test_deep_gray_is_refused_with_the_depth_and_the_mend(tmp_path: Path) -> None:
    for name, (path, values, _) in deep_files(tmp_path).items():
        with pytest.raises(ImageError, match=rf"{8 * values.itemsize}-bit .*gray.*--rescale") as caught:
            read_image(path)
        assert ("floating-point" in str(caught.value), "signed" in str(caught.value)) == (name == "float", values.dtype.kind == "i"), name


def test_deep_gray_is_scaled_from_the_files_own_range_when_asked_for(tmp_path: Path) -> None:
    for name, (path, values, white_is_zero) in deep_files(tmp_path).items():
        exact = values.astype(np.float64)
        expected = np.rint((exact - exact.min()) / (exact.max() - exact.min()) * 255)
        found = np.asarray(read_image(path, rescale=Rescale()))
        np.testing.assert_array_equal(found, np.repeat((255 - expected if white_is_zero else expected)[..., None], 3, axis=2), err_msg=name)


def test_deep_gray_is_scaled_by_a_window_when_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(SIXTEEN), "a.png")
    assert np.asarray(read_image(path, rescale=Rescale(100, 4000)))[..., 0].tolist() == [[0, 0, 10], [10, 255, 255]]
    white_is_zero = deep_files(tmp_path)["unsigned 16, white is zero"][0]
    assert np.asarray(read_image(white_is_zero, rescale=Rescale(100, 4000)))[..., 0].tolist() == [[255, 255, 245], [245, 0, 0]]


def test_a_deep_picture_of_one_gray_is_black(tmp_path: Path) -> None:
    assert not np.asarray(read_image(saved(tmp_path, Image.fromarray(np.full((3, 4), 777, np.uint16)), "a.png"), rescale=Rescale())).any()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rescale", [Rescale(), Rescale(0, 1)])
def test_what_is_no_finite_number_is_not_scaled(tmp_path: Path, odd: float, rescale: Rescale) -> None:
    with pytest.raises(ImageError, match="not finite"):
        read_image(saved(tmp_path, Image.fromarray(np.array([[0, odd, 1]], np.float32)), "a.tif"), rescale=rescale)


def test_the_range_is_of_all_pages(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.array([values], np.uint16)) for values in ([100, 200, 300], [1000, 1100, 4000])]
    path = saved(tmp_path, pages[0], "a.tif", save_all=True, append_images=pages[1:])
    found = [np.asarray(read_image(path, page, Rescale()))[0, :, 0].tolist() for page in (1, 0)]
    assert found == [[59, 65, 255], [0, 7, 13]]


def test_a_page_that_cannot_be_read_leaves_no_range(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((2, 2), value, np.float32)) for value in (1, np.nan)]
    path = saved(tmp_path, pages[0], "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ImageError, match=r"page 1 .*not finite"):
        read_image(path, 0, Rescale())
    assert read_image(path, 0, Rescale(0, 2)).getpixel((0, 0)) == (128, 128, 128)


def test_rescaling_leaves_eight_bits_as_they_are(tmp_path: Path) -> None:
    for name in ("a.png", "a.tif", "a.bmp"):
        path = saved(tmp_path, Image.fromarray(GRAY // 2 + 9), name)
        np.testing.assert_array_equal(np.asarray(read_image(path, rescale=Rescale(0, 9)))[..., 0], GRAY // 2 + 9)


@pytest.mark.parametrize("rescale", [None, Rescale(), Rescale(0, 4095)])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_deep_colours_are_refused(tmp_path: Path, channels: int, rescale: Rescale | None) -> None:
    (tmp_path / "a.png").write_bytes(png(np.full((2, 3, channels), 0x1234, np.uint16)))
    assert Image.open(tmp_path / "a.png").mode in ("RGB", "RGBA")  # of 8 bits, as Pillow has it
    with pytest.raises(ImageError, match=r"16-bit colour.*convert it to 8 bits"):
        read_image(tmp_path / "a.png", rescale=rescale)


def test_deep_colours_of_a_tiff_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(np.full((2, 3, 3), 0x1234, np.uint16), {262: (3, 2), 277: (3, 3)}))
    assert Image.open(tmp_path / "a.tif").mode == "RGB"
    with pytest.raises(ImageError, match=r"16-bit colour.*convert it to 8 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fewer_bits_are_expanded(tmp_path: Path, bits: int) -> None:
    levels = np.arange(2**bits)[None]
    (tmp_path / "a.png").write_bytes(png(levels, bits))
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 0], levels * 255 // (2**bits - 1))


@pytest.mark.parametrize("text", ["", "0:4095", "-1000:1000", "0.5:1e3"])
def test_a_window_is_parsed(text: str) -> None:
    rescale = Rescale.parse(text)
    assert [rescale.low, rescale.high] == ([float(end) for end in text.split(":")] if text else [None, None])


@pytest.mark.parametrize("text", ["1", "a:b", "5:5", "9:1", "nan:1", "0:inf", "-1e308:1e308", "1:2:3", ":", "frames/"])
def test_what_is_no_window_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="LOW:HIGH"):
        Rescale.parse(text)


def many_pages(path: Path, count: int, **options: Any) -> Path:
    pages = [Image.new("L", (3, 3), value) for value in range(count)]
    pages[0].save(path, save_all=True, append_images=pages[1:], **options)
    return path


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"big_tiff": True}], ids=str)
def test_pages_are_read_by_their_numbers_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    path = many_pages(tmp_path / "a.tif", 12, **options)
    assert page_count(path) == 12
    for page in (7, 0, 11, 3):
        assert np.unique(np.asarray(read_image(path, page))).tolist() == [page]
    with pytest.raises(ImageError, match=r"12 pages.*--frames"):
        read_image(path)
    with pytest.raises(ImageError, match="it has 12 pages and no page 12"):
        read_image(path, 12)


def test_only_a_tiff_with_several_pages_has_a_number_of_pages(tmp_path: Path) -> None:
    for name in ("a.tif", "a.png", "a.jpg", "a.bmp", "a.webp"):
        assert page_count(saved(tmp_path, Image.new("L", (3, 3)), name)) is None
    (tmp_path / "b.tif").write_bytes(b"")
    assert page_count(tmp_path / "b.tif") is None


def test_several_pictures_of_other_kinds_are_refused(tmp_path: Path) -> None:
    more = [Image.new("RGB", (3, 3), "red"), Image.new("RGB", (3, 3), "blue")]
    for name, kind in (("a.png", "PNG"), ("a.jpg", "MPO"), ("a.webp", "WEBP")):
        saved(tmp_path, Image.new("RGB", (3, 3)), name, format=kind, save_all=True, append_images=more)
        for page in (None, 0, 2):
            with pytest.raises(ImageError, match=f"3 images in one {kind} file|it has 1 pages and no page 2"):
                read_image(tmp_path / name, page)


@pytest.mark.parametrize("to", ["itself", "the first", "beyond", "far beyond"])
def test_a_broken_list_of_pages_is_damage(tmp_path: Path, to: str) -> None:
    path = many_pages(tmp_path / "a.tif", 3)
    first, second = page_offsets(path)[:2]
    content = bytearray(path.read_bytes())
    entries = int.from_bytes(content[second : second + 2], "little")
    pointer = {"itself": second, "the first": first, "beyond": len(content), "far beyond": 2**32 - 1}[to]
    content[second + 2 + 12 * entries : second + 6 + 12 * entries] = pointer.to_bytes(4, "little")
    path.write_bytes(content)
    for read in (lambda: page_count(path), lambda: read_image(path), lambda: read_image(path, 0)):
        with pytest.raises(ImageError, match="damaged: the list of its pages"):
            read()


def test_levels_for_masks_are_those_of_the_file(tmp_path: Path) -> None:
    for name, (path, values, white_is_zero) in deep_files(tmp_path).items():
        expected = values.max() - values.astype(np.float64) if white_is_zero else values
        np.testing.assert_array_equal(read_levels(path), expected, err_msg=name)
    (tmp_path / "rgb.png").write_bytes(png(np.full((2, 3, 3), 0x1234, np.uint16)))
    assert np.unique(read_levels(tmp_path / "rgb.png")).tolist() == [0x12]
    np.testing.assert_array_equal(read_levels(saved(tmp_path, Image.fromarray(GRAY), "gray.png")), GRAY)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4", "zstd", "lzma"])
def test_what_libtiff_complains_of_is_damaged_and_nothing_is_printed(
    tmp_path: Path, compression: str, capfd: pytest.CaptureFixture[str]
) -> None:
    picture = random_image(96, 64).convert("1" if compression == "group4" else "L")
    content = saved(tmp_path, picture, "a.tif", compression=compression).read_bytes()
    (at,), (size,) = (Image.open(tmp_path / "a.tif").tag_v2[tag] for tag in (273, 279))  # type: ignore[attr-defined]
    rng, refused = np.random.default_rng(0), 0
    for _ in range(40):
        damaged = bytearray(content)
        for place in rng.integers(at, at + size, 3):
            damaged[place] = rng.integers(256)
        (tmp_path / "bad.tif").write_bytes(damaged)
        with contextlib.suppress(ImageError):
            read_image(tmp_path / "bad.tif")
            continue
        refused += 1
    assert capfd.readouterr() == ("", "")
    if compression == "group4":  # Pillow alone takes nearly all of them
        assert refused > 30


def test_an_error_of_libtiff_is_of_one_file(tmp_path: Path) -> None:
    content = bytearray(saved(tmp_path, random_image(96, 64).convert("1"), "a.tif", compression="group4").read_bytes())
    saved(tmp_path, random_image(96, 64).convert("1"), "good.tif", compression="group4")
    for place in range(20, 400, 7):
        content[place] ^= 0xFF
    (tmp_path / "bad.tif").write_bytes(content)
    with pytest.raises(ImageError):
        read_image(tmp_path / "bad.tif")
    assert read_image(tmp_path / "good.tif").size == (96, 64)


def test_strips_that_are_missing_or_beyond_the_end(tmp_path: Path) -> None:
    values = random_image(64, 64).convert("L")
    path = saved(tmp_path, values, "a.tif", tiffinfo={278: 8})
    assert len(Image.open(path).tag_v2[273]) == 8  # type: ignore[attr-defined]
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<HHII", 257, 4, 1, 64), struct.pack("<HHII", 257, 4, 1, 80)))
    assert path.read_bytes() != content
    with pytest.raises(ImageError, match="strips or tiles are missing"):
        read_image(path)
    (tmp_path / "b.tif").write_bytes(tiff(np.zeros((4, 4), np.uint8), {279: (4, 2 * 16)}))
    with pytest.raises(ImageError, match="cut short"):
        read_image(tmp_path / "b.tif")


def test_many_samples_a_pixel_are_refused_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(np.zeros((4, 4), np.uint8), {277: (3, 50)}))
    code = f"from pathlib import Path; from vessel_rt.inputs.images import read_image; read_image(Path({str(tmp_path / 'a.tif')!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImageError: a TIFF file" in done.stderr
    assert "More samples" not in done.stderr


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for path in tmp_path.iterdir():
        for read in (read_image, read_levels, page_count):
            with pytest.raises(ImageError, match=r"^not a regular file$"):
                read(path)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"Not an image at all.\n" * 20, "not a JPG, PNG, TIFF, BMP or WebP image"),
        (encoded(random_image(64, 64), "GIF"), "not a JPG, PNG, TIFF, BMP or WebP image"),
        (encoded(random_image(200, 200), "JPEG")[:9000], "cannot be decoded"),
        (encoded(random_image(200, 200), "PNG")[:9000], "cannot be decoded"),
        (encoded(random_image(200, 200), "TIFF")[:9000], "damaged|cut short"),
        (encoded(random_image(200, 200), "BMP")[:9000], "cannot be decoded"),
        (encoded(random_image(200, 200), "WEBP")[:9000], "cannot be decoded"),
        (encoded(Image.new("L", (MAX_SIDE + 1, 1)), "PNG"), "too many"),
    ],
    ids=["empty", "text", "gif", "half jpg", "half png", "half tiff", "half bmp", "half webp", "too wide"],
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
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
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

"""Image files as RGB images, exactly as training reads them (`Image.open(path).convert("RGB")`); files that it would misread are refused.

Does not know about models, nor which files a run has.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from vessel_rt.errors import ImageError, first_line
from vessel_rt.inputs.tiff import PageFile, check_data, page_offsets, raising_libtiff_errors

__all__ = [
    "MAX_SIDE",
    "SUFFIXES",
    "Rescale",
    "image_size",
    "page_count",
    "read_image",
    "read_levels",
    "require_regular",
    "rgb_image",
]

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
MAX_SIDE = 8192  # pixels; a square of this side stays below the size at which Pillow warns of a decompression bomb

_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")  # of 8 bits per channel or fewer
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SIGNED, _FLOAT = 2, 3  # sample formats


@dataclasses.dataclass(frozen=True)
class Rescale:
    """How gray of more than 8 bits becomes 8 bits: `low` becomes 0, `high` 255, values outside are clipped.

    None stands for the minimum and maximum of the file, over all its pages.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where `low` is not below `high`, or one of them is missing or not finite."""
        if (self.low, self.high) == (None, None):
            return
        if self.low is None or self.high is None or not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise ValueError(f"{self.low}:{self.high} is not a range of gray values")

    @classmethod
    def parse(cls, text: str) -> Rescale:
        """`LOW:HIGH`, or nothing for the range of the file. Raises ValueError."""
        if not text:
            return cls()
        try:
            low, high = map(float, text.split(":"))
            return cls(low, high)
        except ValueError:
            raise ValueError(f"{text!r} is not a range of gray values: use LOW:HIGH, such as 0:4095") from None


def read_image(path: Path, page: int | None = None, rescale: Rescale | None = None) -> Image.Image:
    """The image in RGB, as Sa2VA's `Image.open(path).convert("RGB")` gives it, if it has 8 bits per channel or fewer.

    So the orientation in EXIF is ignored (but not that in a TIFF's tags), alpha is dropped, and palettes are looked up. Only pixels are
    taken from the file: Pillow would copy a JPEG's comment into files made from the image.

    Args:
        path: a JPG, PNG, TIFF, BMP or WebP file.
        page: of a TIFF with several pages, from 0; None for a file with one image.
        rescale: how to read gray of more than 8 bits (16 or 32, or floating point), which is refused otherwise. Deeper colours are always
            refused: Pillow drops their low bits.

    Raises:
        ImageError: not a readable file of these kinds, cut short, several images without a `page`, too many bits, or a side longer than
            MAX_SIDE. The text does not name the file.
    """
    with _opened(path, page) as image:
        return _rgb(image, rescale, lambda levels: _range(path))


def rgb_image(image: Image.Image, rescale: Rescale | None = None) -> Image.Image:
    """A copy of an image in memory, of any mode of Pillow's, by the rules of `read_image`; its own range is that of this image alone.

    Raises:
        ImageError: too deep, without pixels, a side longer than MAX_SIDE, or not decodable.
    """
    try:
        with raising_libtiff_errors():  # an image that was only opened is decoded here
            _check_size(image)
            return _rgb(image, rescale, lambda levels: (float(levels.min()), float(levels.max())))
    except ImageError:
        raise
    except Exception as e:  # a decoder given a broken file may raise anything
        raise ImageError(f"cannot be decoded ({first_line(e)})") from e


def read_levels(path: Path, page: int | None = None) -> npt.NDArray[Any]:
    """The gray levels [height, width] of an image in the range of the file, for ground-truth masks. See `read_image`."""
    with _opened(path, page) as image:
        depth = _Depth.of(image)
        if not (depth.is_deep and depth.is_gray):
            return np.asarray(image.convert("RGB").convert("L"))
        levels = _deep_levels(image, depth)
        return levels.max() - levels if depth.inverted else levels


def page_count(path: Path) -> int | None:
    """The number of pages of a TIFF with several; None for any other file. Raises ImageError."""
    with _telling(path):
        require_regular(path)
        count = len(page_offsets(path))
        return count if count > 1 else None


def image_size(path: Path) -> tuple[int, int]:
    """The width and height of a file with one image, in pixels, by its header. Raises ImageError."""
    with _opened(path, None) as image:
        return image.size


def require_regular(path: Path) -> None:
    """Make sure that the path is a regular file: opening a pipe would wait, and a device may have no end. Raises ImageError and OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ImageError("not a regular file")


def _rgb(image: Image.Image, rescale: Rescale | None, own_range: Callable[[npt.NDArray[np.float64]], tuple[float, float]]) -> Image.Image:
    """See `read_image`; `own_range` finds what None in `rescale` stands for."""
    depth = _Depth.of(image)
    if not depth.is_deep:
        pixels = image.convert("RGB")
    elif depth.is_gray and rescale is not None:
        levels = _deep_levels(image, depth)
        low, high = own_range(levels) if rescale.low is None or rescale.high is None else (rescale.low, rescale.high)
        pixels = Image.fromarray(_rescaled(levels, low, high, depth.inverted)).convert("RGB")
    else:
        raise ImageError(f"{depth}, not 8 bits per channel; {depth.advice}")
    pixels.info = {}
    return pixels


def _check_size(image: Image.Image) -> None:
    if min(image.size) < 1:
        raise ImageError(f"{image.width}x{image.height} pixels: there is nothing to segment")
    if max(image.size) > MAX_SIDE:
        raise ImageError(f"{image.width}x{image.height} pixels are too many; sides up to {MAX_SIDE} are read")


@contextmanager
def _opened(path: Path, page: int | None) -> Iterator[ImageFile.ImageFile]:
    """One image, checked before the block decodes it; errors in the block become ImageErrors."""
    with _telling(path), raising_libtiff_errors(), _file_of(path, page) as file, Image.open(file, formats=_FORMATS) as image:
        _check_size(image)
        if isinstance(image, TiffImageFile):
            check_data(image, os.fstat(file.fileno()).st_size)
        elif (pictures := getattr(image, "n_frames", 1)) > 1:
            raise ImageError(f"{pictures} images in one {image.format} file; save each as a separate file")
        yield image


def _file_of(path: Path, page: int | None) -> IO[bytes]:
    """The file, so that Pillow sees this page as the first."""
    _quiet()
    require_regular(path)
    offsets = page_offsets(path)
    if page is None:
        if len(offsets) > 1:
            raise ImageError(
                f"{len(offsets)} pages; vessel-rt infer takes them as frames with --frames, such as --frames : or --frames 0:10"
            )
        return path.open("rb")
    if page >= max(len(offsets), 1):
        raise ImageError(f"it has {max(len(offsets), 1)} pages and no page {page}")
    return PageFile(path, offsets[page]) if offsets else path.open("rb")


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Turn any error that a broken file causes in the block into an ImageError that does not name the file."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except UnidentifiedImageError as e:
        if page_offsets(path):
            raise ImageError("a TIFF file whose pixels are damaged, or of a kind that is not supported; convert it to 8 bits") from e
        raise ImageError("an empty file" if path.stat().st_size == 0 else "not a JPG, PNG, TIFF, BMP or WebP image") from e
    except Exception as e:  # a decoder given a broken file may raise anything
        said = e.strerror if isinstance(e, OSError) and e.strerror else e  # its text would name the file
        raise ImageError(f"cannot be decoded ({said})") from e


@functools.cache
def _quiet() -> None:
    """Silence Pillow's warnings: what matters raises, and the rest would tear the progress bar."""
    warnings.filterwarnings("ignore", module=r"PIL\b")  # once per process: warnings.catch_warnings is not thread-safe
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)


@dataclasses.dataclass(frozen=True)
class _Depth:
    """The bit depth of a channel in the file. Pillow's modes do not show it: it reads 16-bit colour as 8-bit, without a warning."""

    bits: int
    kind: int = 1
    is_gray: bool = True
    inverted: bool = False

    @classmethod
    def of(cls, image: Image.Image) -> _Depth:
        gray = image.mode in ("1", "L") or image.mode[:1] in ("I", "F")
        if isinstance(image, TiffImageFile):
            tags = image.tag_v2
            bits, kinds = max(tags.get(_BITS_PER_SAMPLE, (1,))), tags.get(_SAMPLE_FORMAT, (1,))
            return cls(bits, max(kinds), gray, inverted=tags.get(_PHOTOMETRIC, 0) == 0)
        if isinstance(image, PngImageFile) and image.tile:  # not decoded yet
            return cls(16 if "16" in str(image.tile[0][3]) else 8, is_gray=gray)
        if image.mode in ("I", "F"):
            return cls(32, _SIGNED if image.mode == "I" else _FLOAT)
        return cls(8 if image.mode in _MODES else 16, is_gray=gray)

    @property
    def is_deep(self) -> bool:
        return self.bits > 8 or self.kind != 1

    @property
    def advice(self) -> str:
        return "--rescale scales it (in Python: rescale=True)" if self.is_gray else "convert it to 8 bits"

    def __str__(self) -> str:
        kind = {_SIGNED: " signed", _FLOAT: " floating-point"}.get(self.kind, "")
        return f"{self.bits}-bit{kind} {'gray' if self.is_gray else 'colour'}"


def _deep_levels(image: Image.Image, depth: _Depth) -> npt.NDArray[np.float64]:
    """The values [height, width] of gray that `is_deep`, as stored. Raises ImageError if one of them is not finite."""
    levels = np.asarray(image)
    if (depth.bits, depth.kind) == (8, _SIGNED):  # Pillow reads these as unsigned 8 and signed 32 bits
        levels = levels.view(np.int8)
    elif (depth.bits, depth.kind) == (32, 1):
        levels = levels.view(np.uint32)
    if not np.isfinite(levels).all():
        raise ImageError("some of its values are not finite numbers")
    return levels.astype(np.float64)


def _rescaled(levels: npt.NDArray[np.float64], low: float, high: float, inverted: bool) -> npt.NDArray[np.uint8]:
    """`low` to 0, `high` to 255, or the other way round if `inverted`, rounded once; all to 0 if the range is empty."""
    if low == high:
        return np.zeros(levels.shape, np.uint8)
    gray = np.rint((np.clip(levels, low, high) - low) / (high - low) * 255).astype(np.uint8)
    return np.uint8(255) - gray if inverted else gray


def _range(path: Path) -> tuple[float, float]:
    """The minimum and maximum over all pages of a file of deep gray. Raises ImageError."""
    status = path.stat()
    found = _range_of(path, status.st_mtime_ns, status.st_size)
    if isinstance(found, str):
        raise ImageError(found)
    return found


@functools.lru_cache(maxsize=4)
def _range_of(path: Path, changed: int, size: int) -> tuple[float, float] | str:
    """See `_range`; an error is returned as its text, so that it is cached for all pages."""
    low, high = math.inf, -math.inf
    count = page_count(path)
    for page in [None] if count is None else range(count):
        try:
            with _opened(path, page) as image:
                depth = _Depth.of(image)
                if depth.is_deep and depth.is_gray:
                    levels = _deep_levels(image, depth)
                    low, high = min(low, float(levels.min())), max(high, float(levels.max()))
        except ImageError as e:
            return str(e) if page is None else f"its range of gray values is unknown: page {page} {e}"
    return low, high

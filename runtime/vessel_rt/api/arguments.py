"""The arguments of the Python API, checked. A wrong one is a user-facing error that says what to give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.inputs.images import Rescale

__all__ = ["TAKEN", "ImageLike", "as_count", "as_number", "as_path", "as_picture", "as_rescale", "type_of"]

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]"

TAKEN = "give a path, a PIL image, or an array of uint8 [H, W] or [H, W, 3]"


def as_picture(image: Any) -> Image.Image:
    """A PIL image of what is in memory."""
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray):
        raise ImageError(f"it is {type_of(image)}: {TAKEN}")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ImageError(f"it is an array of {image.dtype} {list(image.shape)}: {TAKEN}")
    return Image.fromarray(np.ascontiguousarray(image))


def as_path(value: Any, name: str, taken: str, error: type[VesselError] = ImageError) -> Path:
    """Raises `error` where it is nothing that a file can be called."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(path, str):
        raise error(f"{name} is {type_of(path)}: {taken}")
    try:
        named = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise error(f"{name} is {path!r}, which no file can be called: {taken}")
    return Path(path)


def as_number(frame: Any) -> int | None:
    if frame is None or (_is_integer(frame) and frame >= 0):
        return None if frame is None else int(frame)
    raise ImageError(f"frame is {frame!r}: give a number from 0")


def as_count(name: str, value: Any) -> int | None:
    if value is None or (_is_integer(value) and value >= 1):
        return None if value is None else int(value)
    raise VesselError(f"{name} is {value!r}: give a positive number, or None")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_rescale(value: Any) -> Rescale | None:
    if isinstance(value, bool):
        return Rescale() if value else None
    try:
        low, high = map(float, value if isinstance(value, tuple | list) else ())
        return Rescale(low, high)
    except (TypeError, ValueError, OverflowError):
        raise VesselError(f"rescale is {value!r}: give True, False, or (low, high) with low below high") from None


def type_of(value: Any) -> str:
    """What is said of a value of a wrong type: never its content, which may be large."""
    return f"of type {type(value).__name__}"

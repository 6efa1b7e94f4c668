"""Annotations in Sa2VA's fine-tuning format: a list of `{"image": name, "mask": [polygons of an object, ...], "text": [its concept, ...]}`.

The only reader of such files, so that `check-data` and `evaluate` judge them alike. Does not know about image files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vessel_rt.errors import VesselError
from vessel_rt.inputs.images import MAX_SIDE
from vessel_rt.results.reader import read_json
from vessel_rt.results.rle import decode_rle

__all__ = ["KINDS", "NOTES", "SAME_MASKS", "Drawn", "Fault", "Item", "concept_of", "polygon_fault", "rasterized", "read_annotations"]

Mask = npt.NDArray[np.bool_]
Polygon: TypeAlias = Sequence[float]

_FARTHEST = 2 * MAX_SIDE  # pixels from the origin; far beyond it pycocotools overflows and ends the process
_LONGEST = 250_000  # pixels of outline: each takes pycocotools time and 100 bytes, and it ends the process when it has no memory
_DEEPEST = 50  # nesting levels of additional fields, which --fix copies

# What each kind of fault means, and what --fix does with it.
KINDS = {
    "form": "not an annotated image (image: a name, mask: a list, text: a list): dropped",
    "duplicate image": "an item that repeats what earlier ones say about its image: dropped",
    "image named twice": "another item for the same image, with other objects: kept",
    "missing image": "no such file among the images: dropped",
    "unreadable image": "the image cannot be read: dropped",
    "more masks than texts": "it is unclear which text belongs to which mask: dropped, but kept if all texts are one concept",
    "more texts than masks": "it is unclear which text belongs to which mask: dropped; only the extra texts if all are one concept",
    "no mask": "the item has no mask: dropped",
    "empty text": "an object without a concept: the object is dropped",
    "empty polygon": "fewer than three points: the polygon is dropped",
    "coordinates": f"not a list of pairs of finite numbers, of up to {_FARTHEST:,} pixels: the polygon is dropped",
    "outside the image": "no pixel of the polygon lies in the image: the polygon is dropped",
    "partly outside the image": "kept: training clips it at the border too",
    "no area": "the polygon covers no pixel: dropped",
    "duplicate object": "the same concept and polygons again in one image: dropped",
    "without annotation": "an image in the folder that no item names: nothing to fix",
}
NOTES = frozenset({"image named twice", "partly outside the image", "without annotation"})  # shown, but not counted as faults
SAME_MASKS = NOTES | {"duplicate image", "duplicate object"}  # the ground truth is the same with and without them


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mismatch: its kind in KINDS, what was found, and the number of the object, if it is about one."""

    kind: str
    found: str
    object: int | None = None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Object `number` of an item: its polygons `[x0, y0, x1, y1, ...]`, in pixels, each with at least three points."""

    number: int
    text: str
    polygons: tuple[Polygon, ...]


@dataclasses.dataclass(frozen=True)
class Item:
    """One annotated image: its well-formed objects, and the faults of the others.

    `image` is None if the item is not an annotated image at all. `content` is the item as in the file.
    """

    number: int
    image: str | None
    objects: tuple[Drawn, ...]
    faults: tuple[Fault, ...]
    content: Any


def read_annotations(path: Path) -> list[Item]:
    """The items of a file, in order. Raises VesselError if it cannot be read or is not a list."""
    items = read_json(path, _object_of)
    if not isinstance(items, list):
        raise VesselError(f"{path}: not a list of annotated images, but {_json_type(items)}")
    return [_parsed(number, item) for number, item in enumerate(items)]


def concept_of(text: str) -> str:
    """A concept as in training: in lower case, without a final dot."""
    return text.lower().removesuffix(".")


def polygon_fault(polygon: Polygon, size: tuple[int, int]) -> tuple[str, str] | None:
    """The fault of a well-formed polygon in an image of `size` (width, height): its kind and what was found, or None."""
    (width, height), xs, ys = size, polygon[::2], polygon[1::2]
    extent = f"x {min(xs):g} to {max(xs):g}, y {min(ys):g} to {max(ys):g}, the image is {width}x{height}"
    if max(xs) <= 0 or max(ys) <= 0 or min(xs) >= width or min(ys) >= height:
        return "outside the image", extent
    if not rasterized([polygon], height, width).any():
        return "no area", extent
    if min(xs) < 0 or min(ys) < 0 or max(xs) > width or max(ys) > height:
        return "partly outside the image", extent
    return None


def rasterized(polygons: Sequence[Polygon], height: int, width: int) -> Mask:
    """The union [height, width] of polygons `[x0, y0, x1, y1, ...]` in pixels, filled by pycocotools as in Sa2VA's training.

    Raises ValueError if one is not a polygon, or a side is longer than MAX_SIDE: pycocotools would end the process.
    """
    from pycocotools import mask as coco

    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ValueError(f"{width}x{height} is not the size of an image")
    for polygon in polygons:
        if fault := _shape_fault(polygon):
            raise ValueError(f"not a polygon ({': '.join(fault)})")
    if not polygons:
        return np.zeros((height, width), np.bool_)
    return decode_rle(coco.merge(coco.frPyObjects([list(polygon) for polygon in polygons], height, width)))


class _Ambiguous(dict[str, Any]):
    """A JSON object with a duplicate key: readers differ in which value they take."""


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Ambiguous(found)


def _json_type(value: Any) -> str:
    kinds = ((dict, "an object"), (list, "a list"), (str, "a string"), (bool, "true or false"), (int | float, "a number"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _parsed(number: int, content: Any) -> Item:
    if fault := _form_fault(content):
        return Item(number, None, (), (Fault("form", fault),), content)
    faults: list[Fault] = []
    pairs = list(_pairs(content["mask"], content["text"], faults))
    objects = [drawn for place, polygons, text in pairs if (drawn := _drawn(place, polygons, text, faults)) is not None]
    return Item(number, content["image"], tuple(objects), tuple(faults), content)


def _form_fault(item: Any) -> str | None:
    """Why something is not an annotated image."""
    if not isinstance(item, dict):
        return _json_type(item)
    if isinstance(item, _Ambiguous):
        return "a duplicate key"
    for key, kind in (("image", str), ("mask", list), ("text", list)):
        if key not in item:
            return f"no {key!r}"
        if not isinstance(item[key], kind):
            return f"{key!r} is {_json_type(item[key])}"
    name = Path(item["image"])
    if not name.name or name.is_absolute() or ".." in name.parts or "\0" in item["image"]:
        return "'image' is not the name of a file in a folder"
    if not all(isinstance(text, str) for text in item["text"]):
        return "a text is not text"
    if _is_deep([value for key, value in item.items() if key not in ("image", "mask", "text")]):
        return f"more than {_DEEPEST} levels deep"
    return None


def _is_deep(level: list[Any]) -> bool:
    for _ in range(_DEEPEST):
        level = [
            inner for value in level if isinstance(value, dict | list) for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return False
    return True


def _pairs(masks: list[Any], texts: list[str], faults: list[Fault]) -> Iterator[tuple[int, Any, str]]:
    """Number, polygons and text of each object, if masks and texts can be matched."""
    if not masks:
        faults.append(Fault("no mask", f"{len(texts)} texts, no mask"))
        return
    if len(masks) != len(texts):
        kind = "more masks than texts" if len(masks) > len(texts) else "more texts than masks"
        faults.append(Fault(kind, f"{len(masks)} masks, {len(texts)} texts"))
        if len({concept_of(text) for text in texts}) != 1:
            return
        texts = [texts[0]] * len(masks)
    for number, (polygons, text) in enumerate(zip(masks, texts, strict=True)):
        yield number, polygons, text


def _drawn(number: int, polygons: Any, text: str, faults: list[Fault]) -> Drawn | None:
    """The object with its well-formed polygons; None if it has none, or no concept."""
    if not concept_of(text).strip():
        faults.append(Fault("empty text", repr(text), number))
        return None
    if not isinstance(polygons, list):
        faults.append(Fault("coordinates", _json_type(polygons), number))
        return None
    if not polygons:
        faults.append(Fault("empty polygon", "no polygon", number))
    sound = []
    for polygon in polygons:
        if fault := _shape_fault(polygon):
            faults.append(Fault(*fault, number))
        else:
            sound.append(polygon)
    return Drawn(number, text, tuple(sound)) if sound else None


def _shape_fault(polygon: Any) -> tuple[str, str] | None:
    """The fault of a polygon whatever its image: its kind and what was found, or None."""
    if not isinstance(polygon, list):
        return "coordinates", _json_type(polygon)
    if not all(map(_is_coordinate, polygon)):
        return "coordinates", f"not all are finite numbers of up to {_FARTHEST:,} pixels"
    if len(polygon) % 2:
        return "coordinates", f"{len(polygon)} of them"
    if len(polygon) < 6:
        return "empty polygon", f"{len(polygon) // 2} points"
    points = np.asarray(polygon, np.float64).reshape(-1, 2)
    outline = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
    if outline > _LONGEST:
        return "coordinates", f"an outline of {outline:,.0f} pixels, more than {_LONGEST:,}"
    return None


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_FARTHEST <= value <= _FARTHEST  # NaN is not

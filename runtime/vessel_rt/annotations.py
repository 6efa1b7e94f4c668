"""Drawn masks: annotations in Sa2VA's fine-tuning format, or a folder of mask images."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.frames import stem_of
from vessel_rt.image import SUFFIXES, read_image
from vessel_rt.privacy import StudyCodes
from vessel_rt.results import read_json
from vessel_rt.rle import decode_rle

__all__ = ["GroundTruth", "concept_of", "concepts_in", "is_coordinate", "objects_of", "rasterized", "read_truth"]

Mask = npt.NDArray[np.bool_]


class GroundTruth(Protocol):
    """Drawn masks of frames, found by a line of results.jsonl."""

    def concepts(self, question: str) -> list[str | None]:
        """What the masks of an answer to `question` are of, in their order; None: all of them together are of the one drawn thing."""

    def mask(self, line: Mapping[str, Any], concept: str | None) -> Mask | None:
        """The drawn mask [height, width] of a frame; None where nothing was drawn for it. Raises VesselError."""


def read_truth(path: Path, codes: StudyCodes | None = None) -> GroundTruth:
    """What lies in `path`, a JSON file or a folder; with `codes`, frames are found by their study codes, too.

    Raises:
        VesselError: it cannot be read, is not in one of the two forms, or a folder has two masks for one stem.
    """
    return _MaskFolder(path, codes) if path.is_dir() else _Annotations(path, codes)


class _Annotations:
    """A list of `{"image": name, "mask": [polygons of an object, ...], "text": [its concept, ...]}`; entries of one image are joined."""

    def __init__(self, path: Path, codes: StudyCodes | None) -> None:
        self._path = path
        items = read_json(path)
        if not isinstance(items, list):
            raise VesselError(f"{path}: not a list of annotated images; {_ADVICE}")
        self._drawn: dict[str, dict[str, list[Any]]] = {}
        images: dict[str, str] = {}
        for number, item in enumerate(items):
            try:
                stem = stem_of(Path(item["image"]))
                if images.setdefault(stem, item["image"]) != item["image"]:
                    raise VesselError(f"{path}: item {number} is of another image of the same stem; frames are found by their stems")
                drawn = self._drawn.setdefault(stem, {})
                for concept, polygons in objects_of(item):
                    drawn.setdefault(concept, []).extend(polygons)
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                raise VesselError(f"{path}: item {number} is not in the expected form ({type(e).__name__}: {e}); {_ADVICE}") from e
        self._places = _by_stem_and_code(self._drawn, codes)
        self._known = {concept for drawn in self._drawn.values() for concept in drawn}

    def concepts(self, question: str) -> list[str | None]:
        return [*concepts_in(question, self._known)]

    def mask(self, line: Mapping[str, Any], concept: str | None) -> Mask | None:
        polygons = self._drawn.get(self._places.get(line["name"], ""), {}).get(concept or "")
        if polygons is None:
            return None
        try:
            return rasterized(polygons, line["height"], line["width"])
        except ValueError as e:
            raise VesselError(f"{self._path}: a polygon of frame {line['index'] + 1} ({line['code']}) cannot be filled; {_ADVICE}") from e


class _MaskFolder:
    """`<stem>_gt`, `<stem>_mask` or, where there is none of these in the folder, `<stem>`: brighter than half of its brightest is drawn."""

    def __init__(self, path: Path, codes: StudyCodes | None) -> None:
        self._path = path
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
        marked = [file for file in files if re.search(r"_(gt|mask)$", file.stem)]
        self._files: dict[str, Path] = {}
        for file in marked or files:
            stem = re.sub(r"_(gt|mask)$", "", file.stem)
            if self._files.setdefault(stem, file) != file:
                raise VesselError(f"{path}: two drawn masks for one stem; move one of them away")
        if not files:
            raise VesselError(f"{path}: no drawn masks in this folder ({', '.join(SUFFIXES)})")
        self._places = _by_stem_and_code(self._files, codes)

    def concepts(self, question: str) -> list[str | None]:
        return [None]

    def mask(self, line: Mapping[str, Any], concept: str | None) -> Mask | None:
        stem = self._places.get(line["name"])
        if stem is None:
            return None
        label = f"{self._path}: the drawn mask of frame {line['index'] + 1} ({line['code']})"
        try:
            levels = np.asarray(read_image(self._files[stem]).convert("L"))
        except ImageError as e:
            raise VesselError(f"{label}: {e}") from e
        if levels.shape != (line["height"], line["width"]):
            raise VesselError(f"{label} is {levels.shape[1]}x{levels.shape[0]} pixels, the frame {line['width']}x{line['height']}")
        drawn: Mask = levels > levels.max() / 2
        return drawn


_FARTHEST = 1_000_000  # pixels from the origin: beyond, pycocotools overflows, and ends the process
_ADVICE = "vessel-rt check-data shows what is wrong, and its --fix writes a copy of what is sound"


def objects_of(item: Any) -> list[tuple[str, list[Any]]]:
    """The objects of one annotated image: concept and polygons. Raises ValueError, KeyError or TypeError where the form is another."""
    if len(item["mask"]) != len(item["text"]):
        raise ValueError(f"{len(item['mask'])} masks, {len(item['text'])} texts")
    return [(concept_of(text), list(polygons)) for text, polygons in zip(item["text"], item["mask"], strict=True)]


def concept_of(text: str) -> str:
    """A concept as training reads it: in lower case, without a final dot."""
    return text.lower().removesuffix(".")


def concepts_in(question: str, concepts: Collection[str]) -> list[str]:
    """The concepts that occur in `question`, in its order; of two that overlap there, the longer."""
    longest_first = sorted(filter(None, concepts), key=len, reverse=True)
    return list(dict.fromkeys(re.findall("|".join(map(re.escape, longest_first)), question.lower()))) if longest_first else []


def is_coordinate(value: Any) -> bool:
    """Whether `value` is a number that a polygon may have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_FARTHEST <= value <= _FARTHEST  # NaN is not


def rasterized(polygons: Sequence[Sequence[float]], height: int, width: int) -> Mask:
    """The union [height, width] of polygons `[x0, y0, x1, y1, ...]` in pixels, filled as Sa2VA's training fills them: by pycocotools.

    Raises ValueError for what is not a polygon, or out of all proportion.
    """
    from pycocotools import mask as coco

    if not polygons:
        return np.zeros((height, width), np.bool_)
    try:
        if not all(is_coordinate(value) for polygon in polygons for value in polygon):
            raise ValueError("a coordinate is no finite number of pixels")
        return decode_rle(coco.merge(coco.frPyObjects([list(polygon) for polygon in polygons], height, width)))
    except Exception as e:  # the library raises plain Exception
        raise ValueError("not a polygon") from e


def _by_stem_and_code(stems: Collection[str], codes: StudyCodes | None) -> dict[str, str]:
    """What outputs may be called, stems and study codes, to stems. A cine's frames have the code of the cine."""
    places = {stem: stem for stem in stems}
    for stem in stems if codes else ():
        cine, frame = re.fullmatch(r"(.*?)(_frame_\d{6})?", stem, re.DOTALL).groups(default="")  # type: ignore[union-attr]
        for name in (codes.code(stem), codes.code(cine) + frame):  # type: ignore[union-attr]
            places.setdefault(name, stem)
    return places

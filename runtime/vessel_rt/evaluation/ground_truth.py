"""Ground-truth masks of frames: from annotations, or from a folder of mask images. Does not know about predicted masks."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.evaluation.annotations import SAME_MASKS, Item, Mask, Polygon, concept_of, polygon_fault, rasterized, read_annotations
from vessel_rt.inputs.frames import cine_of
from vessel_rt.inputs.images import SUFFIXES, read_levels
from vessel_rt.inputs.input_files import flat_stem, stem_of
from vessel_rt.inputs.pseudonyms import StudyCodes

__all__ = ["GroundTruth", "concepts_in", "read_truth"]

_ADVICE = "`vessel-rt check-data` shows all faults, and its --fix writes a copy without them"


class GroundTruth(Protocol):
    """Ground-truth masks, looked up by a line of results.jsonl."""

    def concepts(self, question: str) -> list[str | None]:
        """The concepts of the masks of an answer to `question`, in order; None: all masks together are one unnamed concept."""

    def mask(self, line: Mapping[str, Any], concept: str | None) -> Mask | None:
        """The mask [height, width] of a frame; None if it has no ground truth. Raises VesselError."""


def read_truth(path: Path, codes: StudyCodes | None = None) -> GroundTruth:
    """The ground truth in `path`, a JSON file or a folder. With `codes`, frames are also found by their study codes.

    Raises:
        VesselError: it cannot be read, has neither form, or has two masks for one stem.
    """
    return _MaskFolder(path, codes) if path.is_dir() else _Annotations(path, codes)


class _Annotations:
    """Annotations in Sa2VA's fine-tuning format; items of one image are joined."""

    def __init__(self, path: Path, codes: StudyCodes | None) -> None:
        self._path = path
        self._drawn: dict[str, dict[str, list[tuple[int, Polygon]]]] = {}  # by stem and concept: item and polygon
        images: dict[str, str] = {}
        items = read_annotations(path)
        _require_sound(path, items)
        for item in items:
            image = item.image or ""
            stem = flat_stem(Path(image))
            if images.setdefault(stem, image) != image:
                raise VesselError(
                    f"{path}: item {item.number} is of another image of the same stem; frames are found by their stems: rename one"
                )
            drawn = self._drawn.setdefault(stem, {})
            for thing in item.objects:
                drawn.setdefault(concept_of(thing.text), []).extend((item.number, polygon) for polygon in thing.polygons)
        self._places = _by_stem_and_code(self._drawn, codes)
        self._ambiguous: set[str] = set()
        bare: dict[str, str] = {}  # a run of one subfolder calls its frames by their names alone
        for stem, image in images.items():
            name = stem_of(Path(image))
            if bare.setdefault(name, stem) != stem:
                self._ambiguous |= _by_stem_and_code([name], codes).keys()
        for name, place in _by_stem_and_code(bare, codes).items():
            self._places.setdefault(name, bare[place])
        self._known = {concept for drawn in self._drawn.values() for concept in drawn}

    def concepts(self, question: str) -> list[str | None]:
        return [*concepts_in(question, self._known)]

    def mask(self, line: Mapping[str, Any], concept: str | None) -> Mask | None:
        if line["name"] in self._ambiguous:
            raise VesselError(
                f"{self._path}: several images in different folders have the name of frame {line['index'] + 1} ({line['code']}); "
                "run the folder above them with --recursive, so that frames are called by folder and name"
            )
        polygons = self._drawn.get(self._places.get(line["name"], ""), {}).get(concept or "")
        if polygons is None:
            return None
        mask = rasterized([polygon for _, polygon in polygons], line["height"], line["width"])
        for number, polygon in polygons:
            fault = polygon_fault(polygon, (line["width"], line["height"]))
            if fault and fault[0] not in SAME_MASKS:
                where = f"item {number}, of frame {line['index'] + 1} ({line['code']})"
                raise VesselError(f"{self._path}: {where}: {fault[0]} ({fault[1]}); {_ADVICE}")
        return mask


def _require_sound(path: Path, items: Sequence[Item]) -> None:
    """Refuse the faults of `check-data` that change the masks."""
    faults = [(item, fault) for item in items for fault in item.faults if fault.kind not in SAME_MASKS]
    if not faults:
        return
    item, fault = faults[0]
    where = f"item {item.number}" + ("" if fault.object is None else f", object {fault.object}")
    more = f", and {len(faults) - 1} more faults" if len(faults) > 1 else ""
    raise VesselError(f"{path}: {where}: {fault.kind} ({fault.found}){more}; {_ADVICE}")


class _MaskFolder:
    """`<stem>_gt`, `<stem>_mask`, or `<stem>` if the folder has none of these. Pixels above half of the maximum are the mask.

    The masks of a cine are a file for each frame, or a TIFF of the cine's stem with a page for each frame.
    """

    def __init__(self, path: Path, codes: StudyCodes | None) -> None:
        self._path = path
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
        marked = [file for file in files if re.search(r"_(gt|mask)$", file.stem)]
        self._files: dict[str, Path] = {}
        for file in marked or files:
            stem = re.sub(r"_(gt|mask)$", "", file.stem)
            if self._files.setdefault(stem, file) != file:
                raise VesselError(f"{path}: two masks for one stem; remove one of them")
        if not files:
            raise VesselError(f"{path}: no masks in this folder ({', '.join(SUFFIXES)})")
        self._places = _by_stem_and_code(self._files, codes)

    def concepts(self, question: str) -> list[str | None]:
        return [None]

    def mask(self, line: Mapping[str, Any], concept: str | None) -> Mask | None:
        stem, page = self._places.get(line["name"]), None
        if stem is None and line["frame"] is not None:
            stem, page = self._places.get(cine_of(line["name"], line["frame"])), line["frame"]
        if stem is None:
            return None
        label = f"{self._path}: the mask of frame {line['index'] + 1} ({line['code']})"
        try:
            levels = read_levels(self._files[stem], page)
        except ImageError as e:
            raise VesselError(f"{label}: {e}") from e
        if levels.shape != (line["height"], line["width"]):
            raise VesselError(f"{label} is {levels.shape[1]}x{levels.shape[0]} pixels, the frame {line['width']}x{line['height']}")
        drawn: Mask = levels > max(levels.max(), 0) / 2
        return drawn


def concepts_in(question: str, concepts: Collection[str]) -> list[str]:
    """The concepts that occur in `question`, in its order; if two overlap, the longer."""
    longest_first = sorted(filter(None, concepts), key=len, reverse=True)
    return list(dict.fromkeys(re.findall("|".join(map(re.escape, longest_first)), question.lower()))) if longest_first else []


def _by_stem_and_code(stems: Collection[str], codes: StudyCodes | None) -> dict[str, str]:
    """Names of outputs, as stems and as study codes, to stems. The frames of a cine have the code of the cine."""
    places = {stem: stem for stem in stems}
    for stem in stems if codes else ():
        cine, frame = re.fullmatch(r"(.*?)(_frame_\d{6})?", stem, re.DOTALL).groups(default="")  # type: ignore[union-attr]
        for name in (codes.code(stem), codes.code(cine) + frame):  # type: ignore[union-attr]
            places.setdefault(name, stem)
    return places

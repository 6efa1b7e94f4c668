"""What is wrong with annotations in Sa2VA's fine-tuning format, and a copy of them without it.

Training takes `{"image": name, "mask": [polygons of an object, ...], "text": [its concept, ...]}`, and warns, skips or fails where an item
is otherwise, in the middle of an epoch.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vessel_rt.annotations import concept_of, is_coordinate, rasterized
from vessel_rt.errors import ImageError, VesselError
from vessel_rt.frames import Naming
from vessel_rt.image import SUFFIXES, read_image
from vessel_rt.outputs import replacing, writing
from vessel_rt.privacy import printable, remember
from vessel_rt.results import read_json

__all__ = ["KINDS", "Checked", "Problem", "check_data", "write_fixed"]

_EXAMPLES = 5

# What each kind means, and what --fix does about it.
KINDS = {
    "form": "not an annotated image (image: a name, mask: a list, text: a list): dropped",
    "duplicate image": "an item that says what earlier ones said of its image: dropped",
    "image named twice": "a further item of an image, with other objects: kept",
    "missing image": "no such file among the images: dropped",
    "unreadable image": "the image cannot be read: dropped",
    "more masks than texts": "nothing tells which mask is whose: dropped, but kept where all texts are one concept",
    "more texts than masks": "nothing tells which text is whose: dropped, but the texts beyond are where all are one concept",
    "no mask": "nothing is drawn: dropped",
    "empty text": "an object of no concept: the object is dropped",
    "empty polygon": "fewer than three points: the polygon is dropped",
    "coordinates": "not a list of pairs of finite numbers, of up to a million pixels: the polygon is dropped",
    "outside the image": "no pixel of the polygon is in the image: the polygon is dropped",
    "partly outside the image": "kept as it is: training cuts it off at the border, too",
    "no area": "the polygon covers no pixel: dropped",
    "duplicate object": "the same concept and polygons again, of one image: dropped",
    "without annotation": "an image of the folder that no item names: nothing to fix",
}
_NOTES = frozenset({"image named twice", "partly outside the image", "without annotation"})  # said, but no mismatch


@dataclasses.dataclass(frozen=True)
class Problem:
    """One mismatch: of a kind of KINDS, at a place such as `item 12 (3f9a2c71d0e4), object 2`, with what was found there."""

    kind: str
    place: str
    found: str


@dataclasses.dataclass(frozen=True)
class Checked:
    """What came of a check: all problems, how many items there are, and those that are sound, or what is sound of them."""

    items: int
    problems: tuple[Problem, ...]
    sound: tuple[dict[str, Any], ...]

    @property
    def faults(self) -> int:
        """Problems but for notes."""
        return sum(problem.kind not in _NOTES for problem in self.problems)

    def by_kind(self) -> dict[str, list[Problem]]:
        found: dict[str, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            found[problem.kind].append(problem)
        return {kind: found[kind] for kind in KINDS if kind in found}

    def table(self) -> str:
        """For a terminal."""
        lines = [f"items: {self.items}, sound or mended: {len(self.sound)}, problems: {self.faults}"]
        for kind, problems in self.by_kind().items():
            lines.append(f"{len(problems):6}  {kind}: {KINDS[kind]}")
            lines += [f"          {problem.place}: {problem.found}" for problem in problems[:_EXAMPLES]]
            if len(problems) > _EXAMPLES:
                lines.append(f"          and {len(problems) - _EXAMPLES} more")
        return "\n".join(lines)

    def to_json(self) -> str:
        """For programs: the counts by kind, with examples."""
        kinds = {
            kind: {"count": len(problems), "examples": [dataclasses.asdict(problem) for problem in problems[:_EXAMPLES]]}
            for kind, problems in self.by_kind().items()
        }
        return json.dumps({"items": self.items, "sound": len(self.sound), "problems": self.faults, "kinds": kinds}, indent=1)


def check_data(annotations: Path, images: Path, naming: Naming) -> Checked:
    """Look at every item of a file of annotations, and at every image in the folder `images`.

    Raises:
        VesselError: the file is not JSON, or not a list; the folder is not there.
    """
    if not images.is_dir():
        raise VesselError(f"{images}: no such folder; name that of the images with --images")
    items = read_json(annotations)
    if not isinstance(items, list):
        raise VesselError(f"{annotations}: not a list of annotated images, but {type(items).__name__}")
    files = {file.name for file in images.iterdir() if file.is_file() and file.suffix.lower() in SUFFIXES and not file.name.startswith(".")}
    check = _Check(images, naming)
    with tqdm(items, desc="checking", unit="item", disable=None, delay=2, leave=False) as bar:
        sound = [whole for number, item in enumerate(bar) if (whole := check.item(number, item)) is not None]
    for name in sorted(files - check.named):
        check.note("without annotation", _shown("image", name, naming), "no item names it")
    return Checked(len(items), tuple(check.problems), tuple(sound))


def write_fixed(checked: Checked, path: Path) -> Path:
    """Write what is sound to `path`, and beside it what was dropped and why; returns the latter's path. Raises VesselError."""
    dropped = path.with_suffix(".dropped.json")
    if path.exists():
        raise VesselError(f"{path}: is there already; name a new file with --fix")
    said = [dataclasses.asdict(problem) | {"done": KINDS[problem.kind]} for problem in checked.problems]
    for file, content in ((dropped, said), (path, list(checked.sound))):
        with writing(file), replacing(file) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
    return dropped


class _Check:
    """The check of one file, item by item."""

    def __init__(self, images: Path, naming: Naming) -> None:
        self._images, self._naming = images, naming
        self.problems: list[Problem] = []
        self.named: set[str] = set()
        self._sizes: dict[str, tuple[int, int] | ImageError] = {}
        self._seen: dict[str, set[str]] = defaultdict(set)

    def note(self, kind: str, place: str, found: str) -> None:
        self.problems.append(Problem(kind, place, found))

    def item(self, number: int, item: Any) -> dict[str, Any] | None:
        """What is sound of an item; None if nothing is."""
        fault = _form_fault(item)
        if fault:
            self.note("form", f"item {number}", fault)
            return None
        name, place = item["image"], _shown(f"item {number}", item["image"], self._naming)
        again = name in self.named
        self.named.add(name)
        size = self._size(name)
        if isinstance(size, ImageError):
            self.note("missing image" if str(size) == "no such file" else "unreadable image", place, str(size))
            return None
        found: list[tuple[int, list[Any], str]] = []
        for number, polygons, text in self._pairs(item, place):
            if (whole := self._object(number, polygons, text, size, place)) is not None:
                found.append((number, *whole))
        if again and found:
            said = all(_key(polygons, text) in self._seen[name] for _, polygons, text in found)
            self.note("duplicate image" if said else "image named twice", place, "an earlier item is of this image, too")
            if said:
                return None
        objects = [(polygons, text) for number, polygons, text in found if self._is_new(name, number, polygons, text, place)]
        sound: dict[str, Any] = item | {"mask": [polygons for polygons, _ in objects], "text": [text for _, text in objects]}
        return sound if objects else None

    def _is_new(self, name: str, number: int, polygons: list[Any], text: str, place: str) -> bool:
        key = _key(polygons, text)
        if key in self._seen[name]:
            self.note("duplicate object", f"{place}, object {number}", "drawn before in this image")
            return False
        self._seen[name].add(key)
        return True

    def _size(self, name: str) -> tuple[int, int] | ImageError:
        if name not in self._sizes:
            try:
                path = self._images / name
                self._sizes[name] = read_image(path).size if path.is_file() else ImageError("no such file")
            except ImageError as e:
                self._sizes[name] = e
        return self._sizes[name]

    def _pairs(self, item: dict[str, Any], place: str) -> Iterator[tuple[int, Any, str]]:
        """Number, polygons and text of each object of which it can be told."""
        masks, texts = item["mask"], item["text"]
        if not masks:
            self.note("no mask", place, f"{len(texts)} texts, nothing drawn")
            return
        if len(masks) != len(texts):
            kind = "more masks than texts" if len(masks) > len(texts) else "more texts than masks"
            self.note(kind, place, f"{len(masks)} masks, {len(texts)} texts")
            if len({concept_of(text) for text in texts}) != 1:
                return
            texts = [texts[0]] * len(masks)
        for number, (polygons, text) in enumerate(zip(masks, texts, strict=True)):
            yield number, polygons, text

    def _object(self, number: int, polygons: Any, text: str, size: tuple[int, int], place: str) -> tuple[list[Any], str] | None:
        where = f"{place}, object {number}"
        if not concept_of(text).strip():
            self.note("empty text", where, repr(text))
            return None
        if not isinstance(polygons, list):
            self.note("coordinates", where, f"a {type(polygons).__name__}")
            return None
        if not polygons:
            self.note("empty polygon", where, "no polygon")
        sound = []
        for polygon in polygons:
            kind, found = _polygon_fault(polygon, size)
            if kind:
                self.note(kind, where, found)
            if kind in (None, *_NOTES):
                sound.append(polygon)
        return (sound, text) if sound else None


def _key(polygons: Any, text: str) -> str:
    """The same for objects that are the same."""
    return json.dumps([concept_of(text), polygons])


def _form_fault(item: Any) -> str | None:
    """Why something is not an annotated image."""
    if not isinstance(item, dict):
        return f"a {type(item).__name__}"
    for key, kind in (("image", str), ("mask", list), ("text", list)):
        if key not in item:
            return f"no {key!r}"
        if not isinstance(item[key], kind):
            return f"{key!r} is a {type(item[key]).__name__}"
    if not item["image"] or Path(item["image"]).is_absolute() or ".." in Path(item["image"]).parts:
        return "'image' is not the name of a file in a folder"
    if not all(isinstance(text, str) for text in item["text"]):
        return "a text is not text"
    return None


def _polygon_fault(polygon: Any, size: tuple[int, int]) -> tuple[str | None, str]:
    """The kind of what is wrong with a polygon, if anything is, and what was found."""
    if not isinstance(polygon, list):
        return "coordinates", f"a {type(polygon).__name__}"
    if not all(map(is_coordinate, polygon)):
        return "coordinates", "not all are finite numbers of up to a million pixels"
    if len(polygon) % 2:
        return "coordinates", f"{len(polygon)} of them"
    if len(polygon) < 6:
        return "empty polygon", f"{len(polygon) // 2} points"
    (width, height), xs, ys = size, polygon[::2], polygon[1::2]
    extent = f"x {min(xs):g} to {max(xs):g}, y {min(ys):g} to {max(ys):g}, the image is {width}x{height}"
    if max(xs) <= 0 or max(ys) <= 0 or min(xs) >= width or min(ys) >= height:
        return "outside the image", extent
    if not rasterized([polygon], height, width).any():
        return "no area", extent
    if min(xs) < 0 or min(ys) < 0 or max(xs) > width or max(ys) > height:
        return "partly outside the image", extent
    return None, ""


def _shown(what: str, name: str, naming: Naming) -> str:
    if naming.show_names:
        return f"{what} ({printable(name)})"
    code = naming.codes.code(Path(name).stem)
    remember(name, code)
    return f"{what} ({code})"

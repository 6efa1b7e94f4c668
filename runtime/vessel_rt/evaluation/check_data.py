"""What is wrong with annotations in Sa2VA's fine-tuning format, and a copy without the faults.

Training warns, skips or fails on such items in the middle of an epoch. annotations.py finds the faults that need no images. Does not know
about runs.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from tqdm import tqdm

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.evaluation.annotations import KINDS, NOTES, Drawn, Fault, Item, concept_of, polygon_fault, read_annotations
from vessel_rt.inputs.frames import Naming
from vessel_rt.inputs.images import SUFFIXES, read_image
from vessel_rt.inputs.input_files import stem_of
from vessel_rt.inputs.pseudonyms import printable, remember
from vessel_rt.io.files import replacing, require_regular, writing

__all__ = ["SCHEMA", "CheckReport", "Checked", "DroppedItem", "Problem", "ProblemKind", "check_data", "dropped_path", "write_fixed"]

SCHEMA = 1  # of CheckReport

_EXAMPLES = 5


class Problem(Struct, frozen=True):
    """One problem in annotations.

    Attributes:
        kind: the kind of problem; docs/metrics.md describes the kinds.
        place: where it is, such as `item 12 (3f9a2c71d0e4), object 2`.
        found: what was found there.
    """

    kind: str
    place: str
    found: str


class DroppedItem(Problem, frozen=True):
    """One problem in `<name>.dropped.json`, which is a list of them.

    Attributes:
        done: what `--fix` did about it.
    """

    done: str


class ProblemKind(Struct, frozen=True):
    """All problems of one kind.

    Attributes:
        count: the number of problems.
        examples: the first few problems.
    """

    count: int
    examples: list[Problem]


class CheckReport(Struct, frozen=True):
    """What `vessel-rt check-data --json` prints.

    Attributes:
        schema: the version of this format.
        items: the number of items.
        sound: the number of items without errors, including those that `--fix` can repair.
        problems: the number of problems, without notes.
        kinds: the problems and notes by kind.
    """

    schema: int
    items: int
    sound: int
    problems: int
    kinds: dict[str, ProblemKind]


@dataclasses.dataclass(frozen=True)
class Checked:
    """The result of a check: the number of items, all problems, and the sound items, without their unsound objects."""

    items: int
    problems: tuple[Problem, ...]
    sound: tuple[dict[str, Any], ...]

    @property
    def faults(self) -> int:
        """The number of problems, without notes."""
        return sum(problem.kind not in NOTES for problem in self.problems)

    def by_kind(self) -> dict[str, list[Problem]]:
        found: dict[str, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            found[problem.kind].append(problem)
        return {kind: found[kind] for kind in KINDS if kind in found}

    def table(self) -> str:
        """For a terminal."""
        lines = [f"items: {self.items}, without errors or repaired: {len(self.sound)}, problems: {self.faults}"]
        for kind, problems in self.by_kind().items():
            lines.append(f"{len(problems):6}  {kind}: {KINDS[kind]}")
            lines += [f"          {problem.place}: {problem.found}" for problem in problems[:_EXAMPLES]]
            if len(problems) > _EXAMPLES:
                lines.append(f"          and {len(problems) - _EXAMPLES} more")
        return "\n".join(lines)

    def to_json(self) -> str:
        """For programs: the counts by kind, with examples."""
        kinds = {kind: ProblemKind(len(problems), problems[:_EXAMPLES]) for kind, problems in self.by_kind().items()}
        return json.dumps(msgspec.to_builtins(CheckReport(SCHEMA, self.items, len(self.sound), self.faults, kinds)), indent=1)


def check_data(annotations: Path, images: Path, naming: Naming) -> Checked:
    """Check every item of a file of annotations, and every image in the folder `images`.

    Raises:
        VesselError: the file is not JSON or not a list, or the folder does not exist or cannot be read.
    """
    if not os.path.isdir(images):
        raise VesselError(f"{images}: no such folder; name the folder of the images with --images")
    try:
        files = {name for name in os.listdir(images) if _is_image(images / name)}
    except OSError as e:
        raise VesselError(f"{images}: cannot be read ({e.strerror})") from e
    items = read_annotations(annotations)
    check = _Check(images, naming)
    with tqdm(items, desc="checking", unit="item", disable=None, delay=2, leave=False) as bar:
        sound = [whole for item in bar if (whole := check.item(item)) is not None]
    for name in sorted(files - check.named):
        check.note(_shown("image", name, naming), Fault("without annotation", "no item names it"))
    return Checked(len(items), tuple(check.problems), tuple(sound))


def write_fixed(checked: Checked, path: Path) -> Path:
    """Write the sound items to `path`, and next to it what was dropped and why; returns the path of the latter. Raises VesselError."""
    dropped = dropped_path(path)
    said = [msgspec.to_builtins(DroppedItem(p.kind, p.place, p.found, KINDS[p.kind])) for p in checked.problems]
    try:
        for file, content in ((dropped, said), (path, list(checked.sound))):
            with writing(file), replacing(file) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
    except BaseException:
        dropped.unlink(missing_ok=True)  # useless alone, and it would block the next try
        raise
    return dropped


def dropped_path(path: Path) -> Path:
    """Where `write_fixed` writes what was dropped. Raises VesselError if either file exists."""
    dropped = path.with_suffix(".dropped.json") if path.name else path
    for file in (path, dropped):
        if os.path.lexists(file):
            raise VesselError(f"{file}: already exists; name a new file with --fix")
    return dropped


class _Check:
    """The check of one file, item by item."""

    def __init__(self, images: Path, naming: Naming) -> None:
        self._images, self._naming = images, naming
        self.problems: list[Problem] = []
        self.named: set[str] = set()
        self._sizes: dict[str, tuple[int, int] | Fault] = {}
        self._seen: dict[str, set[str]] = defaultdict(set)

    def note(self, place: str, fault: Fault) -> None:
        where = place if fault.object is None else f"{place}, object {fault.object}"
        self.problems.append(Problem(fault.kind, where, fault.found))

    def item(self, item: Item) -> dict[str, Any] | None:
        """The sound part of an item; None if there is none."""
        name = item.image
        if name is None:
            self.note(f"item {item.number}", item.faults[0])
            return None
        place = _shown(f"item {item.number}", name, self._naming)
        again = name in self.named
        self.named.add(name)
        size = self._size(name)
        if isinstance(size, Fault):
            self.note(place, size)
            return None
        for fault in item.faults:
            self.note(place, fault)
        found = [whole for drawn in item.objects if (whole := self._inside(drawn, size, place)) is not None]
        if again and found:
            said = all(_key(drawn) in self._seen[name] for drawn in found)
            self.note(place, Fault("duplicate image" if said else "image named twice", "an earlier item is about this image"))
            if said:
                return None
        objects = [drawn for drawn in found if self._is_new(name, drawn, place)]
        sound: dict[str, Any] = item.content | {
            "mask": [list(drawn.polygons) for drawn in objects],
            "text": [drawn.text for drawn in objects],
        }
        return sound if objects else None

    def _inside(self, drawn: Drawn, size: tuple[int, int], place: str) -> Drawn | None:
        """The object with its polygons that cover pixels of the image; None if none does."""
        sound = []
        for polygon in drawn.polygons:
            kind, found = polygon_fault(polygon, size) or (None, "")
            if kind:
                self.note(place, Fault(kind, found, drawn.number))
            if kind in (None, *NOTES):
                sound.append(polygon)
        return dataclasses.replace(drawn, polygons=tuple(sound)) if sound else None

    def _is_new(self, name: str, drawn: Drawn, place: str) -> bool:
        key = _key(drawn)
        if key in self._seen[name]:
            self.note(place, Fault("duplicate object", "an earlier object of this image is the same", drawn.number))
            return False
        self._seen[name].add(key)
        return True

    def _size(self, name: str) -> tuple[int, int] | Fault:
        if name not in self._sizes:
            self._sizes[name] = _size_of(self._images / name)
        return self._sizes[name]


def _size_of(path: Path) -> tuple[int, int] | Fault:
    """Width and height of a readable image, or its fault, without its name."""
    try:
        require_regular(path)
        return read_image(path).size
    except ImageError as e:
        return Fault("unreadable image", str(e))
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:
            return Fault("missing image", "its name is too long for a file")
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return Fault("missing image", "no such file")
        return Fault("unreadable image", e.strerror or type(e).__name__)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and os.path.isfile(path)


def _key(drawn: Drawn) -> str:
    """Equal for equal objects."""
    return json.dumps([concept_of(drawn.text), drawn.polygons])


def _shown(what: str, name: str, naming: Naming) -> str:
    if naming.show_names:
        return f"{what} ({printable(name)})"
    code = naming.codes.code(stem_of(Path(name)))
    remember(name, code)
    return f"{what} ({code})"

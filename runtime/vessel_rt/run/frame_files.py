"""The files of a run's frames in masks/, overlays/, previews/ and cines/: found, compared with their hashes, removed.

Does not know which frames are done; the journal does.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from vessel_rt.errors import VesselError
from vessel_rt.inputs.frames import Frame
from vessel_rt.inputs.pseudonyms import CODE_DIGITS
from vessel_rt.io.files import is_temporary, open_regular, replacing
from vessel_rt.results.reader import cine_place
from vessel_rt.results.schema import CINES, MASKS, OVERLAYS, PREVIEWS
from vessel_rt.results.writer import Entry, preview_file

__all__ = ["FrameFiles", "is_cut_short", "listed", "sha256_if_readable"]

_KINDS = (MASKS, OVERLAYS, PREVIEWS)
_CODE = re.compile(rf"[0-9a-f]{{{CODE_DIGITS}}}(_frame_\d+)?")
_LONGEST_NAME = 255  # bytes, on common file systems
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"


class FrameFiles:
    """The files of `frames` in the output folder `folder`. Files are named relative to it: `masks/a.png`."""

    def __init__(self, folder: Path, frames: Sequence[Frame]) -> None:
        self._folder = folder
        self._frames = {frame.name: frame for frame in frames}
        self._folded = {frame.name.casefold(): frame.name for frame in frames}
        self._coded = {frame.code: frame.name for frame in frames}

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Every existing file whose name is that of an output of these frames, with the name of its frame."""
        for kind in _KINDS:
            for file in os.listdir(self._folder / kind) if (self._folder / kind).is_dir() else ():
                stem, suffix = os.path.splitext(file)
                name = self._coded.get(stem) if kind == PREVIEWS else self._frame_of(stem)
                if name and suffix in (".png", ".jpg"):
                    yield f"{kind}/{file}", name

    def _frame_of(self, stem: str) -> str | None:
        """The frame that can have a mask or an overlay of this name."""
        first, _, number = stem.casefold().rpartition("_")
        return self._folded.get(stem.casefold()) or (self._folded.get(first) if number.isdecimal() else None)

    def collide_with(self, entry: Entry) -> bool:
        """Whether a further mask of `entry` has the name of another frame, which was added to the inputs later."""
        masks = (file for file in listed(entry) if file.startswith(f"{MASKS}/"))
        stems = (os.path.splitext(file.partition("/")[2])[0].casefold() for file in masks)
        return any(self._folded.get(stem, entry.name) != entry.name for stem in stems)

    def check_inputs(self, entries: Iterable[Entry]) -> None:
        """Raise VesselError if an input of the run is a file of `entries`."""
        results = {file for entry in entries for file in listed(entry)}
        folders = {(self._folder / kind).resolve(): kind for kind in _KINDS}
        for frame in self._frames.values():
            path = Path(os.path.realpath(frame.path))  # resolve() fails on circular links
            if path.parent in folders and f"{folders[path.parent]}/{path.name}" in results:
                raise VesselError(f"{frame.shown}: is both an input and a result that would be overwritten; choose another -o")

    def make_folders(self) -> None:
        """Create the folders of the files."""
        for kind in _KINDS:
            (self._folder / kind).mkdir(exist_ok=True)

    def remove(self, entries: Iterable[Entry], kept: Collection[str]) -> None:
        """Remove the files of `entries`, except for those in `kept`.

        A mask that somebody edited is renamed instead, since it may be hours of work.
        """
        for entry in entries:
            for file, sha256 in listed(entry).items():
                path = self._folder / file
                if file in kept or not os.path.lexists(path):
                    continue
                if path.is_dir() or (file.startswith(MASKS) and sha256_if_readable(path) != sha256 and not is_cut_short(path)):
                    os.replace(path, _free_name(path))
                else:
                    path.unlink()

    def remove_cines(self, entries: Iterable[Entry]) -> None:
        """Remove the TIFFs and animations of the cines that `entries` are of."""
        cines = {place.name for entry in entries if (place := cine_place(entry.lines[0]))}
        for path in (self._folder / CINES).glob("*"):
            first, _, number = path.stem.rpartition("_")
            if path.suffix in (".tif", ".webp") and (path.stem in cines or (first in cines and number.isdecimal())):
                path.unlink()

    def remove_unfinished(self, done: Collection[str]) -> None:
        """Remove temporary files, and the files of frames that are not `done`: they were in progress when a run ended."""
        for kind in (".", *_KINDS, CINES):
            for path in (self._folder / kind).glob(".*.tmp"):
                if is_temporary(path):
                    path.unlink(missing_ok=True)
        for file, name in self:
            if name not in done:
                (self._folder / file).unlink(missing_ok=True)

    def copy_previews(self, entries: Iterable[Entry]) -> list[str]:
        """Copy the previews of `entries` to today's study codes if the key has changed. Returns the files with the old codes."""
        copied = []
        for entry in entries:
            now = preview_file(self._frames[entry.name].code)
            for file in listed(entry):
                if file.startswith(f"{PREVIEWS}/") and file != now:
                    with replacing(self._folder / now) as temporary:
                        shutil.copyfile(self._folder / file, temporary)
                    copied.append(file)
        return copied

    def remove_previews_of_other_keys(self, done: Collection[str]) -> None:
        """Remove every file that is named like a preview and is not one of the frames that are `done`.

        If a run is killed and continued with another key, the frames in progress have previews under codes that nobody knows any more.
        """
        kept = {preview_file(self._frames[name].code) for name in done}
        for path in (self._folder / PREVIEWS).glob("*.jpg"):
            if _CODE.fullmatch(path.stem) and f"{PREVIEWS}/{path.name}" not in kept:
                path.unlink()


def listed(entry: Entry) -> dict[str, str]:
    """The files of an entry, with their hashes."""
    return {file: sha256 for line in entry.lines for file, sha256 in line["files"].items()}


def is_cut_short(path: Path) -> bool:
    """Whether a file is what a power failure can leave: empty, only zeros, or a PNG without its end. No editor saves such a file."""
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError:
        return False
    return not content.strip(b"\0") or (content.startswith(_PNG) and _PNG_END not in content)


def sha256_if_readable(path: Path) -> str | None:
    """The SHA-256 of a file's content, or None if it is not a regular file that can be read."""
    try:
        with open_regular(path) as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return None


def _free_name(path: Path) -> Path:
    """The first of `<name>.changed`, `<name>.changed2` ... that does not exist. A name that would be too long is shortened."""
    for number in itertools.count(1):
        ending, name = f".changed{number if number > 1 else ''}", path.name
        while len(os.fsencode(name + ending)) > _LONGEST_NAME:
            name = name[:-1]
        if not os.path.lexists(path.with_name(name + ending)):
            return path.with_name(name + ending)
    raise AssertionError

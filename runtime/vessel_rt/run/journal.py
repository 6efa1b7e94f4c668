"""The account that a run keeps: what is done already, what is left to do, and how the two become results.jsonl.

While a run goes on, `journal.jsonl` has an entry for each frame that is done, in the order in which they were done; it survives whatever
ends the run. Ending well or badly, the run makes results.jsonl and timings.jsonl of it, in the order of the inputs. So an output folder
tells at any time which frames need not be done again: those whose input, settings and output files are still what their entry says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tqdm import tqdm

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.inputs.frames import Frame, cine_of, input_sha256
from vessel_rt.inputs.pseudonyms import CODE_DIGITS
from vessel_rt.io.files import is_temporary, open_regular, replacing, sync, writing
from vessel_rt.io.folder_lock import FolderLock
from vessel_rt.results.reader import JOURNAL_FILE, RESULTS_FILE, TIMINGS_FILE
from vessel_rt.results.schema import CINES, MASKS, OVERLAYS, PREVIEWS, check_entry
from vessel_rt.results.writer import Entry, is_blank, preview_file
from vessel_rt.run.earlier import DERIVED, Earlier

__all__ = ["Record"]

_KINDS = (MASKS, OVERLAYS, PREVIEWS)
_SYNC_SECONDS = 5.0  # between two syncs of the journal
_HASHING = 4  # threads
_LONGEST_NAME = 255  # bytes, on every usual file system
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"
_CODE = re.compile(rf"[0-9a-f]{{{CODE_DIGITS}}}(_frame_\d+)?")
_NAMED = 3  # frames, in a message


class Record:
    """The entries of one output folder. Making the object looks at the folder, `resume` says what is left to do, entering it begins.

    Args:
        lock: of the folder; held until the run ends.
        earlier: what is in the folder.
        frames: the frames of the run.
        overwrite: forget what is done; entering removes what earlier runs wrote, and nothing else.
        prune: forget what is done of frames that this run does not have.

    Raises:
        VesselError: the folder holds something that would be overwritten and that no run wrote, results of frames that this run does not
            have, or an input of this run among its results.
    """

    def __init__(self, lock: FolderLock, earlier: Earlier, frames: Sequence[Frame], overwrite: bool = False, prune: bool = False) -> None:
        self._lock, self.folder, self._overwrite = lock, lock.folder, overwrite
        self._frames = {frame.name: frame for frame in frames}
        self._folded = {name.casefold(): name for name in self._frames}
        self._coded = {frame.code: frame.name for frame in frames}
        self._earlier, self._whole = earlier.entries, not earlier.warnings
        self._was_killed = bool(earlier.planned)
        self._kept: dict[str, Entry] = {}
        self._stale = set(self._earlier)
        self.unread: dict[str, str] = {}
        self._check_foreign(earlier)
        if not (earlier.found or overwrite or is_blank(self.folder)):
            raise VesselError(
                f"{self.folder}: not empty, and holds no run's results; choose another output folder with -o, or allow it with --overwrite"
            )
        if not (overwrite or prune):
            self._check_gone()
        self._check_inputs()

    def resume(self, settings: str, questions: Sequence[str]) -> list[Frame]:
        """The frames that are left to do, under these settings. `unread` tells, by name, why an input cannot be read whose frame is kept.

        Raises:
            VesselError: earlier results were made with other settings.
        """
        if not self._overwrite:
            made = {entry.lines[0]["settings"] for entry in self._earlier.values()}
            if made - {settings}:
                raise VesselError(
                    f"{self.folder}: holds results of another bundle, device, question or version; "
                    "choose another output folder with -o, or replace them with --overwrite"
                )
            self._kept = {entry.name: entry for entry in self._unchanged(list(questions))}
            self._stale -= set(self._kept)
        return [frame for frame in self._frames.values() if frame.name not in self._kept]

    @property
    def kept(self) -> Collection[Entry]:
        """The entries of frames that need not be done again."""
        return self._kept.values()

    @property
    def is_settled(self) -> bool:
        """Whether results.jsonl and timings.jsonl are already what they would become of `kept`."""
        same = all(self._in_place(line, entry.name) == line for entry in self.kept for line in entry.lines)
        return self._whole and same and not self._stale and not (self.folder / JOURNAL_FILE).exists()

    def __enter__(self) -> Self:
        self._lock.check()
        with contextlib.ExitStack() as stack, writing(self.folder):
            for name in _KINDS:
                (self.folder / name).mkdir(exist_ok=True)
            self._remove_stale()
            renamed = self._copy_previews()
            with replacing(self.folder / JOURNAL_FILE, sync=True) as temporary:
                self._journal = stack.enter_context(temporary.open("x+b", buffering=0))
                self._places: dict[str, int] = {}
                _write_whole(self._journal, {"planned": list(self._frames)})
                for entry in self._kept.values():
                    self._note(self._today(entry))
            self._synced = time.monotonic()
            for name in (RESULTS_FILE, TIMINGS_FILE, *DERIVED, *renamed):  # only now that the journal has what is kept of them
                (self.folder / name).unlink(missing_ok=True)
            if self._was_killed:
                self._remove_previews_of_other_keys()
            self._remove_leftovers()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._stack, writing(self.folder / RESULTS_FILE):
            self._lock.check()
            sync(self._journal.fileno())
            self._remove_leftovers()
            for file, lines in ((RESULTS_FILE, "lines"), (TIMINGS_FILE, "timings")):
                with replacing(self.folder / file, sync=True) as temporary, temporary.open("wb", buffering=0) as target:
                    for entry in self._in_order():
                        for line in getattr(entry, lines):
                            _write_whole(target, self._in_place(line, entry.name))
            (self.folder / JOURNAL_FILE).unlink(missing_ok=True)

    def add(self, entry: Entry) -> None:
        """Note that a frame is done. Where there is no space left, nothing of the entry is noted. Raises VesselError."""
        self._lock.check()
        before = self._journal.tell()
        with writing(self.folder / JOURNAL_FILE):
            try:
                self._note(entry)
            except OSError:
                self._journal.truncate(before)
                self._journal.seek(before)
                raise
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                sync(self._journal.fileno())
                self._synced = time.monotonic()

    def _note(self, entry: Entry) -> None:
        place = self._journal.tell()
        _write_whole(self._journal, dataclasses.asdict(entry))
        self._places[entry.name] = place

    def _in_order(self) -> Iterator[Entry]:
        """What is done, in the order of the inputs; one at a time, since masks take memory. The journal may be gone from the folder."""
        with os.fdopen(os.dup(self._journal.fileno()), "rb") as journal:
            for name in sorted(self._places, key=lambda name: self._frames[name].index):
                journal.seek(self._places[name])
                try:
                    value = json.loads(journal.readline())
                    check_entry(value)
                except (ValueError, RecursionError) as e:
                    raise VesselError(f"{self.folder / JOURNAL_FILE}: was changed while the run wrote it; it is left as it is") from e
                yield Entry(**value)

    def _in_place(self, line: dict[str, Any], name: str) -> dict[str, Any]:
        """A line with what inputs and key say today: there may be more files than when it was made."""
        frame = self._frames[name]
        today: dict[str, Any] = {"index": frame.index, "image": frame.image, "code": frame.code}
        if "files" in line:
            now = preview_file(frame.code)
            today["files"] = {now if file.startswith(f"{PREVIEWS}/") else file: sha256 for file, sha256 in line["files"].items()}
        return line | {key: value for key, value in today.items() if key in line}

    def _today(self, entry: Entry) -> Entry:
        lines, timings = ([self._in_place(line, entry.name) for line in of_entry] for of_entry in (entry.lines, entry.timings))
        return Entry(entry.name, lines, timings)

    def _check_foreign(self, earlier: Earlier) -> None:
        """Make sure that nothing is overwritten but what an earlier run wrote, or was about to write."""
        ours = {file for entry in self._earlier.values() for file in _listed(entry)}
        begun = earlier.planned - self._earlier.keys()
        foreign = [
            (file, name)
            for file, name in self._files_of_frames()
            if file not in ours and name not in begun
            if not (file.startswith(f"{PREVIEWS}/") and name in self._earlier)  # a run was killed while it changed study codes
        ]
        others = [] if earlier.found else [name for name in (TIMINGS_FILE, *DERIVED) if (self.folder / name).exists()]
        places = [*dict.fromkeys(f"{file.partition('/')[0]}/" for file, _ in foreign), *others]
        if places:
            whose = f"{len(foreign)} files that no {RESULTS_FILE} lists, of {self._frames[foreign[0][1]].shown} for one" if foreign else ""
            raise VesselError(
                f"{self.folder}: {whose or f'there is no {RESULTS_FILE}, but what tells of one'} would be overwritten; "
                f"move {', '.join(places)} away, or choose another output folder with -o"
            )

    def _check_gone(self) -> None:
        """Refuse to forget results of frames that this run does not have; one that failed has none."""
        gone = [entry for name, entry in self._earlier.items() if name not in self._frames and entry.error is None]
        if gone:
            named = ", ".join(entry.lines[0]["code"] for entry in gone[:_NAMED]) + (" ..." if len(gone) > _NAMED else "")
            raise VesselError(
                f"{self.folder}: holds results of {len(gone)} frames that are not among these inputs ({named}); remove these with --prune, "
                "choose another output folder with -o, or replace all with --overwrite"
            )

    def _check_inputs(self) -> None:
        listed = {file for entry in self._earlier.values() for file in _listed(entry)}
        folders = {(self.folder / kind).resolve(): kind for kind in _KINDS}
        for frame in self._frames.values():
            path = Path(os.path.realpath(frame.path))  # resolve() fails where links go round in a circle
            if path.parent in folders and f"{folders[path.parent]}/{path.name}" in listed:
                raise VesselError(f"{frame.shown}: is both an input and a result that would be overwritten; choose another -o")

    def _files_of_frames(self) -> Iterator[tuple[str, str]]:
        """Every file there that is called as an output of this run's frames is: with the frame's name."""
        for kind in _KINDS:
            for file in os.listdir(self.folder / kind) if (self.folder / kind).is_dir() else ():
                stem, suffix = os.path.splitext(file)
                name = self._coded.get(stem) if kind == PREVIEWS else self._frame_of(stem)
                if name and suffix in (".png", ".jpg"):
                    yield f"{kind}/{file}", name

    def _frame_of(self, stem: str) -> str | None:
        """The frame that has or may get a mask or an overlay of this name."""
        first, _, number = stem.casefold().rpartition("_")
        return self._folded.get(stem.casefold()) or (self._folded.get(first) if number.isdecimal() else None)

    def _unchanged(self, questions: list[str]) -> list[Entry]:
        """The earlier entries that are still true, and those that are all there whose inputs cannot be read now."""
        good = [
            entry
            for name, entry in self._earlier.items()
            if name in self._frames and entry.error is None and not self._is_in_the_way(entry)
            if [line["question"] for line in entry.lines] == questions
        ]
        inputs = functools.lru_cache(maxsize=None)(input_sha256)  # a cine has many frames
        with ThreadPoolExecutor(_HASHING) as pool:
            checked = pool.map(lambda entry: self._holds(entry, inputs), good)
            held = tqdm(checked, desc="checking what is done", total=len(good), unit="frame", disable=None, delay=2, leave=False)
            return [entry for entry, holds in zip(good, held, strict=True) if holds]

    def _is_in_the_way(self, entry: Entry) -> bool:
        """Whether one of its further masks is called as another frame is, which was not among the inputs then."""
        masks = (file for file in _listed(entry) if file.startswith(f"{MASKS}/"))
        stems = (os.path.splitext(file.partition("/")[2])[0].casefold() for file in masks)
        return any(self._folded.get(stem, entry.name) != entry.name for stem in stems)

    def _holds(self, entry: Entry, inputs: Callable[[Path], str]) -> bool:
        try:
            if any(line["input"] != inputs(self._frames[entry.name].path) for line in entry.lines):
                return False
        except ImageError as e:  # says nothing of what was done; it may be readable again tomorrow
            there = all((self.folder / file).is_file() and not _is_cut_short(self.folder / file) for file in _listed(entry))
            if there:
                self.unread[entry.name] = str(e)
            return there
        return all(_sha256(self.folder / file) == sha256 for file, sha256 in _listed(entry).items())

    def _remove_stale(self) -> None:
        """Remove the files of entries that are not kept. A mask that somebody has changed stays, renamed: it may be a day's work."""
        kept = {file for entry in self._kept.values() for file in _listed(entry)}
        for name in self._stale:
            for file, sha256 in _listed(self._earlier[name]).items():
                path = self.folder / file
                if file in kept or not os.path.lexists(path):
                    continue
                if path.is_dir() or (file.startswith(MASKS) and _sha256(path) != sha256 and not _is_cut_short(path)):
                    os.replace(path, _name_beside(path))
                else:
                    path.unlink()
        cines = {cine_of(name, line["frame"]) for name in self._earlier for line in self._earlier[name].lines if line["frame"] is not None}
        for path in (self.folder / CINES).glob("*.tif"):
            first, _, number = path.stem.rpartition("_")
            if path.stem in cines or (first in cines and number.isdecimal()):
                path.unlink()

    def _copy_previews(self) -> list[str]:
        """Copy the previews of kept entries to today's study codes, if the key is another one; returns the files with the old codes."""
        copied = []
        for entry in self._kept.values():
            now = preview_file(self._frames[entry.name].code)
            for file in _listed(entry):
                if file.startswith(f"{PREVIEWS}/") and file != now:
                    with replacing(self.folder / now) as temporary:
                        shutil.copyfile(self.folder / file, temporary)
                    copied.append(file)
        return copied

    def _remove_previews_of_other_keys(self) -> None:
        """Remove the previews of frames that were in progress when a run with another key was killed: no entry lists them."""
        listed = {preview_file(self._frames[name].code) for name in self._places}
        for path in (self.folder / PREVIEWS).glob("*.jpg"):
            if _CODE.fullmatch(path.stem) and f"{PREVIEWS}/{path.name}" not in listed:
                path.unlink()

    def _remove_leftovers(self) -> None:
        """Remove the files of frames that have no entry: what was in work when a run was cut short."""
        for kind in (".", *_KINDS, CINES):
            for path in (self.folder / kind).glob(".*.tmp"):
                if is_temporary(path):
                    path.unlink(missing_ok=True)
        for file, name in self._files_of_frames():
            if name not in self._places:
                (self.folder / file).unlink(missing_ok=True)


def _listed(entry: Entry) -> dict[str, str]:
    """The files that an entry lists, with their hashes."""
    return {file: sha256 for line in entry.lines for file, sha256 in line["files"].items()}


def _name_beside(path: Path) -> Path:
    """`<name>.changed`, `<name>.changed2` ...: the first that is free. A name that becomes too long loses its end."""
    for number in itertools.count(1):
        ending, name = f".changed{number if number > 1 else ''}", path.name
        while len(os.fsencode(name + ending)) > _LONGEST_NAME:
            name = name[:-1]
        if not os.path.lexists(path.with_name(name + ending)):
            return path.with_name(name + ending)
    raise AssertionError


def _write_whole(file: IO[bytes], line: dict[str, Any]) -> None:
    """All of a line, or OSError."""
    text = json.dumps(line).encode() + b"\n"
    while text:
        text = text[file.write(text) :]


def _is_cut_short(path: Path) -> bool:
    """Whether a file is what a power failure leaves of one: nothing, zeros, or a PNG without its end. No editor saves such a file."""
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError:
        return False
    return not content.strip(b"\0") or (content.startswith(_PNG) and _PNG_END not in content)


def _sha256(path: Path) -> str | None:
    """Of a file's content; None where there is no regular file to read."""
    try:
        with open_regular(path) as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return None

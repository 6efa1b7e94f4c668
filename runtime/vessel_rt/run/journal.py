"""The journal of a run: which frames are done, which are left to do, and results.jsonl made from it.

During a run, `journal.jsonl` gets an entry for each finished frame. However the run ends, results.jsonl and timings.jsonl are made from the
journal, in the order of the inputs; after a kill or a power failure the next run reads the journal itself. A frame is done if its input,
its settings and all its output files are still those of its entry. Does not know how frames are segmented.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from tqdm import tqdm

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.inputs.frames import Frame, input_sha256
from vessel_rt.io.files import replacing, sync, writing
from vessel_rt.io.folder_lock import FolderLock
from vessel_rt.results.reader import JOURNAL_FILE, RESULTS_FILE, TIMINGS_FILE
from vessel_rt.results.schema import PREVIEWS, SCHEMA, ResultLine, TimingLine, check_entry
from vessel_rt.results.writer import Entry, is_blank, preview_file, series_record
from vessel_rt.run.earlier import DERIVED, Earlier
from vessel_rt.run.frame_files import FrameFiles, is_cut_short, listed, sha256_if_readable

__all__ = ["Record"]

_SYNC_SECONDS = 5.0  # between two syncs of the journal
_HASHING = 4  # threads
_NAMED = 3  # frames in a message, at most


class Record:
    """The entries of one output folder.

    Creating the object checks the folder, `resume` returns the frames that are left, and entering it starts the journal.

    Args:
        lock: of the folder; held until the run ends.
        earlier: the content of the folder.
        frames: the frames of the run.
        overwrite: do all frames again; entering removes what earlier runs wrote, and nothing else.
        prune: remove the results of frames that are not in this run.

    Raises:
        VesselError: a file that no run wrote would be overwritten, the folder has results of frames that are not in this run, or an input
            is one of the results.
    """

    def __init__(self, lock: FolderLock, earlier: Earlier, frames: Sequence[Frame], overwrite: bool = False, prune: bool = False) -> None:
        self._lock, self.folder, self._overwrite = lock, lock.folder, overwrite
        self._frames, self._files = {frame.name: frame for frame in frames}, FrameFiles(lock.folder, frames)
        self._earlier, self._complete = earlier.entries, not earlier.warnings
        self._was_killed = bool(earlier.planned)
        self._kept: dict[str, Entry] = {}
        self._stale = set(self._earlier)
        self.unread: dict[str, str] = {}
        self._check_foreign(earlier)
        if not (earlier.found or overwrite or is_blank(self.folder)):
            raise VesselError(
                f"{self.folder}: not empty, and has no results of a run; choose another output folder with -o, or allow it with --overwrite"
            )
        if not (overwrite or prune):
            self._check_gone()
        self._files.check_inputs(self._earlier.values())

    def resume(self, settings: str, questions: Sequence[str], *, cines: bool = False) -> list[Frame]:
        """The frames that are left to do with these settings. With `cines`, the frames of a cine are done all or not at all, and again if
        one of them is no longer among the frames.

        `unread` then has the frames whose results are kept although their inputs cannot be read: the error, by name.

        Raises:
            VesselError: earlier results were made with other settings.
        """
        if not self._overwrite:
            made = {entry.lines[0]["settings"] for entry in self._earlier.values()}
            if made - {settings}:
                raise VesselError(
                    f"{self.folder}: has results of another bundle, device, question or version; "
                    "choose another output folder with -o, or replace them with --overwrite"
                )
            self._kept = {entry.name: entry for entry in self._unchanged(list(questions))}
            if cines:
                left = {frame.cine for frame in self._frames.values() if frame.name not in self._kept}
                gone = (entry.lines[0].get("series") for name, entry in self._earlier.items() if name not in self._frames)
                left.update(series["name"] for series in gone if series)
                self._kept = {name: entry for name, entry in self._kept.items() if self._frames[name].cine not in left}
                self.unread = {name: error for name, error in self.unread.items() if name in self._kept}
            self._stale -= set(self._kept)
        return [frame for frame in self._frames.values() if frame.name not in self._kept]

    @property
    def kept(self) -> Collection[Entry]:
        """The entries of the frames that are done already."""
        return self._kept.values()

    @property
    def is_settled(self) -> bool:
        """Whether results.jsonl and timings.jsonl exist and would not change if they were made from `kept`."""
        same = all(self._updated(entry).lines == entry.lines for entry in self.kept)
        return self._complete and same and not self._stale and not (self.folder / JOURNAL_FILE).exists()

    def __enter__(self) -> Self:
        self._lock.check()
        with contextlib.ExitStack() as stack, writing(self.folder):
            self._files.make_folders()
            self._files.remove([self._earlier[name] for name in self._stale], {file for entry in self.kept for file in listed(entry)})
            self._files.remove_cines(self._earlier.values())
            renamed = self._files.copy_previews(self.kept)
            with replacing(self.folder / JOURNAL_FILE, sync=True) as temporary:
                self._journal = stack.enter_context(temporary.open("x+b", buffering=0))
                self._places: dict[str, int] = {}
                _write_whole(self._journal, {"schema": SCHEMA, "planned": list(self._frames)})
                for entry in self.kept:
                    self._append(self._updated(entry))
            self._synced = time.monotonic()
            for name in (RESULTS_FILE, TIMINGS_FILE, *DERIVED, *renamed):  # not earlier: until here the kept entries were only there
                (self.folder / name).unlink(missing_ok=True)
            if self._was_killed:
                self._files.remove_previews_of_other_keys(self._places)
            self._files.remove_unfinished(self._places)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._stack, writing(self.folder / RESULTS_FILE):
            self._lock.check()
            sync(self._journal.fileno())
            self._files.remove_unfinished(self._places)
            for file, lines in ((RESULTS_FILE, "lines"), (TIMINGS_FILE, "timings")):
                with replacing(self.folder / file, sync=True) as temporary, temporary.open("wb", buffering=0) as target:
                    for entry in self._in_order():
                        for line in getattr(entry, lines):
                            _write_whole(target, line)
            (self.folder / JOURNAL_FILE).unlink(missing_ok=True)

    def add(self, entry: Entry) -> None:
        """Add the entry of a finished frame. On a full disk nothing of it is added. Raises VesselError."""
        self._lock.check()
        before = self._journal.tell()
        with writing(self.folder / JOURNAL_FILE):
            try:
                self._append(entry)
            except OSError:
                self._journal.truncate(before)
                self._journal.seek(before)
                raise
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                sync(self._journal.fileno())
                self._synced = time.monotonic()

    def _append(self, entry: Entry) -> None:
        place = self._journal.tell()
        _write_whole(self._journal, vars(entry))  # asdict would copy every mask
        self._places[entry.name] = place

    def _in_order(self) -> Iterator[Entry]:
        """The entries in the order of the inputs, one at a time, since masks take memory. The file may be gone from the folder."""
        with os.fdopen(os.dup(self._journal.fileno()), "rb") as journal:
            for name in sorted(self._places, key=lambda name: self._frames[name].index):
                journal.seek(self._places[name])
                try:
                    value = check_entry(json.loads(journal.readline()))
                except (ValueError, RecursionError) as e:
                    raise VesselError(f"{self.folder / JOURNAL_FILE}: was changed while the run wrote it; it is left as it is") from e
                yield Entry.of(value)

    def _updated(self, entry: Entry) -> Entry:
        """`entry` with the frame's current index and study code: inputs may have been added since, or the key changed."""
        frame = self._frames[entry.name]
        names = {file: preview_file(frame.code) for file in listed(entry) if file.startswith(f"{PREVIEWS}/")}
        lines: list[ResultLine] = [
            {
                **line,
                "index": frame.index,
                "image": frame.image,
                "code": frame.code,
                **_series_of(line, frame),
                "files": {names.get(file, file): sha256 for file, sha256 in line["files"].items()},
            }
            for line in entry.lines
        ]
        timings: list[TimingLine] = [{**timing, "index": frame.index, "code": frame.code} for timing in entry.timings]
        return Entry(entry.name, lines, timings)

    def _check_foreign(self, earlier: Earlier) -> None:
        """Make sure that the run overwrites only files that an earlier run wrote, or was about to write."""
        ours = {file for entry in self._earlier.values() for file in listed(entry)}
        in_progress = earlier.planned - self._earlier.keys()
        foreign = [
            (file, name)
            for file, name in self._files
            if file not in ours and name not in in_progress
            if not (file.startswith(f"{PREVIEWS}/") and name in self._earlier)  # a run was killed while it changed study codes
        ]
        others = [] if earlier.found else [name for name in (TIMINGS_FILE, *DERIVED) if (self.folder / name).exists()]
        places = [*dict.fromkeys(f"{file.partition('/')[0]}/" for file, _ in foreign), *others]
        if places:
            example = self._frames[foreign[0][1]].shown if foreign else ""
            what = (
                f"{len(foreign)} files that no {RESULTS_FILE} lists (for example of {example})"
                if foreign
                else f"files whose {RESULTS_FILE} is missing"
            )
            raise VesselError(
                f"{self.folder}: {what} would be overwritten; move {', '.join(places)} away, or choose another output folder with -o"
            )

    def _check_gone(self) -> None:
        """Refuse to remove results of frames that are not in this run. Failed frames have none."""
        gone = [entry for name, entry in self._earlier.items() if name not in self._frames and entry.error is None]
        if gone:
            named = ", ".join(entry.lines[0]["code"] for entry in gone[:_NAMED]) + (" ..." if len(gone) > _NAMED else "")
            raise VesselError(
                f"{self.folder}: has results of {len(gone)} frames that are not among these inputs ({named}); remove these with --prune, "
                "choose another output folder with -o, or replace all with --overwrite"
            )

    def _unchanged(self, questions: list[str]) -> list[Entry]:
        """The earlier entries that are still valid, and complete ones whose inputs cannot be read now."""
        good = [
            entry
            for name, entry in self._earlier.items()
            if name in self._frames and entry.error is None and not self._files.collide_with(entry)
            if [line["question"] for line in entry.lines] == questions
        ]
        inputs = functools.lru_cache(maxsize=None)(input_sha256)  # a cine has many frames
        with ThreadPoolExecutor(_HASHING) as pool:
            checked = pool.map(lambda entry: self._is_valid(entry, inputs), good)
            valid = tqdm(checked, desc="checking finished frames", total=len(good), unit="frame", disable=None, delay=2, leave=False)
            return [entry for entry, is_valid in zip(good, valid, strict=True) if is_valid]

    def _is_valid(self, entry: Entry, inputs: Callable[[Path], str]) -> bool:
        """Whether input and files are those of the entry. If the input cannot be read, it is enough that the files exist."""
        files = {self.folder / file: sha256 for file, sha256 in listed(entry).items()}
        try:
            if any(line["input"] != inputs(self._frames[entry.name].path) for line in entry.lines):
                return False
        except ImageError as e:  # it may be readable again tomorrow
            complete = all(path.is_file() and not is_cut_short(path) for path in files)
            if complete:
                self.unread[entry.name] = str(e)
            return complete
        return all(sha256_if_readable(path) == sha256 for path, sha256 in files.items())


def _series_of(line: ResultLine, frame: Frame) -> ResultLine:
    """The frame's place in its series under today's study code, for lines that have it."""
    return cast(ResultLine, {"series": series_record(frame)} if "series" in line else {})


def _write_whole(file: IO[bytes], line: dict[str, Any]) -> None:
    """Write all of a line, or raise OSError."""
    text = json.dumps(line).encode() + b"\n"
    while text:
        text = text[file.write(text) :]

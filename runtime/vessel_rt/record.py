"""The account that a run keeps: what is done already, what is left to do, and how the two become results.jsonl.

While a run goes on, `journal.jsonl` has an entry for each frame that is done, in the order in which they were done; it survives whatever
ends the run. Ending well or badly, the run makes results.jsonl and timings.jsonl of it, in the order of the inputs. So an output folder
tells at any time which frames need not be done again: those whose input, settings and output files are still what their entry says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tqdm import tqdm

from vessel_rt.bundle import sha256_of
from vessel_rt.errors import ImageError, VesselError
from vessel_rt.frames import Frame, cine_of, input_sha256
from vessel_rt.outputs import CINES, MASKS, OVERLAYS, PREVIEWS, Entry, is_result_file, replacing, writing
from vessel_rt.results import EVALUATION_FILE, MEANS_FILE, METRICS_FILE, REPORT_FILE, RESULTS_FILE, RUN_FILE, TIMINGS_FILE, json_lines

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["JOURNAL_FILE", "Record"]

JOURNAL_FILE = "journal.jsonl"

_DERIVED = (
    RUN_FILE,
    REPORT_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    MEANS_FILE,
)  # tell of all results together: stale as soon as there are others

_HASHING = 4  # threads


class Record:
    """The entries of one output folder. Making the object looks at the folder, `resume` says what is left to do, entering it begins.

    Args:
        folder: made if absent, on entering.
        frames: the frames of the run.
        overwrite: forget what is done; entering removes what earlier runs wrote, and nothing else.

    Raises:
        VesselError: another run is at work in the folder, or it holds something that would be overwritten and that no run wrote, results
            of frames that this run does not have, or an input of this run among its results.
    """

    def __init__(self, folder: Path, frames: Sequence[Frame], overwrite: bool = False) -> None:
        self.folder, self._frames, self._overwrite = folder, {frame.name: frame for frame in frames}, overwrite
        self._lock = contextlib.ExitStack()
        if folder.exists() and not folder.is_dir():
            raise VesselError(f"{folder}: is a file; choose another output folder with -o")
        self._earlier, planned = self._read_earlier()
        self._kept: dict[str, Entry] = {}
        self._stale = set(self._earlier)
        ours = any((folder / name).exists() for name in (JOURNAL_FILE, RESULTS_FILE))
        strangers = [] if ours or not overwrite else [name for name in _DERIVED if (folder / name).exists()]
        if strangers:
            raise VesselError(f"{folder}: holds {strangers[0]}, but no run's results; move it away, or choose another folder with -o")
        if not (ours or overwrite) and folder.exists() and any(folder.iterdir()):
            raise VesselError(
                f"{folder}: not empty, and holds no run's results; choose another output folder with -o, or allow it with --overwrite"
            )
        strange = [name for name in self._earlier if name not in self._frames]
        if strange and not overwrite:
            raise VesselError(
                f"{folder}: holds results of {len(strange)} frames that are not among these inputs; "
                "choose another output folder with -o, or replace them all with --overwrite"
            )
        self._check_foreign(planned)
        self._check_inputs()

    def resume(self, settings: str) -> list[Frame]:
        """The frames that are left to do, under these settings.

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
            self._kept = {entry.name: entry for entry in self._unchanged()}
            self._stale -= set(self._kept)
        return [frame for frame in self._frames.values() if frame.name not in self._kept]

    @property
    def kept(self) -> Collection[Entry]:
        """The entries of frames that need not be done again."""
        return self._kept.values()

    def __enter__(self) -> Self:
        with writing(self.folder):
            for name in (MASKS, OVERLAYS, PREVIEWS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(_locked(self.folder))
            self._remove_stale()
            with replacing(self.folder / JOURNAL_FILE) as temporary:
                self._journal = self._lock.enter_context(temporary.open("xb", buffering=0))
                _write_whole(self._journal, {"planned": list(self._frames)})
                for entry in self._kept.values():
                    _write_whole(self._journal, dataclasses.asdict(entry))
            for name in (RESULTS_FILE, TIMINGS_FILE, *_DERIVED):  # only now that the journal has what is kept of them
                (self.folder / name).unlink(missing_ok=True)
            self._done = set(self._kept)
            self._remove_leftovers()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._lock, writing(self.folder / RESULTS_FILE):
            self._remove_leftovers()
            for file, lines in ((RESULTS_FILE, "lines"), (TIMINGS_FILE, "timings")):
                with replacing(self.folder / file) as temporary, temporary.open("wb", buffering=0) as target:
                    for entry in self._in_order():
                        for line in getattr(entry, lines):
                            _write_whole(target, self._in_place(line, entry.name))
            (self.folder / JOURNAL_FILE).unlink()

    def add(self, entry: Entry) -> None:
        """Note that a frame is done. Where there is no space left, nothing of the entry is noted. Raises VesselError."""
        before = self._journal.tell()
        with writing(self.folder / JOURNAL_FILE):
            try:
                _write_whole(self._journal, dataclasses.asdict(entry))
            except OSError:
                self._journal.truncate(before)
                self._journal.seek(before)
                raise
        self._done.add(entry.name)

    def _in_order(self) -> Iterator[Entry]:
        """What is done, in the order of the inputs; one at a time, since masks take memory."""
        with (self.folder / JOURNAL_FILE).open("rb") as journal:
            places, at = [], len(journal.readline())
            for text in journal:
                places.append((self._frames[json.loads(text)["name"]].index, at))
                at += len(text)
            for _, at in sorted(places):
                journal.seek(at)
                yield Entry(**json.loads(journal.readline()))

    def _in_place(self, line: dict[str, Any], name: str) -> dict[str, Any]:
        """A line with what inputs and key say today: there may be more files than when it was made."""
        frame = self._frames[name]
        today = {"index": frame.index, "image": frame.image, "code": frame.code}
        return line | {key: value for key, value in today.items() if key in line}

    def _read_earlier(self) -> tuple[dict[str, Entry], frozenset[str]]:
        """The entries of earlier runs, by name, and the names that a run that was cut short had planned."""
        journal, results, timings = (self.folder / name for name in (JOURNAL_FILE, RESULTS_FILE, TIMINGS_FILE))
        try:
            with _locked(self.folder):
                if journal.exists():
                    planned, *entries = _whole_lines(journal)
                    earlier = {entry["name"]: _checked(Entry(**entry)) for entry in entries}
                    return earlier, frozenset(planned["planned"])
                found: dict[str, Entry] = {}
                for line, timing in zip(*(_whole_lines(file) if file.exists() else [] for file in (results, timings)), strict=True):
                    entry = found.setdefault(line["name"], Entry(line["name"], [], []))
                    entry.lines.append(line)
                    entry.timings.append(timing)
                return {name: _checked(entry) for name, entry in found.items()}, frozenset()
        except (OSError, ValueError, KeyError, TypeError) as e:
            file = journal if journal.exists() else results
            raise VesselError(
                f"{file}: cut short, or not written by this version of vessel-rt; choose another output folder with -o, or delete this one"
            ) from e

    def _check_foreign(self, planned: Collection[str]) -> None:
        """Make sure that nothing is overwritten but what an earlier run wrote, or was about to write."""
        ours = {file for entry in self._earlier.values() for file in _listed(entry)}
        begun = planned - self._earlier.keys()
        for file, name in self._files_of_frames():
            if file not in ours and name not in begun:
                raise VesselError(
                    f"{self.folder}: a file in {file.partition('/')[0]}/ that {RESULTS_FILE} does not list would be overwritten by the "
                    f"results of {self._frames[name].shown}; move it away, or choose another output folder with -o"
                )

    def _check_inputs(self) -> None:
        listed = {(self.folder / file).resolve() for entry in self._earlier.values() for file in _listed(entry)}
        for frame in self._frames.values():
            if Path(os.path.realpath(frame.path)) in listed:  # resolve() fails where links go round in a circle
                raise VesselError(f"{frame.shown}: is both an input and a result that would be overwritten; choose another -o")

    def _files_of_frames(self) -> Iterator[tuple[str, str]]:
        """Every file there that is called as an output of this run's frames is: with the frame's name."""
        names = {name.casefold(): name for name in self._frames}
        for kind in (MASKS, OVERLAYS, PREVIEWS):
            for path in (self.folder / kind).glob("*"):
                stem = path.stem.casefold()
                first, _, number = stem.rpartition("_")
                name = names.get(stem) or (names.get(first) if number.isdecimal() else None)
                if name and path.suffix in (".png", ".jpg"):
                    yield f"{kind}/{path.name}", name

    def _unchanged(self) -> list[Entry]:
        """The earlier entries that are still true."""
        good = [entry for entry in self._earlier.values() if entry.error is None and not self._is_in_the_way(entry)]
        inputs = functools.lru_cache(maxsize=None)(input_sha256)  # a cine has many frames
        with ThreadPoolExecutor(_HASHING) as pool:
            checked = pool.map(lambda entry: self._holds(entry, inputs), good)
            held = tqdm(checked, desc="checking what is done", total=len(good), unit="frame", disable=None, delay=2, leave=False)
            return [entry for entry, holds in zip(good, held, strict=True) if holds]

    def _is_in_the_way(self, entry: Entry) -> bool:
        """Whether one of its further masks is called as another frame is, which was not among the inputs then."""
        names = {name.casefold() for name in self._frames if name != entry.name}
        return any(Path(file).stem.casefold() in names for file in _listed(entry))

    def _holds(self, entry: Entry, inputs: Callable[[Path], str]) -> bool:
        try:
            if any(line["input"] != inputs(self._frames[entry.name].path) for line in entry.lines):
                return False
        except ImageError:
            return False
        return all(_sha256(self.folder / file) == sha256 for line in entry.lines for file, sha256 in line["files"].items())

    def _remove_stale(self) -> None:
        """Remove the files of entries that are not kept. A mask that somebody has changed stays, renamed: it may be a day's work."""
        kept = {file for entry in self._kept.values() for file in _listed(entry)}
        for name in self._stale:
            for file, sha256 in _listed(self._earlier[name]).items():
                path = self.folder / file
                if file in kept:
                    continue
                if not self._overwrite and file.startswith(MASKS) and _sha256(path) not in (sha256, None):
                    others = (path.with_name(f"{path.name}.changed{number}") for number in itertools.chain([""], itertools.count(2)))
                    os.replace(path, next(other for other in others if not other.exists()))
                path.unlink(missing_ok=True)
        cines = {cine_of(name, line["frame"]) for name in self._earlier for line in self._earlier[name].lines if line["frame"] is not None}
        for path in (self.folder / CINES).glob("*.tif"):
            first, _, number = path.stem.rpartition("_")
            if path.stem in cines or (first in cines and number.isdecimal()):
                path.unlink()

    def _remove_leftovers(self) -> None:
        """Remove the files of frames that have no entry: what was in work when a run was cut short."""
        for kind in (".", MASKS, OVERLAYS, PREVIEWS, CINES):
            for path in (self.folder / kind).glob(".*.tmp"):
                path.unlink(missing_ok=True)
        for file, name in self._files_of_frames():
            if name not in self._done:
                (self.folder / file).unlink(missing_ok=True)


def _checked(entry: Entry) -> Entry:
    """`entry`, if it has what is looked for in it; else ValueError or KeyError."""
    for line in entry.lines:
        if not {"settings", "input", "error", "frame", "files"} <= line.keys():
            raise ValueError("keys are missing")
    return entry


def _listed(entry: Entry) -> dict[str, str]:
    """The files that an entry lists, with their hashes."""
    files = {file: sha256 for line in entry.lines for file, sha256 in line["files"].items()}
    return {file: sha256 for file, sha256 in files.items() if is_result_file(file)}


def _whole_lines(path: Path) -> list[Any]:
    """The lines of a file, but for a last one that was cut short."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return json_lines(whole.decode())


def _write_whole(file: IO[bytes], line: dict[str, Any]) -> None:
    """All of a line, or OSError."""
    text = json.dumps(line).encode() + b"\n"
    while text:
        text = text[file.write(text) :]


def _sha256(path: Path) -> str | None:
    """Of a file's content; None where there is none to read."""
    try:
        return sha256_of(path)
    except OSError:
        return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder as this process's own, as far as the system can tell: a file system without locks, or Windows, cannot.

    Raises VesselError where another process has it.
    """
    if fcntl is None or not folder.is_dir():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VesselError(f"{folder}: another run is writing here; wait for it, or choose another output folder with -o") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)

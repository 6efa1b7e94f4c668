"""What an output folder holds of earlier runs: finished frames, and those that were in progress when a run was killed.

Does not know the frames of the new run.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from vessel_rt.errors import VesselError
from vessel_rt.inputs.frames import cine_of
from vessel_rt.results.reader import (
    CINE_METRICS_FILE,
    EVALUATION_FILE,
    JOURNAL_FILE,
    MEANS_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    RUN_FILE,
    TIMINGS_FILE,
    FormError,
    iter_frames,
    iter_lines,
    iter_timings,
)
from vessel_rt.results.schema import ResultLine, TimingLine, check_entry, check_planned
from vessel_rt.results.writer import Entry, unknown_timing

__all__ = ["DERIVED", "Earlier", "read_earlier"]

# Made from all results, so out of date when one changes.
DERIVED = (RUN_FILE, REPORT_FILE, EVALUATION_FILE, METRICS_FILE, MEANS_FILE, CINE_METRICS_FILE)


@dataclasses.dataclass(frozen=True)
class Earlier:
    """`entries` by frame name; `planned`, the names of all frames of a run that was killed; `warnings` about what was lost.

    `found`: whether there are results of any run.
    """

    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    planned: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    found: bool = False

    def cines(self) -> dict[str, list[int]]:
        """The numbers of the finished frames of each multi-frame file, sorted, by the name of its outputs."""
        numbers = defaultdict(list)
        for name, entry in self.entries.items():
            number = entry.lines[0]["frame"]
            if number is not None and entry.error is None:
                numbers[cine_of(name, number)].append(number)
        return {cine: sorted(found) for cine, found in numbers.items()}


def read_earlier(folder: Path) -> Earlier:
    """Read `folder`, which this process has locked.

    Raises:
        VesselError: a file that a run would read or replace cannot be read, was edited or damaged, is of another version, or is not a
            regular file. It is left as it is.
    """
    for name in (JOURNAL_FILE, RESULTS_FILE, TIMINGS_FILE, *DERIVED):
        path = folder / name
        if path.exists() and not path.is_file():
            raise VesselError(f"{path}: not a regular file; move it away, or choose another output folder with -o")
    if (folder / JOURNAL_FILE).exists():
        return _from_journal(folder / JOURNAL_FILE)
    return _from_results(folder) if (folder / RESULTS_FILE).exists() else Earlier()


def _from_journal(path: Path) -> Earlier:
    """Read the journal of a run that was killed, perhaps in the middle of a line."""
    lines = iter_lines(path, check_planned, check_entry, cut_short=True)
    first = next(lines, None)
    if first is None:
        raise FormError(f"{path}: empty, so the finished frames of this folder are not known; choose another output folder with -o")
    return Earlier({line["name"]: Entry.of(line) for line in lines}, frozenset(first["planned"]), found=True)


def _from_results(folder: Path) -> Earlier:
    frames = list(iter_frames(folder))
    warnings: tuple[str, ...] = ()
    try:
        timings = _timings(folder, frames)
    except FormError as e:
        timings, warnings = (
            [[unknown_timing(line) for line in lines] for lines in frames],
            (f"{e}; the times of the finished frames are lost",),
        )
    entries = (Entry(lines[0]["name"], lines, times) for lines, times in zip(frames, timings, strict=True))
    return Earlier({entry.name: entry for entry in entries}, warnings=warnings, found=True)


def _timings(folder: Path, frames: list[list[ResultLine]]) -> list[list[TimingLine]]:
    """The timings of `frames`. Raises FormError if they are missing or of other frames."""
    path = folder / TIMINGS_FILE
    if not path.exists():
        raise FormError(f"{path}: missing")
    timings = list(iter_timings(folder))
    if list(_keys(timings)) != list(_keys(frames)):
        raise FormError(f"{path}: not of the same frames and questions as {RESULTS_FILE}")
    return timings


def _keys(frames: Sequence[Sequence[ResultLine | TimingLine]]) -> Iterator[tuple[int, str]]:
    return ((line["index"], line["question"]) for lines in frames for line in lines)

"""Results made by hand, and journals of runs that did them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tests.support.frames import make_frame
from vessel_rt.inputs.frames import Frame, input_sha256
from vessel_rt.io.folder_lock import locked
from vessel_rt.model.result import Mask, Result
from vessel_rt.results.writer import FrameWriter
from vessel_rt.run.earlier import read_earlier
from vessel_rt.run.journal import Record


def result_with(*masks: np.ndarray) -> Result:
    return Result("Where?", "It is [SEG].", (1, 2), 6, 5, 7, 1, {"read": 1.23456}, tuple(Mask(mask, 0.5, 2.25) for mask in masks))


def box_mask(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((64, 96), np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


S = "settings"


QUESTIONS = ["Where?"]


def do(record: Record, frames: Sequence[Frame], settings: str = S, masks: int = 1) -> None:
    writer = FrameWriter(record.folder, [frame.name for frame in frames], settings)
    for frame in frames:
        record.add(writer.write(frame, input_sha256(frame.path), make_frame(), [result_with(*[box_mask(3, 5, 20, 30)] * masks)]))


@contextmanager
def opened(
    folder: Path, frames: Sequence[Frame], settings: str | None = S, *, overwrite: bool = False, prune: bool = False
) -> Iterator[Record]:
    """A record that knows what is left to do."""
    with locked(folder, make=True) as lock:
        record = Record(lock, read_earlier(folder), frames, overwrite, prune)
        if settings:
            record.resume(settings, QUESTIONS)
        yield record


def look(folder: Path, frames: Sequence[Frame], *, overwrite: bool = False, prune: bool = False) -> Record:
    """At a folder, before anything is decided."""
    with opened(folder, frames, None, overwrite=overwrite, prune=prune) as record:
        return record


def run(
    folder: Path, frames: Sequence[Frame], *, overwrite: bool = False, prune: bool = False, settings: str = S, masks: int = 1
) -> list[str]:
    """The names of the frames that were left to do."""
    with locked(folder, make=True) as lock:
        record = Record(lock, read_earlier(folder), frames, overwrite, prune)
        left = record.resume(settings, QUESTIONS)
        with record:
            do(record, left, settings, masks)
    return [frame.name for frame in left]


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}

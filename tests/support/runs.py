"""Runs of `infer`, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.frames import CODES, make_frame
from vessel_rt.inputs.frames import Naming
from vessel_rt.run.infer import InferOptions
from vessel_rt.run.worker import WorkOptions


def options(
    inputs: Path | str, output: Path, *questions: str, batch: int | None = None, streams: int | None = None, draft: bool = True, **more: Any
) -> InferOptions:
    work = WorkOptions(questions or ("Please segment vessel in this image.",), threads=1, streams=streams, batch=batch, draft=draft)
    return InferOptions((str(inputs),), output, Naming(CODES), work, **more)


def lines(folder: Path, file: str = "results.jsonl") -> list[Any]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


THREE_SIZES = ((200, 160), (900, 448), (448, 448))  # of 13, 3 and 1 tiles
ONE_TILE = ((448, 448),)


def many(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = THREE_SIZES) -> Path:
    """Frames of these sizes in turn, each with its own picture, and one file that is no image."""
    folder.mkdir()
    for i in range(count):
        frame = make_frame(*sizes[i % len(sizes)])
        frame.rotate(7 * i).save(folder / f"{i:03}.png")
    (folder / "004_text.png").write_text("This is not an image.")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*g")}


def same_results(one: Path, other: Path) -> None:
    """Byte for byte."""
    for name in ("results.jsonl", *files(other)):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert files(one).keys() == files(other).keys()

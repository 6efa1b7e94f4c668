"""The masks of a cine, a multi-frame file or a series, in one TIFF: cines/<stem>.tif, one page per processed frame. Of a tracked cine also
its overlays as an animation: cines/<stem>.webp.

Does not know how the masks were made; it reads them and the overlays from the output folder.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from PIL.TiffImagePlugin import AppendingTiffWriter

from vessel_rt.io.files import replacing, writing
from vessel_rt.results.animation import write_animation
from vessel_rt.results.reader import cine_place, file_in, iter_frames, read_picture
from vessel_rt.results.schema import CINES, OVERLAYS, ResultLine
from vessel_rt.results.writer import numbered

__all__ = ["write_cines"]

_USUAL_MS = 1000 / 15  # a frame, if the file does not say: most angiograms have 15 frames a second


def write_cines(output: Path) -> None:
    """Write a TIFF for each cine of the run in `output`, and another (`<stem>_1.tif`, ...) for each further mask of its answers.

    The pages are in the order of the frames. A frame without a mask has an empty page. A cine with a failed frame has no TIFF, since its
    pages would not match its frames; its animation has the others. Raises VesselError.
    """
    cines: dict[str, dict[int, list[ResultLine]]] = defaultdict(dict)
    for lines in iter_frames(output):
        if place := cine_place(lines[0]):
            cines[place.name][place.number] = lines
    taken = {cine.casefold() for cine in cines}
    for cine, frames in cines.items():
        whole = [lines for _, lines in sorted(frames.items())]
        if all(line["status"] == "ok" for lines in whole for line in lines):
            _write_cine(output, numbered(cine, taken), whole)
        good = [lines[0] for lines in whole if lines[0]["status"] == "ok"]
        if len(good) > 1 and "propagated_from" in good[0]:
            _write_overlays(output, cine, good)


def _write_overlays(output: Path, cine: str, frames: Sequence[ResultLine]) -> None:
    """The overlays of these frames, in order, at the speed of the cine."""
    times = [line.get("time_ms") for line in frames]
    known = [time for time in times if time is not None]
    gaps = [after - before for before, after in itertools.pairwise(known)] if len(known) == len(frames) else []
    durations = [*gaps, statistics.median(gaps)] if gaps else [_USUAL_MS] * len(frames)

    def picture(number: int) -> Image.Image:
        line = frames[number]
        name = file_in(line, OVERLAYS) or ""
        return read_picture(output, name, "JPEG", f"the overlay of {line['code']} cannot be read for the animation of its cine")

    with writing(f"{output}: the animation of a cine"):
        (output / CINES).mkdir(exist_ok=True)
        with replacing(output / CINES / f"{cine}.webp", sync=True) as temporary, temporary.open("wb") as target:
            write_animation(target, picture, durations)


def _write_cine(output: Path, names: Iterator[str], frames: Sequence[Sequence[ResultLine]]) -> None:
    """`frames` have a line for each question."""
    most = [max(len(lines[question]["masks"]) for lines in frames) for question in range(len(frames[0]))]
    places = [(question, mask) for question, count in enumerate(most) for mask in range(count)]
    for question, mask in places:
        with writing(f"{output}: the TIFF of a cine"):
            (output / CINES).mkdir(exist_ok=True)
            # Synced: no entry has a hash of these files.
            with (
                replacing(output / CINES / f"{next(names)}.tif", sync=True) as temporary,
                AppendingTiffWriter(temporary, new=True) as tiff,
            ):
                for page in _pages(output, frames, question, mask):  # one at a time: save(save_all=True) would hold all of them
                    page.save(tiff, format="TIFF", compression="tiff_adobe_deflate")
                    tiff.newFrame()


def _pages(output: Path, frames: Sequence[Sequence[ResultLine]], question: int, mask: int) -> Iterator[Image.Image]:
    """0 and 255, as in masks/."""
    for lines in frames:
        line = lines[question]
        if mask < len(line["masks"]):
            name, problem = line["masks"][mask]["file"], f"a mask of {line['code']} cannot be read for the TIFF of its cine"
            yield read_picture(output, name, "PNG", problem)
        else:
            yield Image.new("L", (line["width"] or 0, line["height"] or 0))  # a frame with an answer has both

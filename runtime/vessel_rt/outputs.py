"""What a run leaves: masks/, overlays/, results.jsonl and run.json, each file whole or absent.

A file is written under a temporary name beside it and renamed. results.jsonl grows as results.jsonl.partial, a line an image and question,
and gets its name when the run ends, however it ends; run.json is written last, so it says that every image was tried.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.errors import VesselError
from vessel_rt.masks import bounding_box, run_lengths
from vessel_rt.segmenter import Mask, Result

__all__ = ["RESULTS_FILE", "RUN_FILE", "OutputFolder", "draw_overlay", "json_lines", "replacing"]

RESULTS_FILE = "results.jsonl"
RUN_FILE = "run.json"

_PARTIAL_FILE = RESULTS_FILE + ".partial"
_MASKS, _OVERLAYS = "masks", "overlays"
# Distinct from each other and from gray, for the eyes of most colour-blind people too.
_COLOURS = ((255, 82, 82), (64, 196, 255), (255, 214, 64), (105, 240, 174), (224, 130, 255), (255, 158, 64))
_TINT = 0.45  # the share of the mask's colour inside it; its outline is all colour


class OutputFolder:
    """The folder of one run. Making the object checks it; entering it as a context begins the run, leaving ends it.

    Masks are `masks/<stem>.png`, then `<stem>_1.png`, `<stem>_2.png`; a number that would be another image's name is passed over.

    Args:
        folder: made if absent, on entering.
        images: the images of the run; their stems name what is written.
        overwrite: allow a folder that is not empty; entering removes from it what an earlier run wrote, and nothing else.

    Raises:
        VesselError: two images share a stem, the folder is not empty, or holds files that would be overwritten and that no run wrote.
    """

    def __init__(self, folder: Path, images: Sequence[Path], overwrite: bool = False) -> None:
        self.folder = folder
        self._stems = _distinct_stems(images)
        self._earlier: set[Path] = set()
        if folder.exists() and not folder.is_dir():
            raise VesselError(f"{folder}: is a file; choose another output folder with -o")
        if folder.exists() and any(folder.iterdir()):
            if not overwrite:
                raise VesselError(f"{folder}: not empty; choose another output folder with -o, or replace its results with --overwrite")
            self._earlier = _earlier_files(folder)
            _check_overwriting(folder, self._earlier, self._stems, images)

    def __enter__(self) -> Self:
        with _writing(self.folder):
            for path in self._earlier:
                path.unlink(missing_ok=True)
            for name in (_MASKS, _OVERLAYS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._results = (self.folder / _PARTIAL_FILE).open("wb", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with _writing(self.folder / RESULTS_FILE):
            self._results.close()
            os.replace(self.folder / _PARTIAL_FILE, self.folder / RESULTS_FILE)

    def write_results(self, path: Path, image: Image.Image, results: Sequence[Result]) -> None:
        """Write the masks and the overlay of one image, then a line for each of its results; if that is cut short, none of them."""
        names = iter(self._mask_names(path.stem, sum(len(result.masks) for result in results)))
        overlay, written, lines = self.folder / _OVERLAYS / f"{path.stem}.jpg", [], []
        try:
            for result in results:
                records = []
                for mask, name in zip(result.masks, names):  # noqa: B905 (masks first: a name is taken for each)
                    written.append(self.folder / name)
                    records.append(self._write_mask(name, mask))
                lines.append(_line(path, result.question, result=result, masks=records))
            written.append(overlay)
            with replacing(overlay) as temporary:
                masks = [mask.pixels for result in results for mask in result.masks]
                draw_overlay(image, masks).save(temporary, format="JPEG", quality=92, subsampling=0)
            self._write_lines(lines)
        except BaseException:
            for unlisted in written:
                unlisted.unlink(missing_ok=True)
            raise

    def write_error(self, path: Path, questions: Sequence[str], error: str) -> None:
        """Write the lines of an image that failed, one a question."""
        self._write_lines([_line(path, question, error=error) for question in questions])

    def write_run(self, report: dict[str, Any]) -> None:
        """Write run.json."""
        with replacing(self.folder / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _write_mask(self, name: str, mask: Mask) -> dict[str, Any]:
        with replacing(self.folder / name) as temporary:
            _stencil(mask.pixels).save(temporary, format="PNG")
        return {
            "file": name,
            "iou": round(mask.iou, 6),
            "object_score": round(mask.object_score, 6),
            "area": int(mask.pixels.sum()),
            "box": bounding_box(mask.pixels),
            "rle": run_lengths(mask.pixels),
        }

    def _mask_names(self, stem: str, count: int) -> list[str]:
        numbered = (f"{stem}_{number}" for number in itertools.count(1))
        free = (name for name in numbered if name.casefold() not in self._stems)
        return [f"{_MASKS}/{name}.png" for name in itertools.islice(itertools.chain([stem], free), count)]

    def _write_lines(self, lines: Sequence[dict[str, Any]]) -> None:
        """All of `lines`, or, where the disk is full, none."""
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        before = self._results.tell()
        with _writing(self.folder / _PARTIAL_FILE):
            try:
                while text:
                    text = text[self._results.write(text) :]
            except OSError:
                self._results.truncate(before)
                self._results.seek(before)
                raise


def json_lines(text: str) -> list[Any]:
    """The lines of a results.jsonl. Not str.splitlines: that breaks at characters that JSON has inside its strings."""
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def _line(
    path: Path, question: str, *, error: str | None = None, result: Result | None = None, masks: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """A line of results.jsonl, which has the same keys whatever came of the image."""
    return {
        "image": path.name,
        "question": question,
        "status": "ok" if result else "error",
        "error": error,
        "answer": result.answer if result else None,
        "drafted": result.drafted if result else None,
        "accepted": result.accepted if result else None,
        "decode_steps": result.decode_steps if result else None,
        "batch": result.images if result else None,
        "ms": {step: round(value, 3) for step, value in result.ms.items()} if result else {},
        "masks": list(masks),
    }


def draw_overlay(image: Image.Image, masks: Sequence[npt.NDArray[np.bool_]]) -> Image.Image:
    """The image with each mask [height, width] tinted and outlined in a colour of its own."""
    overlay = image.convert("RGB")
    for mask, colour in zip(masks, itertools.cycle(_COLOURS), strict=False):
        tinted = Image.blend(overlay, Image.new("RGB", overlay.size, colour), _TINT)
        overlay.paste(tinted, mask=_stencil(mask))
        overlay.paste(colour, mask=_stencil(mask & ~_eroded(mask)))
    return overlay


def _stencil(mask: npt.NDArray[np.bool_]) -> Image.Image:
    """`mask` as Pillow takes it: 255 and 0."""
    return Image.fromarray(mask.view(np.uint8) * np.uint8(255))


def _eroded(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask without its outermost pixels (those with one of four neighbours outside)."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to: renamed to it when the block succeeds, removed when it does not.

    Raises:
        VesselError: the file cannot be written (no space, no permission, too long a name).
    """
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")  # short: the name itself may be as long as names can be
    try:
        with _writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise VesselError(f"{path}: cannot be written ({e.strerror or e})") from e


def _distinct_stems(images: Sequence[Path]) -> frozenset[str]:
    """The stems of `images`, caseless, since a folder that is copied to Windows or macOS loses one of `A.png` and `a.png`."""
    seen: dict[str, Path] = {}
    for path in images:
        other = seen.setdefault(path.stem.casefold(), path)
        if other is not path:
            raise VesselError(f"{path}: its results would overwrite those of {other}; run them into two output folders, or rename one")
    return frozenset(seen)


def _check_overwriting(folder: Path, earlier: Collection[Path], stems: Collection[str], images: Sequence[Path]) -> None:
    """Make sure that nothing is overwritten but what an earlier run wrote, and that nothing of that is an input now."""
    for path in [*(folder / _MASKS).glob("*"), *(folder / _OVERLAYS).glob("*")]:
        stem, _, number = path.stem.casefold().rpartition("_")
        named = path.stem.casefold() in stems or (number.isdecimal() and stem in stems)
        if named and path not in earlier:
            raise VesselError(
                f"{path}: would be overwritten, and is not a result that {RESULTS_FILE} lists; move it away, or choose another -o"
            )
    reread = {path.resolve() for path in images} & {path.resolve() for path in earlier}
    if reread:
        raise VesselError(f"{min(reread)}: is both an input and a result that would be overwritten; choose another -o")


def _earlier_files(folder: Path) -> set[Path]:
    """The files of an earlier run in `folder`. Only names right inside masks/ and overlays/ are taken from its results.jsonl."""
    files = {folder / RUN_FILE} & set(folder.iterdir())
    files |= set(folder.glob(f"{_MASKS}/.*.tmp")) | set(folder.glob(f"{_OVERLAYS}/.*.tmp")) | set(folder.glob(".*.tmp"))
    for record in (folder / RESULTS_FILE, folder / _PARTIAL_FILE):
        if not record.exists():
            continue
        files.add(record)
        try:
            for line in json_lines(record.read_text(encoding="utf-8")):
                files.add(folder / _OVERLAYS / f"{Path(line['image']).stem}.jpg")
                files |= {folder / _MASKS / Path(mask["file"]).name for mask in line["masks"]}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise VesselError(f"{record}: not written by vessel-rt, or cut short ({e}); choose another output folder with -o") from e
    return files

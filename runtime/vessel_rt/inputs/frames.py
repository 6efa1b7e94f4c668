"""The frames of a run: which there are, in which order, and what each is called in outputs and on the screen."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import mimetypes
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.inputs import dicom
from vessel_rt.inputs.dicom import DICOM_SUFFIXES, is_dicom, read_dicom
from vessel_rt.inputs.images import SUFFIXES, Rescale, page_count, read_image, require_regular
from vessel_rt.inputs.pseudonyms import StudyCodes, printable, remember
from vessel_rt.io.checked_files import sha256_of
from vessel_rt.io.files import missing_part

__all__ = [
    "Found",
    "Frame",
    "Naming",
    "Selection",
    "cine_of",
    "find_frames",
    "frame_count",
    "frame_suffix",
    "input_sha256",
    "read_frame",
    "stem_of",
    "told_kinds",
]


@dataclasses.dataclass(frozen=True)
class Naming:
    """What files are called: `show_names` on the screen and in reports by their names, `pseudonymize` even outputs by study codes."""

    codes: StudyCodes
    show_names: bool = False
    pseudonymize: bool = False


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which of the frames found to take: `frames` of each multi-frame file, the first `num_images`, then part `part` of `parts`.

    Without `frames`, all of a DICOM cine are taken, and a TIFF with several pages is an error: its pages need not be frames.
    """

    frames: slice | None = None
    num_images: int | None = None
    parts: int = 1
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture to segment: a file, or frame `number` (from 0) of a multi-frame DICOM file or of a TIFF with several pages.

    `index` is its place among all frames that the inputs name, whichever part of them this run takes. Its outputs are called `name`,
    without a suffix; results.jsonl calls its file `image`; `shown` is for the screen.
    """

    path: Path
    number: int | None
    index: int
    name: str
    code: str
    image: str
    shown: str


class Found(NamedTuple):
    """The frames of this part, the names of those of all parts, and, by input, how many files of each kind were not taken."""

    frames: list[Frame]
    names: list[str]
    skipped: dict[str, Mapping[str, int]]


def find_frames(
    inputs: Sequence[str], naming: Naming, selection: Selection | None = None, earlier: Mapping[str, Sequence[int]] | None = None
) -> Found:
    """The frames that `inputs` name, each once, in order.

    A file is taken as it is; of a folder (not of those in it) and of a glob, sorted, what has the suffix of an image, or is DICOM, and is
    not hidden; besides, what has no suffix and cannot be read. Parts are of whole files, dealt out in turn.
    Where a file cannot be read, its frames are those that an `earlier` run did, by the name of the file's outputs; without any, the file
    is one frame.

    Raises:
        VesselError: an input that is not there or is no file, in which there is no image, or of which `selection` leaves no frame; two
            images whose outputs would have one name.
    """
    selection = selection or Selection()
    _remember(inputs, naming)
    files: dict[str, Path] = {}
    skipped: dict[str, Mapping[str, int]] = {}
    for position, text in enumerate(inputs, start=1):
        place = f"input {position} of {len(inputs)}"
        images, others = _images_of(text, printable(text) if naming.show_names else place, naming.show_names)
        if others:
            skipped[place] = others
        for path in images:
            files.setdefault(os.path.realpath(path) if os.path.isfile(path) else os.path.abspath(path), path)
    places = list(itertools.islice(_places(list(files.values()), selection.frames, naming, earlier or {}), selection.num_images))
    if not places:
        raise VesselError("--frames leaves no frame of the inputs; frames count from 0, and the end is not included")
    frames = [_frame(path, number, index, len(places), naming) for index, (path, number) in enumerate(places)]
    _check_distinct(frames)
    order = {path: place for place, path in enumerate(dict.fromkeys(path for path, _ in places))}
    chosen = [frame for frame in frames if order[frame.path] % selection.parts == selection.part]
    return Found(chosen, [frame.name for frame in frames], skipped)


def read_frame(frame: Frame, rescale: Rescale | None = None) -> Image.Image:
    """The frame in RGB, 8 bits; `rescale` is for images that are not DICOM, see `read_image`. Raises ImageError."""
    return read_dicom(frame.path, frame.number) if is_dicom(frame.path) else read_image(frame.path, frame.number, rescale)


def frame_count(path: Path) -> int | None:
    """How many frames a multi-frame DICOM file has, or pages a TIFF; None for a file with one picture. Raises ImageError."""
    return dicom.frame_count(path) if is_dicom(path) else page_count(path)


def input_sha256(path: Path) -> str:
    """Of a file's content. Raises ImageError."""
    try:
        require_regular(path)
        return sha256_of(path)
    except OSError as e:
        raise ImageError("no such file" if isinstance(e, FileNotFoundError) else f"cannot be read ({e.strerror})") from e


def stem_of(path: Path) -> str:
    """A file's name without its suffix; all of `XA.1.2.840.5`, of which the last number is none."""
    return path.name if path.suffix[1:].isdecimal() else path.stem


def frame_suffix(number: int | None) -> str:
    """What a name has for a frame of a multi-frame file."""
    return "" if number is None else f"_frame_{number:06}"


def cine_of(name: str, number: int) -> str:
    """What the file of the frame `name` is called."""
    return name.removesuffix(frame_suffix(number))


def _remember(inputs: Sequence[str], naming: Naming) -> None:
    if not naming.show_names:
        for text in inputs:
            remember(text, naming.codes.code(stem_of(Path(text))))


def _images_of(text: str, shown: str, show_names: bool) -> tuple[list[Path], Mapping[str, int]]:
    """The files that an input names, sorted, and how many of each kind are not taken."""
    path = Path(text)
    if os.path.isfile(path):
        return [path], {}
    if os.path.isdir(path):
        try:
            candidates, place = list(path.iterdir()), f"{shown}: this folder"
        except OSError as e:
            raise VesselError(f"{shown}: this folder cannot be read ({e.strerror})") from e
    elif not os.path.lexists(path) and glob.has_magic(text):
        matched = (Path(name) for name in glob.glob(text, recursive=True))
        candidates, place = [candidate for candidate in matched if not os.path.isdir(candidate)], f"{shown}: this pattern"
    else:
        raise VesselError(f"{shown}: {'not a regular file' if os.path.exists(path) else f'no such file or folder: {missing_part(path)}'}")
    visible = [candidate for candidate in sorted(candidates) if not candidate.name.startswith(".")]
    taken = [_is_image(candidate) for candidate in visible]
    images = list(itertools.compress(visible, taken))
    others = _kinds((candidate for candidate, is_taken in zip(visible, taken, strict=True) if not is_taken), show_names)
    if not images:
        found = f", but {told_kinds(others)}" if others else ""
        raise VesselError(f"{place} holds no image ({', '.join((*SUFFIXES, *DICOM_SUFFIXES))}){found}")
    return images, others


def _is_image(path: Path) -> bool:
    """Whether it is taken, if only to say that it cannot be read: what is called as an image is, or has no suffix and may be one."""
    if os.path.isdir(path):
        return False
    if path.suffix.lower() in SUFFIXES or is_dicom(path):
        return True
    return stem_of(path) == path.name and _is_unreadable(path)


def _is_unreadable(path: Path) -> bool:
    """Whether it is a file, or a link to none, that does not let itself be read."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            file.read(1)
    except OSError:
        return True
    except ImageError:
        return False
    return False


def _kinds(paths: Iterable[Path], show_names: bool) -> dict[str, int]:
    """How many there are of each kind: of each suffix that says nothing of a patient, which is one that others use."""
    kinds: Counter[str] = Counter()
    for path in paths:
        suffix = path.suffix.lower()
        if os.path.isdir(path):
            kinds["subfolder"] += 1
        elif os.path.exists(path) and not os.path.isfile(path):
            kinds["special file"] += 1
        elif stem_of(path) == path.name:
            kinds["without a suffix"] += 1
        else:
            kinds[printable(suffix) if show_names or mimetypes.guess_type(f"a{suffix}") != (None, None) else "other"] += 1
    return dict(sorted(kinds.items()))


def told_kinds(kinds: Mapping[str, int]) -> str:
    """Such as `1 .gif, 3 .txt, 2 subfolders`."""
    return ", ".join(f"{count} {kind}{'s' * (count > 1 and kind in ('subfolder', 'special file'))}" for kind, count in kinds.items())


def _places(
    files: Sequence[Path], chosen: slice | None, naming: Naming, earlier: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Path, int | None]]:
    """The files, and of a multi-frame one the frames chosen. One whose header cannot be read is told of when its turn comes."""
    for path in tqdm(files, desc="looking at the files", unit="file", disable=None, delay=2, leave=False):
        name = naming.codes.code(stem_of(path)) if naming.pseudonymize else stem_of(path)
        for number in _numbers(path, chosen, earlier.get(name, ())):
            yield path, number


def _numbers(path: Path, chosen: slice | None, earlier: Sequence[int]) -> Sequence[int | None]:
    """The numbers of a file's frames; None for the only one."""
    try:
        if earlier:  # it was a multi-frame file: is it none any more, or can it only not be read?
            path.open("rb").close()
        count = frame_count(path) if chosen is not None or is_dicom(path) else None
    except (ImageError, OSError):
        return earlier or [None]
    return [None] if count is None else range(count)[chosen or slice(None)]


def _frame(path: Path, number: int | None, index: int, total: int, naming: Naming) -> Frame:
    suffix, stem = frame_suffix(number), stem_of(path)
    code = naming.codes.code(stem) + suffix
    if not naming.show_names:
        remember(path, code)
    place = f"frame {index + 1} of {total}"
    return Frame(
        path=path,
        number=number,
        index=index,
        name=code if naming.pseudonymize else stem + suffix,
        code=code,
        image=code.removesuffix(suffix) if naming.pseudonymize else path.name,
        shown=printable(f"{path}{suffix}") if naming.show_names else f"{place} ({code})",
    )


def _check_distinct(frames: Sequence[Frame]) -> None:
    """Names are compared caseless, since a folder that is copied to Windows or macOS loses one of `A.png` and `a.png`."""
    seen: dict[str, Frame] = {}
    for frame in frames:
        other = seen.setdefault(frame.name.casefold(), frame)
        if other is not frame:
            raise VesselError(
                f"{frame.shown}: its results would overwrite those of {other.shown}, a file of the same name; "
                "run them into two output folders, or rename one"
            )

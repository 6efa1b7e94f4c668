"""The frames of a run: which there are, in which order, and what each is called in outputs and on the screen."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from vessel_rt.bundle import sha256_of
from vessel_rt.dicom import DICOM_SUFFIXES, frame_count, is_dicom, read_dicom
from vessel_rt.errors import ImageError, VesselError
from vessel_rt.image import SUFFIXES, read_image
from vessel_rt.privacy import StudyCodes, remember

__all__ = ["Frame", "Naming", "Selection", "cine_of", "find_frames", "frame_suffix", "input_sha256", "read_frame", "stem_of"]


@dataclasses.dataclass(frozen=True)
class Naming:
    """What files are called: `show_names` on the screen and in reports by their names, `pseudonymize` even outputs by study codes."""

    codes: StudyCodes
    show_names: bool = False
    pseudonymize: bool = False


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which of the frames found to take: `frames` of each multi-frame file, the first `num_images`, then part `part` of `parts`."""

    frames: slice = dataclasses.field(default_factory=lambda: slice(None))
    num_images: int | None = None
    parts: int = 1
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture to segment: a file, or frame `number` (from 0) of a multi-frame DICOM file.

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


def find_frames(
    inputs: Sequence[str], naming: Naming, selection: Selection | None = None, earlier: Mapping[str, Sequence[int]] | None = None
) -> tuple[list[Frame], list[str]]:
    """The frames that `inputs` name, each once, in order; and the names of those of all parts together.

    A file is taken as it is; of a folder (not of those in it) and of a glob, sorted, what has the suffix of an image, or is DICOM, and is
    not hidden. Parts are of whole files, dealt out in turn. Where a file cannot be read, its frames are those that an `earlier` run did,
    by the name of the file's outputs; without any, the file is one frame.

    Raises:
        VesselError: an input that is not there, in which there is no image, or of which `selection` leaves no frame; two images whose
            outputs would have one name.
    """
    selection = selection or Selection()
    _remember(inputs, naming)
    files: dict[Path, Path] = {}
    for position, text in enumerate(inputs, start=1):
        shown = text if naming.show_names else f"input {position} of {len(inputs)}"
        for path in _images_of(text, shown):
            files.setdefault(path.resolve(), path)
    places = list(_places(list(files.values()), selection.frames, naming, earlier or {}))[: selection.num_images]
    if not places:
        raise VesselError("--frames leaves no frame of the inputs; frames count from 0, and the end is not included")
    frames = [_frame(path, number, index, len(places), naming) for index, (path, number) in enumerate(places)]
    _check_distinct(frames)
    order = {path: place for place, path in enumerate(dict.fromkeys(path for path, _ in places))}
    return [frame for frame in frames if order[frame.path] % selection.parts == selection.part], [frame.name for frame in frames]


def read_frame(frame: Frame) -> Image.Image:
    """The frame in RGB, 8 bits. Raises ImageError."""
    return read_dicom(frame.path, frame.number) if is_dicom(frame.path) else read_image(frame.path)


def input_sha256(path: Path) -> str:
    """Of a file's content. Raises ImageError."""
    try:
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


def _images_of(text: str, shown: str) -> list[Path]:
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates, place = list(path.iterdir()), f"{shown}: this folder"
    elif glob.has_magic(text):
        candidates, place = [Path(name) for name in glob.glob(text, recursive=True)], f"{shown}: this pattern"
    else:
        raise VesselError(f"{shown}: no such file or folder")
    images = [p for p in sorted(candidates) if not p.name.startswith(".") and p.is_file() and _is_image(p)]
    if not images:
        raise VesselError(f"{place} holds no image ({', '.join((*SUFFIXES, *DICOM_SUFFIXES))})")
    return images


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES or is_dicom(path)


def _places(
    files: Sequence[Path], chosen: slice, naming: Naming, earlier: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Path, int | None]]:
    """The files, and of a multi-frame one the frames chosen. One whose header cannot be read is told of when its turn comes."""
    for path in tqdm(files, desc="looking at the files", unit="file", disable=None, delay=2, leave=False):
        name = naming.codes.code(stem_of(path)) if naming.pseudonymize else stem_of(path)
        for number in _numbers(path, chosen, earlier.get(name, ())):
            yield path, number


def _numbers(path: Path, chosen: slice, earlier: Sequence[int]) -> Sequence[int | None]:
    """The numbers of a file's frames; None for the only one."""
    try:
        if is_dicom(path):
            count = frame_count(path)
            return [None] if count is None else range(count)[chosen]
        if earlier:  # it was a multi-frame file: is it none any more, or can it only not be read?
            path.open("rb").close()
    except (ImageError, OSError):
        return earlier or [None]
    return [None]


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
        shown=f"{path}{suffix}" if naming.show_names else f"{place} ({code})",
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

"""The frames of a run: which there are, in which order, and what each is called in outputs and on the screen.

Does not know about models, or what is computed from a frame.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.inputs import dicom
from vessel_rt.inputs.dicom import is_dicom, read_dicom
from vessel_rt.inputs.images import Rescale, page_count, read_image, require_regular
from vessel_rt.inputs.input_files import InputFile, files_of, stem_of
from vessel_rt.inputs.pseudonyms import StudyCodes, printable, remember
from vessel_rt.io.checked_files import sha256_of

__all__ = [
    "Found",
    "Frame",
    "Naming",
    "Selection",
    "cine_of",
    "find_frames",
    "frame_count",
    "frame_suffix",
    "frame_times",
    "input_hasher",
    "input_sha256",
    "read_frame",
]

_REMEMBERED = 64  # files whose hashes an `input_hasher` keeps


@dataclasses.dataclass(frozen=True)
class Naming:
    """How files are called: `show_names` shows file names on screen and in reports, `pseudonymize` uses study codes for outputs too."""

    codes: StudyCodes
    show_names: bool = False
    pseudonymize: bool = False

    def output_name(self, stem: str) -> str:
        """What the outputs of a file with this stem are called."""
        return self.codes.code(stem) if self.pseudonymize else stem


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which of the frames to take: `frames` of each multi-frame file, the first `num_images`, then shard `shard` of `shards`.

    Without `frames`, all of a DICOM cine are taken, and a TIFF with several pages is an error: its pages need not be frames. `recursive`
    also takes the files in the subfolders of folders.
    """

    frames: slice | None = None
    num_images: int | None = None
    shards: int = 1
    shard: int = 0
    recursive: bool = False


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture to segment: a file, or frame `number` (from 0) of a multi-frame DICOM file or of a TIFF with several pages.

    `index` is its place among all frames that the inputs name, whichever shard this run takes. Its outputs are called `name`,
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
    """The frames of this shard, the names of those of all shards, and, by input, how many files of each kind were skipped."""

    frames: list[Frame]
    names: list[str]
    skipped: dict[str, Mapping[str, int]]


def find_frames(
    inputs: Sequence[str],
    naming: Naming,
    selection: Selection | None = None,
    earlier: Mapping[str, Sequence[int]] | None = None,
    output: Path | None = None,
) -> Found:
    """The frames that `inputs` name, each once, in order.

    A file is taken as it is. From a folder and a glob, sorted, every file is taken that has the suffix of an image or is DICOM and is not
    hidden, and every file that has no suffix and cannot be read. The subfolders of a folder are searched only if `selection` is recursive,
    and then without `output`, links to folders, and hidden folders. A file is never split between shards: they take whole files in turn.
    If a file cannot be read, its frames are those that an `earlier` run did, by the name of the file's outputs; without any, the file is
    one frame.

    Raises:
        VesselError: an input does not exist or is not a file, holds no image, or `selection` leaves no frame of it; two images have the
            same name for their outputs.
    """
    selection = selection or Selection()
    _remember(inputs, naming)
    files: dict[str, InputFile] = {}
    skipped: dict[str, Mapping[str, int]] = {}
    for position, text in enumerate(inputs, start=1):
        place = f"input {position} of {len(inputs)}"
        found, others = files_of(text, place, naming.show_names, selection.recursive, output)
        if others:
            skipped[place] = others
        for file in found:
            files.setdefault(os.path.realpath(file.path) if os.path.isfile(file.path) else os.path.abspath(file.path), file)
    places = list(itertools.islice(_places(list(files.values()), selection.frames, naming, earlier or {}), selection.num_images))
    if not places:
        raise VesselError("--frames leaves no frame of the inputs; frames count from 0, and the end is not included")
    _check_distinct([file for file, _ in places], naming)
    frames = [_frame(file, number, index, len(places), naming) for index, (file, number) in enumerate(places)]
    order = {path: place for place, path in enumerate(dict.fromkeys(file.path for file, _ in places))}
    chosen = [frame for frame in frames if order[frame.path] % selection.shards == selection.shard]
    return Found(chosen, [frame.name for frame in frames], skipped)


def read_frame(frame: Frame, rescale: Rescale | None = None) -> Image.Image:
    """The frame in RGB, 8 bits; `rescale` is for images that are not DICOM, see `read_image`. Raises ImageError."""
    return read_dicom(frame.path, frame.number) if is_dicom(frame.path) else read_image(frame.path, frame.number, rescale)


def frame_count(path: Path) -> int | None:
    """How many frames a multi-frame DICOM file has, or pages a TIFF; None for a file with one picture. Raises ImageError."""
    return dicom.frame_count(path) if is_dicom(path) else page_count(path)


def frame_times(path: Path) -> list[float] | None:
    """The time of each frame of a multi-frame DICOM file from the first one, in ms; None if it does not say. Raises ImageError."""
    return dicom.frame_times(path) if is_dicom(path) else None


def input_sha256(path: Path) -> str:
    """The SHA-256 of a file's content. Raises ImageError."""
    try:
        require_regular(path)
        return sha256_of(path)
    except OSError as e:
        raise ImageError("no such file" if isinstance(e, FileNotFoundError) else f"cannot be read ({e.strerror})") from e


def input_hasher() -> Callable[[Path], str]:
    """An `input_sha256` that remembers the last files: a cine has many frames, and is hashed once for all of them."""
    return functools.lru_cache(_REMEMBERED)(input_sha256)


def frame_suffix(number: int | None) -> str:
    """The end of the name of a frame of a multi-frame file."""
    return "" if number is None else f"_frame_{number:06}"


def cine_of(name: str, number: int) -> str:
    """The name of the file whose frame is called `name`."""
    return name.removesuffix(frame_suffix(number))


def _remember(inputs: Sequence[str], naming: Naming) -> None:
    if not naming.show_names:
        for text in inputs:
            remember(text, naming.codes.code(stem_of(Path(text))))


def _places(
    files: Sequence[InputFile], chosen: slice | None, naming: Naming, earlier: Mapping[str, Sequence[int]]
) -> Iterator[tuple[InputFile, int | None]]:
    """The files, and the chosen frames of each multi-frame file. A header that cannot be read is reported when its frame is read."""
    for file in tqdm(files, desc="looking at the files", unit="file", disable=None, delay=2, leave=False):
        for number in _numbers(file.path, chosen, earlier.get(naming.output_name(file.stem), ())):
            yield file, number


def _numbers(path: Path, chosen: slice | None, earlier: Sequence[int]) -> Sequence[int | None]:
    """The numbers of a file's frames; None for the only one."""
    try:
        if earlier:  # it was a multi-frame file: has it become another one, or can it only not be read now?
            path.open("rb").close()
        count = frame_count(path) if chosen is not None or is_dicom(path) else None
    except (ImageError, OSError):
        return earlier or [None]
    return [None] if count is None else range(count)[chosen or slice(None)]


def _frame(file: InputFile, number: int | None, index: int, total: int, naming: Naming) -> Frame:
    suffix = frame_suffix(number)
    code = naming.codes.code(file.stem) + suffix
    if not naming.show_names:
        _remember_file(file, code, naming)
    place = f"frame {index + 1} of {total}"
    return Frame(
        path=file.path,
        number=number,
        index=index,
        name=naming.output_name(file.stem) + suffix,
        code=code,
        image=naming.output_name(file.stem) if naming.pseudonymize else file.image,
        shown=printable(f"{file.path}{suffix}") if naming.show_names else f"{place} ({code})",
    )


def _remember_file(file: InputFile, code: str, naming: Naming) -> None:
    remember(file.path, code)
    folders = Path(file.image).parts[:-1]
    if folders:  # they may carry patients' names too
        remember(file.image, code)
        remember(file.stem, code)
        for folder in folders:
            remember(folder, naming.codes.code(folder))


def _check_distinct(files: Sequence[InputFile], naming: Naming) -> None:
    """Refuse two files whose outputs would have the same name, or that have the same study code.

    Names are compared without case: a folder that is copied to Windows or macOS loses one of `A.png` and `a.png`.
    """
    seen: dict[str, InputFile] = {}
    coded: dict[str, InputFile] = {}
    for file in files:
        other = coded.setdefault(naming.codes.code(file.stem), file)
        if other.stem.casefold() != file.stem.casefold():
            raise VesselError(f"{other.place} and {file.place}: two files of one study code; give another key with --key")
        other = seen.setdefault(naming.output_name(file.stem).casefold(), file)
        if other is not file:
            one, two = (printable(str(found.path)) if naming.show_names else found.place for found in (other, file))
            code = "" if naming.show_names else f" (study code {naming.codes.code(file.stem)})"
            raise VesselError(
                f"{one} and {two}: two files of the same name{code}, whose results would overwrite each other; "
                "rename one, or run the two into separate output folders with -o"
            )

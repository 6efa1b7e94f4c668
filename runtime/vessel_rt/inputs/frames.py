"""The frames of a run: which there are, in which order, and what each is called in outputs and on the screen.

Does not know about models, or what is computed from a frame.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.inputs import dicom
from vessel_rt.inputs.dicom import is_dicom, read_dicom
from vessel_rt.inputs.images import Rescale, image_size, page_count, read_image, require_regular
from vessel_rt.inputs.input_files import InputFile, files_of, stem_of
from vessel_rt.inputs.pseudonyms import StudyCodes, printable, remember
from vessel_rt.inputs.series import Series, find_series
from vessel_rt.io.checked_files import sha256_of

__all__ = [
    "Found",
    "Frame",
    "InSeries",
    "Naming",
    "Selection",
    "cine_of",
    "find_frames",
    "frame_count",
    "frame_size",
    "frame_suffix",
    "frame_times",
    "input_hasher",
    "input_sha256",
    "read_frame",
]

_REMEMBERED = 64  # files whose hashes an `input_hasher` keeps
_TOLD = 5  # names in a message, at most


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
    also takes the files in the subfolders of folders. `series` makes cines of files that are numbered frames (see series.py); these are
    never split between shards.
    """

    frames: slice | None = None
    num_images: int | None = None
    shards: int = 1
    shard: int = 0
    recursive: bool = False
    series: bool = False


@dataclasses.dataclass(frozen=True)
class InSeries:
    """The place of a file in its series: frame `number`, as its name says. The outputs of the cine are called `name`, and its study code is
    `code`."""

    name: str
    code: str
    number: int


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture to segment: a file, or frame `number` (from 0) of a multi-frame DICOM file or of a TIFF with several pages. A file may be
    a frame of a `series`.

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
    series: InSeries | None = None

    @property
    def cine(self) -> str | Path:
        """What the frames of a cine have in common: their series, or their file."""
        return self.series.name if self.series else self.path

    @property
    def cine_number(self) -> int:
        """The number of the frame in its cine."""
        return self.series.number if self.series else self.number or 0


class Found(NamedTuple):
    """The frames of this shard, the names of those of all shards, and, by input, how many files of each kind were skipped.

    `told` says which series were found, if they were asked for.
    """

    frames: list[Frame]
    names: list[str]
    skipped: dict[str, Mapping[str, int]]
    told: str = ""


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
            same name for their outputs; a file of a series has another size or the same number as another.
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
    every: Iterable[tuple[InputFile, int | None]] = _places(list(files.values()), selection.frames, naming, earlier or {})
    series: dict[Path, tuple[Series, int]] = {}
    told = ""
    if selection.series:
        every, series, told = _joined(list(every), naming)
    places = list(itertools.islice(every, selection.num_images))
    if not places:
        raise VesselError("--frames leaves no frame of the inputs; frames count from 0, and the end is not included")
    _check_distinct([file for file, _ in places], naming)
    frames = [_frame(file, number, index, len(places), naming, series.get(file.path)) for index, (file, number) in enumerate(places)]
    _check_distinct_cines(frames)
    order = {cine: place for place, cine in enumerate(dict.fromkeys(frame.cine for frame in frames))}
    chosen = [frame for frame in frames if order[frame.cine] % selection.shards == selection.shard]
    return Found(chosen, [frame.name for frame in frames], skipped, told)


def read_frame(frame: Frame, rescale: Rescale | None = None) -> Image.Image:
    """The frame in RGB, 8 bits; `rescale` is for images that are not DICOM, see `read_image`. Raises ImageError."""
    return read_dicom(frame.path, frame.number) if is_dicom(frame.path) else read_image(frame.path, frame.number, rescale)


def frame_count(path: Path) -> int | None:
    """How many frames a multi-frame DICOM file has, or pages a TIFF; None for a file with one picture. Raises ImageError."""
    return dicom.frame_count(path) if is_dicom(path) else page_count(path)


def frame_size(path: Path) -> tuple[int, int]:
    """The width and height of a file's frames in pixels, by its header. Raises ImageError."""
    return dicom.frame_size(path) if is_dicom(path) else image_size(path)


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


def _joined(
    places: Sequence[tuple[InputFile, int | None]], naming: Naming
) -> tuple[list[tuple[InputFile, int | None]], dict[Path, tuple[Series, int]], str]:
    """The places with the files of each series together, in order, where the first of them is; the series and number of each file in one;
    and what there is to say."""
    single = [file for file, number in places if number is None]
    found = find_series(single, lambda file: _told_file(file, naming))
    for series in tqdm(found, desc="looking at the series", unit="series", disable=None, delay=2, leave=False):
        _check_sizes(series, naming)
    of = {file.path: (series, number) for series in found for number, file in series.files.items()}
    order, begins = [], dict[str, int]()
    for index, (file, _) in enumerate(places):
        in_series = of.get(file.path)
        order.append((begins.setdefault(in_series[0].name, index), in_series[1]) if in_series else (index, 0))
    joined = [places[index] for index in sorted(range(len(places)), key=order.__getitem__)]
    return joined, of, _told_series(found, [file for file in single if file.path not in of], naming)


def _told_series(found: Sequence[Series], alone: Sequence[InputFile], naming: Naming) -> str:
    """For example `series: 2 cines from 60 files; single images: 1 (0f1e2d3c4b5a)`."""
    said = f"series: {len(found)} cine{'s' * (len(found) != 1)} from {sum(len(series.files) for series in found)} files"
    gaps = [f"{_called(series.name, naming)} lacks {series.missing}" for series in found if series.missing]
    for kind, names in (("gaps in the numbers", gaps), ("single images", [_called(file.stem, naming) for file in alone])):
        if names:
            said += f"; {kind}: {len(names)} ({', '.join(names[:_TOLD])}{', ...' if len(names) > _TOLD else ''})"
    return said


def _called(stem: str, naming: Naming) -> str:
    return printable(stem) if naming.show_names else naming.codes.code(stem)


def _told_file(file: InputFile, naming: Naming) -> str:
    return printable(str(file.path)) if naming.show_names else file.place


def _check_sizes(series: Series, naming: Naming) -> None:
    """Refuse a series whose frames have several sizes; those that cannot be read fail later, one by one."""
    sizes: dict[tuple[int, int], InputFile] = {}
    for file in series.files.values():
        with contextlib.suppress(ImageError):
            sizes.setdefault(frame_size(file.path), file)
    if len(sizes) > 1:
        (one, first), (two, second), *_ = sizes.items()
        raise VesselError(
            f"series {_called(series.name, naming)}: {_told_file(first, naming)} has {one[0]}x{one[1]} pixels, "
            f"{_told_file(second, naming)} {two[0]}x{two[1]}; the frames of a cine have one size: move the others to another folder"
        )


def _frame(
    file: InputFile, number: int | None, index: int, total: int, naming: Naming, in_series: tuple[Series, int] | None = None
) -> Frame:
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
        series=_in_series(*in_series, naming) if in_series else None,
    )


def _in_series(series: Series, number: int, naming: Naming) -> InSeries:
    code = naming.codes.code(series.name)
    if not naming.show_names:
        remember(series.name, code)
    return InSeries(naming.output_name(series.name), code, number)


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
            one, two = (_told_file(found, naming) for found in (other, file))
            code = "" if naming.show_names else f" (study code {naming.codes.code(file.stem)})"
            raise VesselError(
                f"{one} and {two}: two files of the same name{code}, whose results would overwrite each other; "
                "rename one, or run the two into separate output folders with -o"
            )


def _check_distinct_cines(frames: Sequence[Frame]) -> None:
    """Refuse a series whose cine would have the name of a multi-frame file."""
    files = {cine_of(frame.name, frame.number).casefold(): frame for frame in frames if frame.number is not None}
    for frame in frames:
        if frame.series and (other := files.get(frame.series.name.casefold())):
            raise VesselError(
                f"{other.shown} and {frame.shown}: two cines of the same name, whose results would overwrite each other; "
                "rename one, or run the two into separate output folders with -o"
            )

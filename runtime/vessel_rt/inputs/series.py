"""Series: the frames of one cine in a file each, such as img_0001.png, img_0002.png ..., recognized by their names alone.

Files of one folder whose names differ only in their last number are a series. Does not know what the files show.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vessel_rt.errors import VesselError
from vessel_rt.inputs.input_files import InputFile, stem_of

__all__ = ["Series", "find_series"]

_LAST_NUMBER = re.compile(r"(.*?)(?<!\d)(\d{1,9})(\D*)", re.ASCII | re.DOTALL)  # longer numbers are dates and UIDs, not frames
_SEPARATORS = " _-."


@dataclasses.dataclass(frozen=True)
class Series:
    """The files of at least two frames, by their numbers, in order. `name` is for outputs: the files' name without the number."""

    name: str
    files: Mapping[int, InputFile]

    @property
    def missing(self) -> int:
        """How many numbers between the first and the last no file has."""
        return max(self.files) - min(self.files) + 1 - len(self.files)


def find_series(files: Sequence[InputFile], told: Callable[[InputFile], str]) -> list[Series]:
    """The series among files with one picture each, in the order of their first files; files without siblings are in none.

    Raises:
        VesselError: two files of a series have the same number (`img_1.png` and `img_01.png`), or the outputs of two series would have
            the same name; `told` says which file is meant.
    """
    found: dict[tuple[Path, str, str, str], dict[int, InputFile]] = {}
    for file in files:
        stem = stem_of(file.path)
        if match := _LAST_NUMBER.fullmatch(stem):
            before, number, after = match.groups()
            suffix = file.path.name[len(stem) :].lower()
            numbered = found.setdefault((file.path.absolute().parent, before, after, suffix), {})
            other = numbered.setdefault(int(number), file)
            if other is not file:
                raise VesselError(f"{told(other)} and {told(file)}: frame {int(number)} of one series twice; remove or rename one")
    names: dict[str, InputFile] = {}
    series = []
    for (_, _, after, _), numbered in found.items():
        if len(numbered) > 1:
            first = next(iter(numbered.values()))
            name = _name(first, len(after))
            if (other := names.setdefault(name.casefold(), first)) is not first:
                raise VesselError(
                    f"{told(other)} and {told(first)}: two series of the same name, whose results would overwrite each other; "
                    "rename one, or run the two into separate output folders with -o"
                )
            series.append(Series(name, dict(sorted(numbered.items()))))
    return series


def _name(file: InputFile, after: int) -> str:
    """The stem of the file's outputs without the number, before `after` more letters; that of the folder if nothing is left."""
    end = len(file.stem) - after
    before, after_it = re.sub(r"\d+$", "", file.stem[:end], flags=re.ASCII).rstrip(_SEPARATORS), file.stem[end:]
    return (before + after_it).lstrip(_SEPARATORS) or file.path.absolute().parent.name or "cine"

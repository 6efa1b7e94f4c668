"""The files that inputs name: files, folders and globs searched for images. Does not know about frames."""

from __future__ import annotations

import glob
import itertools
import mimetypes
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from vessel_rt.errors import ImageError, VesselError
from vessel_rt.inputs.dicom import DICOM_SUFFIXES, is_dicom
from vessel_rt.inputs.images import SUFFIXES, require_regular
from vessel_rt.inputs.pseudonyms import printable
from vessel_rt.io.files import missing_part

__all__ = ["InputFile", "files_of", "flat_stem", "stem_of", "told_kinds"]

_FOLDER_MARK = "__"  # between the folders and the name of a file, in the names of its outputs


class InputFile(NamedTuple):
    """A file that an input names: what its outputs are called, what results.jsonl calls it, and its place among the inputs."""

    path: Path
    stem: str
    image: str
    place: str


def files_of(text: str, place: str, show_names: bool, recursive: bool, output: Path | None) -> tuple[list[InputFile], Mapping[str, int]]:
    """The files that an input names, sorted, and how many of each kind are skipped."""
    path, shown = Path(text), printable(text) if show_names else place
    if os.path.isfile(path):
        return [InputFile(path, stem_of(path), path.name, place)], {}
    if os.path.isdir(path):
        candidates, what, base = _in_folder(path, shown, recursive, output), "this folder", path
    elif not os.path.lexists(path) and glob.has_magic(text):
        candidates, what, base = [Path(name) for name in glob.glob(text, recursive=True) if not os.path.isdir(name)], "this pattern", None
    elif os.path.exists(path):
        raise VesselError(f"{shown}: not a regular file")
    else:
        hint = "" if show_names else "; --show-names shows the path"
        raise VesselError(f"{shown}: no such file or folder: {missing_part(path)}{hint}")
    visible = [candidate for candidate in sorted(candidates) if not candidate.name.startswith(".")]
    taken = [_is_image(candidate) for candidate in visible]
    others = _kinds((candidate for candidate, is_taken in zip(visible, taken, strict=True) if not is_taken), show_names)
    images = list(itertools.compress(visible, taken))
    if not images:
        found = f", but {told_kinds(others)}" if others else ""
        hint = "; --recursive searches subfolders" if "subfolder" in others and not recursive else ""
        raise VesselError(f"{shown}: {what} holds no image ({', '.join((*SUFFIXES, *DICOM_SUFFIXES))}){found}{hint}")
    return [_file(image, base, f"{place}, file {number} of {len(images)}") for number, image in enumerate(images, start=1)], others


def _file(path: Path, base: Path | None, place: str) -> InputFile:
    """`base` is the input folder, None for a glob, whose files are called by their names alone."""
    relative = Path(path.name) if base is None else path.relative_to(base)
    return InputFile(path, flat_stem(relative), relative.as_posix(), place)


def _in_folder(folder: Path, shown: str, recursive: bool, output: Path | None) -> list[Path]:
    """What is in a folder, without the content of `output`. Raises VesselError."""

    def refuse(error: OSError) -> None:
        what = "this folder" if error.filename in (None, str(folder)) else "a subfolder"
        raise VesselError(f"{shown}: {what} cannot be read ({error.strerror})") from error

    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        here = [Path(place, name) for name in folders]
        enter = recursive and not _is_same(Path(place), output)
        entered = [path for path in here if enter and not (path.name.startswith(".") or path.is_symlink() or _is_same(path, output))]
        found += [path for path in here if path not in entered]
        found += [Path(place, name) for name in files]
        folders[:] = [path.name for path in entered]
    return found


def _is_same(path: Path, other: Path | None) -> bool:
    return other is not None and other.exists() and path.samefile(other)


def _is_image(path: Path) -> bool:
    """Whether a path is taken, even if only to report that it cannot be read: it has the suffix of an image, or none and may be one."""
    if os.path.isdir(path):
        return False
    if path.suffix.lower() in SUFFIXES or is_dicom(path):
        return True
    return stem_of(path) == path.name and _is_unreadable(path)


def _is_unreadable(path: Path) -> bool:
    """Whether it is a file that cannot be read, or a broken link."""
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
    """How many paths there are of each kind. A suffix is shown only if it is in common use: others may be part of a patient's name."""
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
    """For example `1 .gif, 3 .txt, 2 subfolders`."""
    return ", ".join(f"{count} {kind}{'s' * (count > 1 and kind in ('subfolder', 'special file'))}" for kind, count in kinds.items())


def stem_of(path: Path) -> str:
    """A file's name without its suffix; all of `XA.1.2.840.5`, where the last number is not a suffix."""
    return path.name if path.suffix[1:].isdecimal() else path.stem


def flat_stem(path: Path) -> str:
    """What the outputs of a file in subfolders are called, from its path relative to the input folder: `a__b__x` for `a/b/x.png`."""
    return _FOLDER_MARK.join((*path.parent.parts, stem_of(path)))

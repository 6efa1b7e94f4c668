"""Options and types of arguments that several commands share. Does not know what a command does."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vessel_rt.errors import VesselError

if TYPE_CHECKING:
    from vessel_rt.device.providers import Device
    from vessel_rt.formats.bundle import Bundle
    from vessel_rt.inputs.frames import Naming
    from vessel_rt.inputs.images import Rescale

__all__ = [
    "MAX_BATCH",
    "add_json",
    "add_naming",
    "add_propagate",
    "device",
    "find_bundle",
    "find_bundle_folder",
    "frames",
    "gibibytes",
    "minutes",
    "naming_of",
    "natural",
    "positive",
    "ray_address",
    "rescale",
    "several_devices",
    "unicode_text",
    "up_to",
]

T = TypeVar("T")

MAX_BATCH = 4096
_ENGINES = Path("engines")


def add_naming(group: Any) -> None:
    """The options that `naming_of` reads."""
    group.add_argument("--show-names", action="store_true", help="show file names instead of study codes")
    group.add_argument(
        "--key", type=Path, metavar="FILE", help="the key of study codes (default: $VESSEL_KEY, else in ~/.config/vessel-rt)"
    )


def add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON, for programs")


def naming_of(arguments: argparse.Namespace, output: Path | None = None, pseudonymize: bool = False) -> Naming:
    """What files are to be called; the key may not lie in `output`. Raises VesselError."""
    from vessel_rt.inputs.frames import Naming
    from vessel_rt.inputs.pseudonyms import StudyCodes

    return Naming(StudyCodes.load(arguments.key, outside=output), arguments.show_names, pseudonymize)


def find_bundle(folder: Path | None, quiet: bool = False) -> Bundle:
    """The bundle in the folder that `find_bundle_folder` finds.

    Raises:
        VesselError: there is none, or it cannot be loaded.
    """
    from vessel_rt.formats.bundle import Bundle

    return Bundle.load(find_bundle_folder(folder, quiet))


def find_bundle_folder(folder: Path | None, quiet: bool = False) -> Path:
    """`folder`, else $VESSEL_BUNDLE, else that of the newest complete bundle under ./engines; printed unless it was asked for.

    Raises:
        VesselError: there is none.
    """
    from vessel_rt.formats.bundle import BUNDLE_FILE

    if folder:
        return folder
    if os.environ.get("VESSEL_BUNDLE"):
        found = Path(os.environ["VESSEL_BUNDLE"])
    else:
        complete = [path for path in _ENGINES.glob(f"*/{BUNDLE_FILE}") if not path.parent.name.startswith(".")]
        if not complete:
            raise VesselError(f"no bundle: name one with --bundle or VESSEL_BUNDLE; none is in ./{_ENGINES} (`make export` puts one there)")
        found = max(complete, key=lambda path: path.stat().st_mtime).parent
    if not quiet:
        print(f"bundle {found}", file=sys.stderr)
    return found


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def add_propagate(parser: Any, text: str) -> None:
    """--propagate, with `text` for its help."""
    parser.add_argument("--propagate", nargs="?", const="best-frame", choices=["best-frame", "sa2va"], help=text)


def up_to(limit: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if positive(text) > limit:
            raise argparse.ArgumentTypeError(f"{text} is too many; at most {limit}")
        return int(text)

    return parse


def gibibytes(text: str) -> int:
    """A number of GiB, in bytes."""
    try:
        size = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of GiB")
    return size


def minutes(text: str) -> float:
    """A number of minutes from 0 on, at most a week."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 7 * 24 * 60:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes from 0 to 10080")
    return value


def unicode_text(text: str) -> str:
    """Text that the tokenizer can take: bytes of an argument that are not UTF-8 reach Python as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text") from None
    return text


def ray_address(text: str) -> str:
    from vessel_rt.run.ray_pool import check_address

    return _parsed(check_address, text)


def device(text: str) -> Device:
    from vessel_rt.device.providers import Device

    return _parsed(Device.parse, text)


def several_devices(text: str) -> tuple[Device, ...]:
    from vessel_rt.device.providers import Device

    return _parsed(Device.parse_several, text)


def frames(text: str) -> slice:
    from vessel_rt.inputs.dicom import parse_frames

    return _parsed(parse_frames, text)


def rescale(text: str) -> Rescale:
    from vessel_rt.inputs.images import Rescale

    return _parsed(Rescale.parse, text)


def _parsed(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e

"""Damaged and lying DICOM files, made of small ones of every transfer syntax that can be written here."""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pydicom
from PIL import Image

from tests.fuzz.damage import damaged, replaced
from tests.support.dicom_files import BIG_ENDIAN, ENHANCED_XA, EXPLICIT, JPEG, JPEG_2000, RLE, item, jpeg, lookup_table, make_dicom

__all__ = ["mutate", "seeds"]

_DEFLATED, _IMPLICIT = pydicom.uid.DeflatedExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian
_NUMBERS = (  # attributes of which others follow
    *("NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PlanarConfiguration", "WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"),
)
_VALUES = (-1, 0, 1, 2, 3, 7, 12, 16, 24, 32, 64, 255, 4096, 32767, 65535)
_WORDS = ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "PALETTE COLOR", "ARGB", "", "LINEAR", "SIGMOID")


def mutate(rng: random.Random) -> tuple[str, bytes]:
    """The name of a file, with a suffix or without, and its content."""
    name, content = rng.choice(seeds())
    how: list[Callable[[random.Random, bytes], bytes]] = [_damaged_behind_the_magic, rng.choice((_other_value, _other_length, _crowded))]
    for change in rng.choice((how[:1], how[1:], how[1:], how[::-1])):
        content = change(rng, content)
    return (name if rng.random() < 0.9 else "I0000012"), content


@functools.cache
def seeds() -> tuple[tuple[str, bytes], ...]:
    """Whole files by name."""
    cine = np.random.default_rng(0).integers(0, 4096, (3, 40, 48), np.uint16)
    colours = np.random.default_rng(1).integers(0, 256, (40, 48, 3), np.uint8)
    codes = [jpeg(Image.fromarray((frame >> 4).astype(np.uint8))) for frame in cine]
    found: dict[str, bytes] = {}

    def add(name: str, *of: object, **attributes: object) -> None:
        buffer = io.BytesIO()
        make_dicom(buffer, *of, **attributes)
        found[f"{name}.dcm"] = buffer.getvalue()

    syntaxes = {"explicit": EXPLICIT, "implicit": _IMPLICIT, "big-endian": BIG_ENDIAN, "deflated": _DEFLATED, "rle": RLE}
    if pydicom.pixels.get_encoder(JPEG_2000).is_available:
        syntaxes["jpeg-2000"] = JPEG_2000
    for name, syntax in syntaxes.items():
        add(name, cine, syntax, BitsStored=12)
        add(f"{name}-colours", colours, syntax)
    add("jpeg", (cine >> 4).astype(np.uint8), JPEG, PixelData=codes)
    add("jpeg-fragments", cine[:1].astype(np.uint8), JPEG, PixelData=pydicom.encaps.encapsulate(codes[:1], fragments_per_frame=4))
    add("window", cine[0], BitsStored=12, WindowCenter=1000, WindowWidth=500, RescaleSlope=2, RescaleIntercept=-7)
    add("lut", cine[0], BitsStored=12, VOILUTSequence=lookup_table([0, 1000, 4095], 100, 12))
    palette = {f"{colour}PaletteColorLookupTableData": bytes(range(256)) for colour in ("Red", "Green", "Blue")}
    palette |= {f"{colour}PaletteColorLookupTableDescriptor": [256, 0, 8] for colour in ("Red", "Green", "Blue")}
    add("palette", (cine[0] >> 4).astype(np.uint8), PhotometricInterpretation="PALETTE COLOR", **palette)
    groups = pydicom.Sequence(item(FrameVOILUTSequence=item(WindowCenter=100, WindowWidth=number + 9))[0] for number in range(3))
    shared = item(PixelValueTransformationSequence=item(RescaleSlope=2, RescaleIntercept=0, RescaleType="US"))
    sequences = {"SharedFunctionalGroupsSequence": shared, "PerFrameFunctionalGroupsSequence": groups}
    add("enhanced", cine, SOPClassUID=ENHANCED_XA, BitsStored=12, **sequences)
    return tuple(found.items())


def _damaged_behind_the_magic(rng: random.Random, content: bytes) -> bytes:
    return content[:132] + damaged(rng, content[132:])


def _other_value(rng: random.Random, content: bytes) -> bytes:
    """Attributes with other values, written as pydicom writes them; the file as it is where it does not."""
    try:
        dataset = pydicom.dcmread(io.BytesIO(content))
        for _ in range(rng.choice((1, 1, 2, 4))):
            kind = rng.randrange(4)
            if kind == 0:
                setattr(dataset, rng.choice(("PhotometricInterpretation", "VOILUTFunction")), rng.choice(_WORDS))
            elif kind == 1:
                dataset.NumberOfFrames = rng.choice((*_VALUES, 10**6, 2**31 - 1))
            elif kind == 2:
                dataset.PixelData = damaged(rng, dataset.PixelData)
            else:
                setattr(dataset, rng.choice(_NUMBERS), rng.choice(_VALUES))
        buffer = io.BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()
    except Exception:  # a value that does not go into its type
        return content


def _other_length(rng: random.Random, content: bytes) -> bytes:
    """A length, of an element or of a fragment, that is another."""
    marks = (b"\xfe\xff\x00\xe0", b"\xe0\x7f\x10\x00OW\0\0", b"\xe0\x7f\x10\x00OB\0\0", b"SQ\0\0", b"\x28\0\x10\0US", b"\x02\0\x10\0UI")
    places = [(content.find(mark, 132), len(mark)) for mark in marks if content.find(mark, 132) > 0]
    if not places:
        return content
    at, length = rng.choice(places)
    return replaced(rng, content, at + length, 2 if content[at + 4 : at + 6] in (b"US", b"UI") else 4)


def _crowded(rng: random.Random, content: bytes) -> bytes:
    """Sequences in sequences, or thousands of empty items, in a private element at the start; of a deflated file, inside it."""
    begins = 144 + int.from_bytes(content[140:144], "little")
    head, data = content[:begins], content[begins:]
    unbounded = struct.pack("<I", 0xFFFFFFFF)
    items = rng.choice((10, 1000, 5000))
    crowd = rng.choice(
        (
            b"\x01\0\x01\x10SQ\0\0" + unbounded + b"\xfe\xff\0\xe0\0\0\0\0" * items + b"\xfe\xff\xdd\xe0\0\0\0\0",
            (b"\x01\0\x01\x10SQ\0\0" + unbounded + b"\xfe\xff\0\xe0" + unbounded) * items,
            b"\x01\0\x01\x10LO" + struct.pack("<H", 65534) + bytes(65534),
        )
    )
    if _DEFLATED.encode() not in head:
        return head + crowd + data
    try:
        data = zlib.decompress(data, -zlib.MAX_WBITS)
    except zlib.error:
        return content
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    return head + packer.compress(crowd + data) + packer.flush()

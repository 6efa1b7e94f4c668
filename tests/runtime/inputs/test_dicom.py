from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tests.support.dicom_files import (
    BIG_ENDIAN,
    ENHANCED_XA,
    EXPLICIT,
    ID,
    JPEG,
    JPEG_2000,
    NAME,
    REPORT,
    RLE,
    SECONDARY_CAPTURE,
    cut,
    item,
    jpeg,
    lookup_table,
    make_dicom,
    patched,
    pydicom,
    ramp,
)
from tests.support.frames import CODES, make_frame
from tests.support.paths import ROOT
from vessel_rt.cli import main
from vessel_rt.errors import ImageError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.dicom import frame_count, frame_times, is_dicom, parse_frames, read_dicom
from vessel_rt.inputs.frames import Naming, Selection, find_frames
from vessel_rt.inputs.images import MAX_SIDE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # of values that no device would write

CINE = Path(os.environ.get("VESSEL_DATA", ROOT.parent / "shared" / "data")) / "xa" / "coronary_cine.dcm"
GRAY = ramp()
EMPTY_ITEM = b"\xfe\xff\0\xe0\0\0\0\0"
TWELVE = np.array([[0, 1, 8, 100], [1000, 2047, 2048, 4095]], np.uint16)


def gray(path: Path, number: int | None = None) -> npt.NDArray[Any]:
    """The frame's one channel, three times in the picture."""
    image = read_dicom(path, number)
    assert image.mode == "RGB"
    assert image.info == {}
    channels = np.moveaxis(np.asarray(image), -1, 0)
    np.testing.assert_array_equal(channels[0], channels[1])
    np.testing.assert_array_equal(channels[0], channels[2])
    return channels[0]


def row(*values: int, dtype: npt.DTypeLike = np.uint16) -> npt.NDArray[Any]:
    return np.array([values], dtype)


def seen(values: npt.NDArray[Any], lowest: float, highest: float) -> npt.NDArray[np.uint8]:
    """`lowest` as black, `highest` as white."""
    return np.rint((values.astype(np.float64) - lowest) / (highest - lowest) * 255).astype(np.uint8)


def test_what_is_taken_for_dicom(tmp_path: Path) -> None:
    content = make_dicom(tmp_path / "a.dcm", GRAY).read_bytes()
    for name in ("b.DCM", "c.dicom", "I0000012", "XA.1.2.840.5", "notes.txt", "DICOMDIR", "dicomdir"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "plain").write_text("This is not an image.")
    (tmp_path / "text.dcm").write_text("This is not an image.")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.1").mkdir()
    taken = [path.name for path in sorted(tmp_path.iterdir()) if is_dicom(path)]
    assert taken == ["I0000012", "XA.1.2.840.5", "a.dcm", "b.DCM", "c.dicom", "text.dcm"]
    assert not is_dicom(tmp_path / "none")


def test_only_a_multi_frame_file_has_a_number_of_frames(tmp_path: Path) -> None:
    assert frame_count(make_dicom(tmp_path / "single.dcm", GRAY)) is None
    assert frame_count(make_dicom(tmp_path / "one.dcm", GRAY[None])) is None
    assert frame_count(make_dicom(tmp_path / "none.dcm", GRAY, NumberOfFrames=0)) is None
    assert frame_count(make_dicom(tmp_path / "cine.dcm", np.stack([GRAY] * 7))) == 7
    assert frame_count(cut(tmp_path / "cine.dcm", -1000)) is None  # told of as a whole
    for syntax in (pydicom.uid.ImplicitVRLittleEndian, BIG_ENDIAN, pydicom.uid.DeflatedExplicitVRLittleEndian, RLE):
        for pixels in (GRAY, TWELVE, GRAY[:, :1]):
            assert frame_count(make_dicom(tmp_path / "other.dcm", np.stack([pixels] * 7), syntax)) == 7


@pytest.mark.parametrize("claim", ["Quokka  ", "3\\4     ", "nan     ", "inf     ", "1e400   ", "0x10    "])
def test_a_number_of_frames_that_is_none_is_told_when_the_file_is_read(tmp_path: Path, claim: str) -> None:
    path = patched(make_dicom(tmp_path / "a.dcm", GRAY, NumberOfFrames=11223344), b"11223344", claim.encode())
    for read in (lambda: frame_count(path), lambda: read_dicom(path, None)):
        with pytest.raises(ImageError, match="its number of frames is not a number"):
            read()
    assert [frame.number for frame in find_frames([str(path)], Naming(CODES))[0]] == [None]


def test_a_number_of_frames_of_no_known_type(tmp_path: Path) -> None:
    path = patched(make_dicom(tmp_path / "a.dcm", GRAY, NumberOfFrames=2), b"\x28\0\x08\0IS", b"\x28\0\x08\0ZZ")
    with pytest.raises(ImageError, match="its number of frames is not a number"):
        frame_count(path)


@pytest.mark.parametrize("claim", [2**31 - 1, 100_000, -3])
def test_frames_that_a_file_cannot_hold_are_not_listed(tmp_path: Path, claim: int) -> None:
    path = make_dicom(tmp_path / "a.dcm", GRAY, NumberOfFrames=claim)
    assert frame_count(path) is None
    with pytest.raises(ImageError, match="its header claims more frames than the file can hold"):
        read_dicom(path, None)


@contextlib.contextmanager
def memory_stays_under(most: int) -> Iterator[None]:
    """Bytes that Python's objects take in the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("syntax", [EXPLICIT, JPEG, RLE, pydicom.uid.DeflatedExplicitVRLittleEndian], ids=lambda syntax: syntax.name)
def test_ten_megabytes_do_not_become_ten_million_frames(standin: Bundle, tmp_path: Path, syntax: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (10, 1000, 1000), np.uint8)
    content = {"PixelData": [bytes(10**6)] * 10} if syntax in (JPEG, RLE) else {}
    path = make_dicom(tmp_path / "a.dcm", noise, EXPLICIT if content else syntax)
    if content:
        path = make_dicom(path, noise, JPEG, **content)
        patched(path, JPEG.encode(), RLE.encode().ljust(len(JPEG), b"\0")) if syntax == RLE else None
    claimed = pydicom.dcmread(path)
    claimed.NumberOfFrames = 9_999_999
    claimed.save_as(path)
    assert 9_900_000 < path.stat().st_size < 10_100_000
    with memory_stays_under(80_000_000):
        assert len(find_frames([str(path)], Naming(CODES)).frames) == 1
    assert main(["infer", str(path), "--bundle", str(standin.folder), "-o", str(tmp_path / "out"), "--device", "cpu", "-q"]) == 1
    (line,) = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert TOO_MANY in json.loads(line)["error"]


def test_compressed_frames_are_at_most_as_many_as_their_fragments(tmp_path: Path) -> None:
    for claim, found in ((3, 3), (2, 2), (4, None)):
        path = make_dicom(tmp_path / "a.dcm", CINE_OF_THREE, JPEG, NumberOfFrames=claim, PixelData=CODES_OF_THREE)
        assert frame_count(path) == found
    empty = make_dicom(tmp_path / "b.dcm", CINE_OF_THREE, JPEG, NumberOfFrames=500, PixelData=EMPTY_ITEM * 1000)
    assert frame_count(empty) is None


@pytest.mark.parametrize(
    "sizes", [{"Rows": 65535, "Columns": 65535}, {"SamplesPerPixel": 65535}, {"BitsAllocated": 65535}, {"BitsAllocated": 0}]
)
def test_absurd_sizes_have_no_room_for_frames(tmp_path: Path, sizes: dict[str, int]) -> None:
    path = make_dicom(tmp_path / "a.dcm", CINE_OF_THREE, **sizes)
    assert frame_count(path) is None
    with pytest.raises(ImageError):
        read_dicom(path, 0)


@pytest.mark.parametrize("bits", [1, 7, 12, 24, 33, 128])
def test_odd_depths_are_an_error_or_a_picture(tmp_path: Path, bits: int) -> None:
    path = make_dicom(tmp_path / "a.dcm", CINE_OF_THREE, BitsAllocated=bits, BitsStored=min(bits, 8))
    with contextlib.suppress(ImageError):
        assert (frame_count(path) or 1) <= 3 * 8
    with contextlib.suppress(ImageError):
        assert read_dicom(path, 0).size == (48, 40)


def _sequence(content: bytes, length: int | None = None) -> bytes:
    """A private sequence as it lies in a file; of undefined length, unless one is given."""
    return b"\x21\0\x01\x10SQ\0\0" + struct.pack("<I", 0xFFFFFFFF if length is None else length) + content


CROWDED = {
    "wide": _sequence(EMPTY_ITEM * 10**6),
    "deep": _sequence(b"\xfe\xff\0\xe0\xff\xff\xff\xff") * 10**5,
    "many": b"".join(struct.pack("<HH2sH", 0x21, 0x1000 + number % 4096, b"LO", 0) for number in range(10**6)),
    "functional groups": b"\x00\x52\x30\x92SQ\0\0" + struct.pack("<I", 8 * 10**6) + EMPTY_ITEM * 10**6,
}


@pytest.mark.parametrize("deflated", [False, True], ids=["plain", "deflated"])
@pytest.mark.parametrize("kind", CROWDED)
def test_a_header_of_millions_of_parts_is_refused(tmp_path: Path, kind: str, deflated: bool) -> None:
    syntax = pydicom.uid.DeflatedExplicitVRLittleEndian if deflated else EXPLICIT
    content = make_dicom(tmp_path / "a.dcm", GRAY, syntax, SOPClassUID=SECONDARY_CAPTURE).read_bytes()
    begins = 144 + int.from_bytes(content[140:144], "little")
    data = zlib.decompress(content[begins:], -zlib.MAX_WBITS) if deflated else content[begins:]
    before = data.index(b"\xe0\x7f\x10\0") if kind == "functional groups" else data.index(b"\x28\0\x02\0")
    data = data[:before] + CROWDED[kind] + data[before:]
    if deflated:
        packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        data = packer.compress(data) + packer.flush()
    (tmp_path / "a.dcm").write_bytes(content[:begins] + data)
    with pytest.raises(ImageError, match=r"more than \d+ elements|header cannot be read|out of proportion"):
        read_dicom(tmp_path / "a.dcm", None)


def test_a_deflated_file_does_not_fill_memory(tmp_path: Path) -> None:
    content = make_dicom(tmp_path / "a.dcm", GRAY, pydicom.uid.DeflatedExplicitVRLittleEndian).read_bytes()
    begins = 144 + int.from_bytes(content[140:144], "little")
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    (tmp_path / "a.dcm").write_bytes(content[:begins] + packer.compress(bytes(10**9)) + packer.flush())
    for read in (lambda: read_dicom(tmp_path / "a.dcm", None), lambda: frame_count(tmp_path / "a.dcm")):
        with memory_stays_under(500_000_000), pytest.raises(ImageError, match="out of proportion"):
            read()


def test_frames_of_what_is_not_dicom(tmp_path: Path) -> None:
    (tmp_path / "text.dcm").write_text("This is not an image.")
    with pytest.raises(ImageError, match="not a DICOM file, or an encrypted one"):
        frame_count(tmp_path / "text.dcm")
    with pytest.raises(ImageError, match="cannot be read"):
        frame_count(tmp_path / "none.dcm")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("10:60:5", range(10, 60, 5)),
        ("10", [10]),
        ("-1", [95]),
        ("-2", [94]),
        ("::2", range(0, 96, 2)),
        ("-20:", range(76, 96)),
        (":3", [0, 1, 2]),
        (":", range(96)),
        ("4:6:", [4, 5]),
        ("200", []),
        ("90:1000", range(90, 96)),
        ("3::-1", [3, 2, 1, 0]),
    ],
)
def test_frames_are_chosen_as_python_slices(text: str, chosen: Sequence[int]) -> None:
    assert list(range(96)[parse_frames(text)]) == list(chosen)


@pytest.mark.parametrize("text", ["", " ", "a", "1.5", "1,2", "1:2:0", "1:2:-0", "1:2:00", "1:2:3:4", "1 : 2", "--1", "10:60:5s", "1\n"])
def test_what_chooses_no_frames_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="does not choose frames: take START:END:STEP as in Python, such as 10:60:5"):
        parse_frames(text)


def test_eight_bits_are_what_they_are(tmp_path: Path) -> None:
    np.testing.assert_array_equal(gray(make_dicom(tmp_path / "a.dcm", GRAY)), GRAY)


def test_monochrome1_is_turned_round(tmp_path: Path) -> None:
    path = make_dicom(tmp_path / "a.dcm", GRAY, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(gray(path), 255 - GRAY)
    windowed = make_dicom(tmp_path / "b.dcm", GRAY, PhotometricInterpretation="MONOCHROME1", WindowCenter=100, WindowWidth=11)
    assert gray(windowed)[0, :2].tolist() == [255, 255]
    assert gray(windowed).min() == 0


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_more_bits_are_scaled_from_what_they_can_hold(tmp_path: Path, bits: int) -> None:
    most = 2**bits - 1
    values = row(0, 1, 100, 500, 1000, most // 2, most - 1, most)
    np.testing.assert_array_equal(gray(make_dicom(tmp_path / "a.dcm", values, BitsStored=bits)), seen(values, 0, most))
    assert seen(TWELVE, 0, 4095).tolist() == [[0, 0, 0, 6], [62, 127, 128, 255]]


def test_signed_values_are_scaled_from_the_least(tmp_path: Path) -> None:
    values = row(-32768, -32768 + 257, -257, -1, 0, 257, 32767, dtype=np.int16)
    assert gray(make_dicom(tmp_path / "a.dcm", values)).tolist() == [[0, 1, 127, 127, 128, 129, 255]]
    values = row(-2048, -1000, 0, 2047, dtype=np.int16)
    np.testing.assert_array_equal(gray(make_dicom(tmp_path / "b.dcm", values, BitsStored=12)), seen(values, -2048, 2047))
    values = row(-128, -1, 0, 127, dtype=np.int8)
    assert gray(make_dicom(tmp_path / "c.dcm", values)).tolist() == [[0, 127, 128, 255]]


def test_what_lies_beyond_the_stored_bits_is_not_seen(tmp_path: Path) -> None:
    path = make_dicom(tmp_path / "a.dcm", TWELVE | np.uint16(0xA000), BitsStored=12)
    np.testing.assert_array_equal(gray(path), seen(TWELVE, 0, 4095))


def test_slope_and_intercept_alone_change_nothing_but_the_direction(tmp_path: Path) -> None:
    rescaled = make_dicom(tmp_path / "a.dcm", TWELVE, BitsStored=12, RescaleSlope=2.5, RescaleIntercept=-1024)
    np.testing.assert_array_equal(gray(rescaled), seen(TWELVE, 0, 4095))
    falling = make_dicom(tmp_path / "b.dcm", GRAY, RescaleSlope=-1, RescaleIntercept=0)
    np.testing.assert_array_equal(gray(falling), 255 - GRAY)


def test_a_window_is_of_rescaled_values(tmp_path: Path) -> None:
    values = row(924, 1000, 1024, 1100, 1164, 1300)  # less 1024: Hounsfield units
    path = make_dicom(tmp_path / "a.dcm", values, BitsStored=12, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=401)
    assert gray(path).tolist() == [[39, 87, 102, 151, 192, 255]]  # ((HU - 39.5) / 400 + 0.5) * 255
    falling = make_dicom(tmp_path / "b.dcm", GRAY, RescaleSlope=-1, RescaleIntercept=255, WindowCenter=128, WindowWidth=256)
    np.testing.assert_array_equal(gray(falling), 255 - GRAY)


WINDOWED = {  # PS3.3 C.11.2.1.2.1, C.11.2.1.3.2 and C.11.2.1.3.1
    "LINEAR": (11, {94: 0, 95: 13, 100: 140, 104: 242, 105: 255}),  # ((x - 99.5) / 10 + 0.5) * 255
    "LINEAR_EXACT": (20, {90: 0, 93: 38, 97: 89, 105: 191, 110: 255}),  # ((x - 100) / 20 + 0.5) * 255
    "SIGMOID": (64, {0: 0, 84: 69, 101: 131, 116: 186, 255: 255}),  # 255 / (1 + exp(-4 (x - 100) / 64))
}


@pytest.mark.parametrize("function", WINDOWED)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_windows_are_the_standards(tmp_path: Path, function: str, dtype: npt.DTypeLike) -> None:
    width, expected = WINDOWED[function]
    path = make_dicom(tmp_path / "a.dcm", row(*expected, dtype=dtype), WindowCenter=100, WindowWidth=width, VOILUTFunction=function)
    assert gray(path).tolist() == [list(expected.values())]
    if function == "LINEAR":
        plain = make_dicom(tmp_path / "b.dcm", row(*expected, dtype=dtype), WindowCenter=100, WindowWidth=width)
        assert gray(plain).tolist() == [list(expected.values())]


def test_of_several_windows_the_first_is_taken(tmp_path: Path) -> None:
    width, expected = WINDOWED["LINEAR"]
    path = make_dicom(tmp_path / "a.dcm", row(*expected), WindowCenter=[100, 3000], WindowWidth=[width, 10])
    assert gray(path).tolist() == [list(expected.values())]


def test_a_voi_lut_goes_before_a_window(tmp_path: Path) -> None:
    lut = lookup_table([0, 1000, 3000, 4095], first=100, bits=12)
    path = make_dicom(tmp_path / "a.dcm", row(0, 100, 101, 102, 103, 104, 4095), VOILUTSequence=lut, WindowCenter=1, WindowWidth=1)
    assert gray(path).tolist() == [[0, 0, 62, 187, 255, 255, 255]]
    signed = make_dicom(
        tmp_path / "b.dcm", row(-9, -2, -1, 0, 1, 9, dtype=np.int16), VOILUTSequence=lookup_table([0, 1000, 3000, 4095], -2, 12)
    )
    assert gray(signed).tolist() == [[0, 0, 62, 187, 255, 255]]


def test_a_voi_lut_is_looked_up_as_pydicom_does(tmp_path: Path) -> None:
    curve = np.rint(65535 * (np.arange(4096) / 4095) ** 0.5).astype("<u2")
    values = np.random.default_rng(0).integers(0, 4096, (16, 16), np.uint16)
    for name, table in (("words", curve.tolist()), ("bytes", curve.tobytes())):
        path = make_dicom(tmp_path / name, values, BitsStored=12, VOILUTSequence=lookup_table(table, 0, 16, 4096))
        expected = pydicom.pixels.apply_voi_lut(values, pydicom.dcmread(path))
        np.testing.assert_array_equal(gray(path), seen(expected, 0, 65535))


def test_a_voi_lut_of_bytes_has_more_than_256_entries(tmp_path: Path) -> None:
    table = (np.arange(1024) // 4).astype(np.uint8)
    values = row(0, 3, 4, 255, 256, 257, 1000, 1023)
    for name, entries in (("packed", table.tobytes()), ("words", table.tolist())):
        path = make_dicom(tmp_path / name, values, BitsStored=10, VOILUTSequence=lookup_table(entries, 0, 8, 1024))
        np.testing.assert_array_equal(gray(path), values // 4)


def test_a_voi_lut_is_of_rescaled_values(tmp_path: Path) -> None:
    lut = lookup_table([0, 60, 200, 255], first=0, bits=8)
    path = make_dicom(tmp_path / "a.dcm", row(10, 11, 12, 13), RescaleSlope=0.5, RescaleIntercept=-4.5, VOILUTSequence=lut)
    assert gray(path).tolist() == [[0, 60, 200, 200]]  # 0.5 and 1.5 are rounded to the even


def test_a_modality_lut_is_looked_up_but_for_angiograms(tmp_path: Path) -> None:
    values, lut = row(0, 10, 11, 12, 13, 99), lookup_table([4095, 3000, 1000, 0], first=10, bits=12)
    applied = make_dicom(tmp_path / "a.dcm", values, BitsStored=12, SOPClassUID=SECONDARY_CAPTURE, ModalityLUTSequence=lut)
    assert gray(applied).tolist() == [[255, 255, 187, 62, 0, 0]]
    windowed = make_dicom(
        tmp_path / "b.dcm",
        values,
        BitsStored=12,
        SOPClassUID=SECONDARY_CAPTURE,
        ModalityLUTSequence=lut,
        WindowCenter=2000.5,
        WindowWidth=2001,
    )
    assert gray(windowed).tolist() == [[255, 255, 255, 0, 0, 0]]
    angiogram = make_dicom(tmp_path / "c.dcm", values, BitsStored=12, ModalityLUTSequence=lut)
    np.testing.assert_array_equal(gray(angiogram), seen(values, 0, 4095))


def test_frames_of_an_enhanced_file_have_their_own_windows(tmp_path: Path) -> None:
    width, expected = WINDOWED["LINEAR"]
    frames = np.stack([row(*expected), row(*expected) - np.uint16(50), row(*expected)])
    windows = [(100, width), (50, width), (1000, 10)]
    path = make_dicom(
        tmp_path / "a.dcm",
        frames,
        SOPClassUID=ENHANCED_XA,
        SharedFunctionalGroupsSequence=item(PixelValueTransformationSequence=item(RescaleSlope=2, RescaleIntercept=0, RescaleType="US")),
        PerFrameFunctionalGroupsSequence=pydicom.Sequence(
            item(FrameVOILUTSequence=item(WindowCenter=2 * center - 0.5, WindowWidth=2 * width - 1))[0] for center, width in windows
        ),
    )
    grays = [gray(path, number) for number in range(3)]
    assert grays[0].tolist() == [list(expected.values())]
    np.testing.assert_array_equal(grays[1], grays[0])
    assert grays[2].max() == 0


def test_a_gray_is_the_same_in_every_frame(tmp_path: Path) -> None:
    dark, bright = row(0, 50, 500, 1000), row(1000, 3000, 4000, 4095)
    path = make_dicom(tmp_path / "a.dcm", np.stack([dark, bright]), BitsStored=12)
    assert [gray(path, number).tolist() for number in range(2)] == [[[0, 3, 31, 62]], [[62, 187, 249, 255]]]


def test_colours(tmp_path: Path) -> None:
    colours = np.asarray(make_frame(8, 6))
    np.testing.assert_array_equal(np.asarray(read_dicom(make_dicom(tmp_path / "a.dcm", colours), None)), colours)
    planes = np.moveaxis(colours, -1, 0).tobytes()
    planar = make_dicom(tmp_path / "b.dcm", colours, PlanarConfiguration=1, PixelData=planes)
    np.testing.assert_array_equal(np.asarray(read_dicom(planar, None)), colours)
    deep = make_dicom(tmp_path / "c.dcm", colours.astype(np.uint16) * np.uint16(257))
    np.testing.assert_array_equal(np.asarray(read_dicom(deep, None)), colours)
    cine = make_dicom(tmp_path / "d.dcm", np.stack([colours, 255 - colours]))
    np.testing.assert_array_equal(np.asarray(read_dicom(cine, 1)), 255 - colours)


def test_luminance_and_chrominance_become_colours(tmp_path: Path) -> None:
    values = np.array([[[76, 85, 255], [150, 44, 21], [29, 255, 107], [200, 128, 128]]], np.uint8)
    image = np.asarray(read_dicom(make_dicom(tmp_path / "a.dcm", values, PhotometricInterpretation="YBR_FULL"), None))
    np.testing.assert_array_equal(image, pydicom.pixels.convert_color_space(values, "YBR_FULL", "RGB"))
    np.testing.assert_allclose(image[0], [[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 200, 200]], atol=2)


PALETTE = {"Red": [0, 10, 20, 255], "Green": [255, 30, 40, 0], "Blue": [7, 8, 9, 10]}


def palette(tables: dict[str, list[int]], first: int, bits: int, words: str) -> dict[str, Any]:
    """`words` are how an entry lies in the file, whose value has `bits`."""
    attributes: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, table in tables.items():
        attributes[f"{colour}PaletteColorLookupTableDescriptor"] = [len(table), first, bits]
        attributes[f"{colour}PaletteColorLookupTableData"] = (np.array(table) * (257 if bits == 16 else 1)).astype(words).tobytes()
    return attributes


@pytest.mark.parametrize(
    ("bits", "words", "syntax"), [(8, "u1", EXPLICIT), (8, "<u2", EXPLICIT), (16, "<u2", EXPLICIT), (16, ">u2", BIG_ENDIAN)]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_palette_is_looked_up(tmp_path: Path, bits: int, words: str, syntax: str, dtype: npt.DTypeLike) -> None:
    path = make_dicom(tmp_path / "a.dcm", row(0, 5, 6, 7, 8, 99, dtype=dtype), syntax, **palette(PALETTE, 5, bits, words))
    assert np.asarray(read_dicom(path, None))[0].tolist() == [[table[entry] for table in PALETTE.values()] for entry in (0, 0, 1, 2, 3, 3)]


def test_a_palette_of_bytes_has_more_than_256_entries(tmp_path: Path) -> None:
    table = [entry // 2 for entry in range(512)]
    values = row(0, 255, 256, 300, 511, 600)
    path = make_dicom(tmp_path / "a.dcm", values, **palette(dict.fromkeys(PALETTE, table), 0, 8, "u1"))
    np.testing.assert_array_equal(gray(path), [[0, 127, 128, 150, 255, 255]])


def test_a_palette_in_segments(tmp_path: Path) -> None:
    attributes: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in PALETTE:
        attributes[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        attributes[f"Segmented{colour}PaletteColorLookupTableData"] = bytes([0, 1, 0, 1, 255, 255])  # 0, then in a line to 255
    np.testing.assert_array_equal(gray(make_dicom(tmp_path / "a.dcm", GRAY, **attributes)), GRAY)


@pytest.mark.parametrize(
    "syntax",
    [EXPLICIT, pydicom.uid.ImplicitVRLittleEndian, BIG_ENDIAN, pydicom.uid.DeflatedExplicitVRLittleEndian, RLE, JPEG_2000],
    ids=lambda syntax: syntax.name,
)
def test_an_encoding_without_loss_loses_nothing(tmp_path: Path, syntax: Any) -> None:
    if syntax == JPEG_2000 and not pydicom.pixels.get_encoder(JPEG_2000).is_available:
        pytest.skip("no encoder of JPEG 2000 is installed")
    cine = np.random.default_rng(0).integers(0, 4096, (3, 40, 48), np.uint16)
    path = make_dicom(tmp_path / "a.dcm", cine, syntax, BitsStored=12)
    for number in (2, 0, 1):
        np.testing.assert_array_equal(gray(path, number), seen(cine[number], 0, 4095))
    single = make_dicom(tmp_path / "b.dcm", cine[0].astype(np.uint8), syntax)
    np.testing.assert_array_equal(gray(single), cine[0].astype(np.uint8))
    curve = np.arange(4096, dtype=np.uint16)[::-1] * np.uint16(16)
    lut = lookup_table(curve.astype(">u2" if syntax == BIG_ENDIAN else "<u2").tobytes(), 0, 16, 4096)
    looked_up = make_dicom(tmp_path / "c.dcm", cine, syntax, BitsStored=12, VOILUTSequence=lut)
    np.testing.assert_array_equal(gray(looked_up, 1), seen(curve[cine[1]], 0, 65535))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *((f"MR_small_{kind}", "MR_small") for kind in ("implicit", "bigendian", "RLE", "jp2klossless", "jpeg_ls_lossless")),
        ("SC_rgb_jpeg_gdcm", "SC_rgb_rle"),  # lossless
    ],
)
def test_files_that_come_with_pydicom(name: str, other: str) -> None:
    from pydicom.data import get_testdata_file

    paths = [get_testdata_file(f"{each}.dcm", download=False) for each in (name, other)]
    if None in paths:
        pytest.skip("this pydicom came without them")
    found, expected = (np.asarray(read_dicom(Path(path), None)) for path in paths)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 1


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_is_what_pillow_makes_of_it(tmp_path: Path, mode: str) -> None:
    pictures = [make_frame(48, 40, seed).convert(mode) for seed in range(3)]
    codes = [jpeg(picture) for picture in pictures]
    kind = {"PhotometricInterpretation": "MONOCHROME2" if mode == "L" else "YBR_FULL_422"}
    path = make_dicom(tmp_path / "a.dcm", np.stack([np.asarray(picture) for picture in pictures]), JPEG, PixelData=codes, **kind)
    for number in (2, 0, 1):
        expected = np.asarray(Image.open(io.BytesIO(codes[number])).convert("RGB")).astype(int)
        np.testing.assert_allclose(np.asarray(read_dicom(path, number)), expected, atol=1 if mode == "L" else 6)  # decoders round


def test_what_devices_pad_a_codestream_with_does_not_matter(tmp_path: Path) -> None:
    picture = make_frame(48, 40).convert("L")
    plain, padded = (
        make_dicom(tmp_path / f"{len(padding)}.dcm", np.asarray(picture)[None], JPEG, PixelData=[jpeg(picture) + padding])
        for padding in (b"", bytes.fromhex("00d30c99fa28a28a"))
    )
    np.testing.assert_array_equal(gray(padded), gray(plain))


def test_a_frame_in_several_fragments(tmp_path: Path) -> None:
    picture = make_frame(48, 40).convert("L")
    whole = make_dicom(tmp_path / "a.dcm", np.asarray(picture)[None], JPEG, PixelData=[jpeg(picture)])
    parts = pydicom.encaps.encapsulate([jpeg(picture)], fragments_per_frame=3)
    split = make_dicom(tmp_path / "b.dcm", np.asarray(picture)[None], JPEG, PixelData=parts)
    np.testing.assert_array_equal(gray(split), gray(whole))


def test_a_file_that_was_changed_is_read_anew(tmp_path: Path) -> None:
    path = make_dicom(tmp_path / "a.dcm", GRAY)
    np.testing.assert_array_equal(gray(path), GRAY)
    make_dicom(path, 255 - GRAY)
    os.utime(path, ns=(0, 1))
    np.testing.assert_array_equal(gray(path), 255 - GRAY)


def test_a_damaged_frame_does_not_keep_the_others_from_being_read(tmp_path: Path) -> None:
    pictures = [make_frame(48, 40, seed).convert("L") for seed in range(3)]
    codes = [jpeg(picture) for picture in pictures]
    codes[1] = codes[1][: len(codes[1]) // 2]
    path = make_dicom(tmp_path / "a.dcm", np.stack([np.asarray(picture) for picture in pictures]), JPEG, PixelData=codes)
    for number in (0, 2):
        assert read_dicom(path, number).size == (48, 40)
    with pytest.raises(ImageError, match="cut short: the compressed data of this frame have no end"):
        read_dicom(path, 1)


def _written(content: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return write


def _made(pixels: npt.NDArray[Any] | None, syntax: str = EXPLICIT, **attributes: Any) -> Callable[[Path], Path]:
    return lambda path: make_dicom(path, pixels, syntax, **attributes)


def _cut(size: int, pixels: npt.NDArray[Any], syntax: str = EXPLICIT, **attributes: Any) -> Callable[[Path], Path]:
    return lambda path: cut(make_dicom(path, pixels, syntax, **attributes), size)


def _patched(old: str, new: str, **attributes: Any) -> Callable[[Path], Path]:
    return lambda path: patched(make_dicom(path, GRAY, **attributes), old.encode(), new.encode())


CINE_OF_THREE = np.stack([np.asarray(make_frame(48, 40, seed).convert("L")) for seed in range(3)])
CODES_OF_THREE = [jpeg(Image.fromarray(picture)) for picture in CINE_OF_THREE]
ENCRYPTED = {"EncryptedAttributesSequence": item(EncryptedContentTransferSyntaxUID=EXPLICIT, EncryptedContent=ID.encode())}
NO_PIXELS = "a DICOM file without pixel data"
DAMAGED = r"its pixels cannot be read \(\w+\)"
TOO_MANY = "its header claims more frames than the file can hold"
OTHER_SIZE = "damaged: the compressed data of this frame are of another size than the header says"

BAD: dict[str, tuple[Callable[[Path], Path], int | None, str]] = {
    "empty": (_written(b""), None, "an empty file"),
    "text": (_written(f"{NAME} {ID}\n".encode() * 20), None, "not a DICOM file, or an encrypted one"),
    "encrypted as a whole": (_written(np.random.default_rng(0).bytes(5000)), None, "not a DICOM file, or an encrypted one"),
    "encrypted attributes": (_made(None, **ENCRYPTED), None, "its attributes are encrypted"),
    "magic only": (_cut(132, GRAY), None, NO_PIXELS),
    "cut in the meta": (_cut(180, GRAY), None, "its header cannot be read|without pixel data"),
    "cut in the header": (_cut(520, GRAY), None, "its header cannot be read|without pixel data|cut short"),
    "cut in the pixels": (_cut(-100, GRAY), None, DAMAGED),
    "cut in a cine": (_cut(-100, CINE_OF_THREE), 0, TOO_MANY),
    "cut in a JPEG": (_cut(-100, CINE_OF_THREE, JPEG, PixelData=CODES_OF_THREE), 0, "cut short: its pixel data end before they should"),
    "cut in RLE": (_cut(-100, CINE_OF_THREE, RLE), 0, "cut short: its pixel data end before they should"),
    "report": (_made(None, SOPClassUID=REPORT), None, NO_PIXELS),
    "no size": (_made(GRAY, Rows=0), None, "its header has no Rows"),
    "no interpretation": (_made(GRAY, PhotometricInterpretation=None), None, "its header has no PhotometricInterpretation"),
    "unknown syntax": (
        _patched(f"{EXPLICIT}\0", f"1.2.{ID}.12345"),
        None,
        "compressed as something unknown, which no installed decoder reads",
    ),
    "syntax without a decoder": (_made(GRAY, pydicom.uid.MPEG2MPML, PixelData=[b"\0\1"]), None, "compressed as MPEG2 Main Profile"),
    "frame beyond the end": (_made(CINE_OF_THREE), 3, "it has 3 frames and no frame 3"),
    "frame of a picture": (_made(GRAY), 1, "it has 1 frames and no frame 1"),
    "frames too many": (_made(GRAY, NumberOfFrames=10**6), None, TOO_MANY),
    "one frame too many": (_made(CINE_OF_THREE, NumberOfFrames=4), 3, TOO_MANY),
    "one JPEG too many": (_made(CINE_OF_THREE, JPEG, NumberOfFrames=4, PixelData=CODES_OF_THREE), 3, TOO_MANY),
    "too wide": (_made(GRAY, Columns=MAX_SIDE + 1), None, f"{MAX_SIDE + 1}x16 pixels are too many; sides up to {MAX_SIDE} are read"),
    "JPEG of another size": (_made(CINE_OF_THREE, JPEG, Rows=20, PixelData=CODES_OF_THREE), 1, OTHER_SIZE),
    "JPEG of nothing": (_made(GRAY, JPEG, PixelData=[b"\xff\xd8" + bytes(50) + b"\xff\xd9"]), None, DAMAGED),
    "high bits": (_made(TWELVE, BitsStored=12, HighBit=15), None, "not in the lowest bits of its words"),
    "bits stored beyond allocated": (_made(GRAY, BitsStored=12), None, DAMAGED),
    "no window": (_made(GRAY, WindowCenter=0, WindowWidth=0), None, DAMAGED),
    "flat": (_made(GRAY, RescaleSlope=0, RescaleIntercept=0), None, DAMAGED),
    "name for frames": (_patched("11223344", "Quokka  ", NumberOfFrames=11223344), None, "its number of frames is not a number"),
    "name for a width": (_patched("11223344", "Quokka  ", WindowWidth="11223344", WindowCenter=1), None, DAMAGED),
    "name for a function": (_made(GRAY, WindowCenter=1, WindowWidth=9, VOILUTFunction="QUOKKA"), None, DAMAGED),
    "name for an interpretation": (_made(GRAY, PhotometricInterpretation="QUOKKA"), None, DAMAGED),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_one_line_that_quotes_nothing(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, number, message = BAD[kind]
    path = make(tmp_path / f"{NAME}.dcm")
    with pytest.raises(ImageError, match=message) as caught:
        read_dicom(path, number)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 160
    assert not [word for word in ("quokka", ID, str(tmp_path)) if word in text.lower()]
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert capfd.readouterr() == ("", "")


def test_jpeg_2000_of_another_size(tmp_path: Path) -> None:
    if not pydicom.pixels.get_encoder(JPEG_2000).is_available:
        pytest.skip("no encoder of JPEG 2000 is installed")
    whole = pydicom.dcmread(make_dicom(tmp_path / "a.dcm", CINE_OF_THREE, JPEG_2000))
    whole.Rows, whole.Columns = 20, 60
    whole.save_as(tmp_path / "b.dcm")
    with pytest.raises(ImageError, match=OTHER_SIZE):
        read_dicom(tmp_path / "b.dcm", 0)


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^no such file$"):
        read_dicom(tmp_path / "none.dcm", None)
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "zero.dcm").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "pipe.dcm", tmp_path / "zero.dcm"):
        for read in (lambda path=path: read_dicom(path, None), lambda path=path: frame_count(path)):
            with pytest.raises(ImageError, match=r"^not a regular file$"):
                read()


@pytest.mark.parametrize("syntax", [EXPLICIT, RLE, JPEG, JPEG_2000], ids=lambda syntax: syntax.name)
def test_damage_anywhere_is_an_image_error_or_an_image(tmp_path: Path, syntax: Any) -> None:
    if syntax == JPEG_2000 and not pydicom.pixels.get_encoder(JPEG_2000).is_available:
        pytest.skip("no encoder of JPEG 2000 is installed")
    codes = {"PixelData": CODES_OF_THREE} if syntax == JPEG else {}
    content, rng = make_dicom(tmp_path / "a.dcm", CINE_OF_THREE, syntax, **codes).read_bytes(), np.random.default_rng(0)
    for round_ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(132, len(content), 6):
            damaged[place] = rng.integers(256)
        path = tmp_path / f"{round_}.dcm"
        path.write_bytes(damaged)
        with contextlib.suppress(ImageError):
            assert (frame_count(path) or 1) < len(content)
        with contextlib.suppress(ImageError):
            assert read_dicom(path, 0).mode == "RGB"


def test_without_pydicom_the_mend_is_named(standin: Bundle, tmp_path: Path) -> None:
    make_dicom(tmp_path / "a.dcm", GRAY)
    command = ["infer", str(tmp_path / "a.dcm"), "--bundle", str(standin.folder), "-o", str(tmp_path / "out"), "-q"]
    code = f"import sys; sys.modules['pydicom'] = None; from vessel_rt.cli import main; sys.exit(main({command!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vessel-rt: error: DICOM files need pydicom: pip install 'vessel-rt[dicom]'\n"


def test_a_frame_is_named_by_its_file_and_number(tmp_path: Path) -> None:
    make_dicom(tmp_path / "study-1.dcm", np.stack([GRAY] * 40))
    make_dicom(tmp_path / "study-2", GRAY)
    shutil.copy(tmp_path / "study-2", tmp_path / "DICOMDIR")
    frames = find_frames([str(tmp_path)], Naming(CODES), Selection(frames=parse_frames("10:60:20")))[0]
    assert [(frame.name, frame.number) for frame in frames] == [
        ("study-1_frame_000010", 10),
        ("study-1_frame_000030", 30),
        ("study-2", None),
    ]


@pytest.mark.parametrize(
    ("attributes", "times"),
    [
        ({"FrameTime": 66.7}, [0, 66.7, 133.4]),
        ({"FrameTimeVector": [0, 30, 40], "FrameTime": 66.7}, [0, 30, 70]),
        ({"FrameTimeVector": [0, 30], "FrameTime": 50}, [0, 50, 100]),  # one of the frames is missing
        ({"CineRate": 20, "FrameTime": 0}, [0, 50, 100]),
        ({"RecommendedDisplayFrameRate": 10}, [0, 100, 200]),
        ({"CineRate": 0}, None),
        ({"FrameTime": -5}, None),
        ({}, None),
    ],
)
def test_the_times_of_frames(tmp_path: Path, attributes: dict[str, Any], times: list[float] | None) -> None:
    assert frame_times(make_dicom(tmp_path / "a.dcm", np.stack([GRAY] * 3), **attributes)) == times
    assert frame_times(make_dicom(tmp_path / "b.dcm", GRAY, **attributes)) is None


real = pytest.mark.skipif(not CINE.exists(), reason="the cine is not here")


@real
def test_a_cine_of_a_catheter_laboratory(tmp_path: Path) -> None:
    assert frame_count(CINE) == 96
    for number in (0, 95):
        np.testing.assert_array_equal(gray(CINE, number), pydicom.pixels.pixel_array(CINE, index=number))
        assert read_dicom(CINE, number).size == (512, 512)
    with pytest.raises(ImageError, match="it has 96 frames and no frame 96"):
        read_dicom(CINE, 96)


@real
def test_some_frames_of_a_cine_of_a_catheter_laboratory(standin: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["infer", str(CINE), "--frames", "10:60:5", "--bundle", str(standin.folder), "-o", str(out), "--device", "cpu", "-q"]
    assert main(command) == 0
    names = [f"coronary_cine_frame_{number:06}" for number in range(10, 60, 5)]
    assert sorted(path.name for path in (out / "masks").iterdir()) == [f"{name}.png" for name in names]
    with Image.open(out / "cines" / "coronary_cine.tif") as cine:
        assert (cine.n_frames, cine.mode, cine.size) == (10, "L", (512, 512))
        for page, name in enumerate(names):
            cine.seek(page)
            np.testing.assert_array_equal(np.asarray(cine), np.asarray(Image.open(out / "masks" / f"{name}.png")))

"""The reader of annotations: whatever a file has, a list of items with faults, or one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vessel_rt.errors import VesselError
from vessel_rt.evaluation.annotations import rasterized, read_annotations

SQUARE = [0, 0, 10, 0, 10, 10, 0, 10]
ITEM = {"image": "a.png", "mask": [[SQUARE]], "text": ["vessel"]}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def faults(path: Path, item: Any) -> list[str]:
    [found] = read_annotations(written(path, f"[{item}]" if isinstance(item, str) else [item]))
    return [fault.kind for fault in found.faults]


def test_a_sound_item_is_read_as_it_stands(tmp_path: Path) -> None:
    [item] = read_annotations(written(tmp_path / "a.json", [ITEM]))
    assert (item.number, item.image, item.faults, item.content) == (0, "a.png", (), ITEM)
    [drawn] = item.objects
    assert (drawn.number, drawn.text, drawn.polygons) == (0, "vessel", (SQUARE,))


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        (None, "form"),
        ([], "form"),
        (ITEM | {"image": ["a.png"]}, "form"),
        (ITEM | {"image": ""}, "form"),
        (ITEM | {"image": "."}, "form"),
        (ITEM | {"image": "/etc/passwd"}, "form"),
        (ITEM | {"image": "sub/../../a.png"}, "form"),
        (ITEM | {"image": "a\0.png"}, "form"),
        (ITEM | {"mask": {"size": [4, 4], "counts": "0"}}, "form"),
        (ITEM | {"text": [["vessel"]]}, "form"),
        (ITEM | {"mask": [{"size": [4, 4], "counts": "0"}]}, "coordinates"),
        (ITEM | {"mask": [SQUARE]}, "coordinates"),
        (ITEM | {"mask": [[[[0, 0], [10, 0], [10, 10]]]]}, "coordinates"),
        (ITEM | {"mask": [[SQUARE[:-1]]]}, "coordinates"),
        (ITEM | {"mask": [[["0", "0", "1", "0", "1", "1"]]]}, "coordinates"),
        (ITEM | {"mask": [[[0, 0, 1e6, 0, 1, 1]]]}, "coordinates"),
        (ITEM | {"mask": [[[-16_000, 0, 16_000, 1] * 10]]}, "coordinates"),
        (ITEM | {"mask": [[[]]]}, "empty polygon"),
        (ITEM | {"mask": [[[0, 0, 9, 9]]]}, "empty polygon"),
        (ITEM | {"mask": [[]]}, "empty polygon"),
        (ITEM | {"mask": []}, "no mask"),
        (ITEM | {"text": ["vessel", "catheter"]}, "more texts than masks"),
        (ITEM | {"text": ["."]}, "empty text"),
        ('{"image": "a.png", "image": "b.png", "mask": [], "text": []}', "form"),
        ('{"image": "a.png", "mask": [[[0, 0, NaN, 0, 9, 9]]], "text": ["vessel"]}', "coordinates"),
        ('{"image": "a.png", "mask": [[[0, 0, 1e999, 0, 9, 9]]], "text": ["vessel"]}', "coordinates"),
        ('{"image": "a.png", "mask": [[[0, 0, 1' + "0" * 4000 + ', 0, 9, 9]]], "text": ["vessel"]}', "coordinates"),
        ('{"image": "a.png", "mask": [' + "[" * 300 + "]" * 300 + '], "text": ["vessel"]}', "coordinates"),
        ('{"image": "a.png", "mask": [], "text": [], "more": ' + "[" * 300 + "]" * 300 + "}", "form"),
    ],
)
def test_wrong_at_every_level(tmp_path: Path, item: Any, kind: str) -> None:
    assert {*faults(tmp_path / "a.json", item)} == {kind}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_fault(tmp_path: Path, encoding: str) -> None:
    text = json.dumps([ITEM | {"image": "caf\u00e9.png"}], ensure_ascii=False)
    (tmp_path / "a.json").write_text(text, encoding=encoding)
    assert read_annotations(tmp_path / "a.json")[0].image == "caf\u00e9.png"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b"{}", "not a list of annotated images, but an object"),
        (b"7", "not a list of annotated images, but a number"),
        (b"null", "not a list of annotated images, but null"),
        (b'[{"image": ', "line 1 column"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "thousands of digits"),
        (json.dumps([ITEM]).encode("utf-16"), "not UTF-8"),
        (json.dumps([ITEM]).encode("utf-32-le"), "cannot be read"),
        (b'["caf\xe9"]', "byte 5 is not UTF-8"),
        (b"\0" * 100, "cannot be read"),
    ],
)
def test_files_that_are_no_annotations_give_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(VesselError, match=says) as caught:
        read_annotations(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="FIFOs and devices of POSIX")
def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "fifo", tmp_path / "folder", Path("/dev/zero"), Path("/dev/stdin")):
        with pytest.raises(VesselError, match=r"cannot be read \(.*not a (regular )?file\)"):
            read_annotations(path)


def test_a_file_of_more_than_a_gibibyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**30 + 1)  # a hole: it takes no space
    with pytest.raises(VesselError, match="larger than 1 GiB"):
        read_annotations(tmp_path / "a.json")


@pytest.mark.parametrize("value", [1e9, -1e7, 10**400, float("nan"), float("inf"), True, "x", None])
def test_what_the_library_would_die_of_is_no_polygon(value: Any) -> None:
    with pytest.raises(ValueError, match="not a polygon"):
        rasterized([[0, 0, value, 0, value, 9]], 64, 96)


@pytest.mark.parametrize("polygon", [[], SQUARE[:4], SQUARE[:7], "polygon"])
def test_what_check_data_refuses_is_not_filled(polygon: Any) -> None:
    with pytest.raises(ValueError, match="not a polygon"):
        rasterized([SQUARE, polygon], 64, 96)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, -1), (10**9, 10**9), (5, 10**5)])
def test_images_of_absurd_size_are_not_filled(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="is not the size of an image"):
        rasterized([SQUARE], height, width)


def test_the_largest_outline_that_is_taken_fits_into_little_memory() -> None:
    """In a process with 1 GiB of memory, where pycocotools would end it otherwise."""
    program = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
from vessel_rt.evaluation.annotations import rasterized
print(rasterized([[-16_000, 0, 16_000, 1] * 3 + [-16_000, 64]], 64, 96).sum())
"""
    pytest.importorskip("resource", reason="limits of POSIX")
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_polygons_are_joined_in_an_image(tmp_path: Path) -> None:
    far = [40, 20, 50, 20, 50, 30, 40, 30]
    mask = rasterized([SQUARE, far], 40, 60)
    assert mask.shape == (40, 60)
    np.testing.assert_array_equal(mask, rasterized([SQUARE], 40, 60) | rasterized([far], 40, 60))
    assert not rasterized([], 40, 60).any()

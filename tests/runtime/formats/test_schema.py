from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import pytest

from vessel_rt.formats.schema import FileName, Within, decode, parse_json, read_small

ONE_LINE = r"\A.+\Z"


@dataclasses.dataclass(frozen=True)
class Part:
    file: FileName
    ratio: float


@dataclasses.dataclass(frozen=True)
class Document:
    folder: Path
    count: Annotated[int, Within(1, 9)]
    parts: dict[FileName, Part]
    shape: tuple[int | str, ...]
    iteration: Annotated[int, Within(0, 99)] | None
    flag: bool = False
    triple: tuple[float, float, float] = (0.0, 0.0, 0.0)
    notes: dict[str, str | None] = dataclasses.field(default_factory=dict)


GOOD: dict[str, Any] = {"count": 3, "parts": {"a/b": {"file": "x.bin", "ratio": 1}}, "shape": ["batch", 3], "iteration": None}


def read(document: Any) -> Document:
    found: Document = decode(Document, parse_json(json.dumps(document).encode()), folder=Path("here"))
    return found


def test_what_has_a_default_may_be_absent() -> None:
    assert read(GOOD) == Document(Path("here"), 3, {"a/b": Part("x.bin", 1.0)}, ("batch", 3), None)
    assert isinstance(read(GOOD).parts["a/b"].ratio, float)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": 0}, "count is 0"),
        ({"count": 10}, "count is 10, not from 1 to 9"),
        ({"count": True}, "count"),
        ({"count": 3.0}, "count"),
        ({"count": "3"}, "count"),
        ({"count": 10**4000}, "count"),
        ({"iteration": 100}, "iteration"),
        ({"iteration": "1"}, "iteration"),
        ({"shape": [True]}, "shape[0]"),
        ({"shape": [[1]]}, "shape[0]"),
        ({"shape": "abc"}, "shape"),
        ({"shape": [1] * 5000}, "shape"),
        ({"triple": [1, 2]}, "triple"),
        ({"triple": [1, 2, 10**400]}, "triple[2]"),
        ({"flag": 1}, "flag"),
        ({"parts": []}, "parts"),
        ({"parts": {"a": None}}, "parts.a"),
        ({"parts": {"a": {"file": "x", "ratio": 1, "more": 2}}}, "parts.a.more"),
        ({"parts": {"a": {"file": "x"}}}, "parts.a.ratio"),
        ({"parts": {"../a": {"file": "x", "ratio": 1}}}, "../a"),
        ({"notes": {"a": 1}}, "notes.a"),
        ({"notes": {"a": "\0"}}, "notes.a"),
        ({"notes": {"a": "\ud800"}}, "notes.a"),
        ({"notes": {"a": "x" * 70000}}, "notes.a"),
        ({"notes": {"a\n" * 100: 1}}, "notes."),
        ({"folder": "/tmp"}, "unknown key folder"),
        ({"more\n": 1}, "unknown key"),
    ],
)
def test_what_does_not_fit_is_named_in_one_short_line(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        read(GOOD | change)
    assert named in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="missing key count, shape"):
        read({key: value for key, value in GOOD.items() if key not in ("count", "shape")})


@pytest.mark.parametrize("document", [None, [], 1, "text"])
def test_a_document_that_is_no_table(document: Any) -> None:
    with pytest.raises(ValueError, match="not a table"):
        read(document)


@pytest.mark.parametrize("name", ["", ".", "..", "/a", "a/", "a//b", "a/./b", "a/../../b", "\\a", "C:a", "a\nb", "a\x7f", "~/a/.."])
def test_names_that_may_leave_the_folder(name: str) -> None:
    with pytest.raises(ValueError, match="not a plain path"):
        decode(FileName, name, "file")


@pytest.mark.parametrize("name", ["a", "weights/a.safetensors", ".hidden", "a b", "..a", "é"])
def test_plain_names(name: str) -> None:
    assert decode(FileName, name, "file") == name


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b'{"a": "\xff"}',
        b'{"a": 1, "a": 1}',
        b'{"a": {"b": 1, "c": 2, "b": 3}}',
        b"[NaN]",
        b"[-Infinity]",
        b"[" + b"9" * 5000 + b"]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'["\x00"]',
    ],
)
def test_what_is_not_json(content: bytes) -> None:
    with pytest.raises(ValueError, match=ONE_LINE):
        parse_json(content)


def test_a_number_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(ValueError, match="ratio is inf"):
        decode(Part, parse_json(b'{"file": "x", "ratio": 1e999}'))


def test_a_document_has_a_bound(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="larger than"):
        read_small(tmp_path / "large.json")
    with pytest.raises(OSError, match="a device"):
        read_small(Path(os.devnull))

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import pytest
from msgspec import Meta, Struct

from vessel_rt.formats.schema import FileName, Items, Table, Text, decode, parse_json, read_small, to_json

ONE_LINE = r"\A.+\Z"
SCHEMA = 3


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    file: FileName
    ratio: Annotated[float, Meta(ge=-1e6, le=1e6)]


class Document(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    schema: Annotated[int, Meta(ge=1, le=SCHEMA)] = SCHEMA
    count: Annotated[int, Meta(ge=1, le=9)]
    parts: Table[FileName, Part]
    shape: Items[int | Text]
    iteration: Annotated[int, Meta(ge=0, le=99)] | None
    flag: bool = False
    triple: tuple[float, float, float] = (0.0, 0.0, 0.0)
    notes: Table[Text, Text | None] = msgspec.field(default_factory=dict)


class Line(TypedDict):
    name: str
    status: Literal["ok", "error"]
    area: NotRequired[int]


GOOD: dict[str, Any] = {"count": 3, "parts": {"a/b": {"file": "x.bin", "ratio": 1}}, "shape": ["batch", 3], "iteration": None}


def read(document: Any) -> Document:
    return decode(parse_json(json.dumps(document).encode()), Document, SCHEMA)


def test_what_has_a_default_may_be_absent() -> None:
    assert read(GOOD) == Document(count=3, parts={"a/b": Part("x.bin", 1.0)}, shape=("batch", 3), iteration=None)
    assert isinstance(read(GOOD).parts["a/b"].ratio, float)


def test_what_is_written_is_read() -> None:
    document = read(GOOD | {"notes": {"é": "\u2028"}})
    assert decode(parse_json(to_json(document).encode()), Document, SCHEMA) == document
    assert json.loads(to_json(document))["schema"] == SCHEMA


@pytest.mark.parametrize("more", [{}, {"unknown": 1}, {"count": "of another type"}])
def test_a_newer_schema_is_said_first(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"schema {SCHEMA + 1} is newer than {SCHEMA}.*upgrade"):
        read(GOOD | {"schema": SCHEMA + 1} | more)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": 0}, "schema: "),
        ({"schema": "1"}, "schema: "),
        ({"schema": True}, "schema: "),
        ({"schema": 10**400}, "schema 1"),
        ({"count": 0}, "count: expected int >= 1"),
        ({"count": 10}, "count: expected int <= 9"),
        ({"count": True}, "count: expected int, got bool"),
        ({"count": 3.0}, "count: "),
        ({"count": "3"}, "count: "),
        ({"count": 10**4000}, "count: "),
        ({"iteration": 100}, "iteration: "),
        ({"iteration": "1"}, "iteration: "),
        ({"shape": [True]}, "shape[0]: "),
        ({"shape": [[1]]}, "shape[0]: "),
        ({"shape": "abc"}, "shape: "),
        ({"shape": [1] * 5000}, "shape: "),
        ({"triple": [1, 2]}, "triple: "),
        ({"triple": [1, 2, 10**400]}, "triple[2]: "),
        ({"flag": 1}, "flag: "),
        ({"parts": []}, "parts: "),
        ({"parts": {"a": None}}, "parts.a: "),
        ({"parts": {"a": {"file": "x", "ratio": 1, "more": 2}}}, "unknown key parts.a.more"),
        ({"parts": {"a": {"file": "x"}}}, "missing key parts.a.ratio"),
        ({"parts": {"../a": {"file": "x", "ratio": 1}}}, "the key parts.../a: expected a plain path"),
        ({"notes": {"a": 1}}, "notes.a: "),
        ({"notes": {"a": "\0"}}, "notes.a: expected text without NUL"),
        ({"notes": {"a": "\ud800"}}, "notes.a: "),
        ({"notes": {"a": "x" * 70000}}, "notes.a: "),
        ({"notes": {"b": "", "a\n" * 100: 1}}, "notes.'a"),
        ({"folder": "/tmp"}, "unknown key folder"),
        ({"more\n": 1}, "unknown key"),
        ({"x" * 1000: 1}, "unknown key"),
        ({"": 1}, "unknown key ''"),
        ({"a.b": 1}, "unknown key a.b"),
        ({"[0]": 1}, "unknown key [0]"),
        ({"a` - at `$.b": 1}, "unknown key a` - at `$.b"),
        ({"parts": {"a.b": {"file": "x", "ratio": 1, "c.d": 2}}}, "unknown key parts.a.b.c.d"),
        ({"notes": {"more": json.loads("[" * 900 + "]" * 900)}}, "notes.more: "),
    ],
)
def test_what_does_not_fit_is_named_in_one_short_line(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        read(GOOD | change)
    assert named in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_refused_document_is_left_as_it_is() -> None:
    document = GOOD | {"parts": {name: {"file": name, "ratio": 1 if name < "c" else "x"} for name in "abcd"}}
    before = json.dumps(document)
    with pytest.raises(ValueError, match=r"parts\.c\.ratio: "):
        decode(document, Document, SCHEMA)
    assert json.dumps(document) == before


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="missing key count"):
        read({key: value for key, value in GOOD.items() if key != "count"})


@pytest.mark.parametrize("document", [None, [], 1, "text"])
def test_a_document_that_is_no_table(document: Any) -> None:
    with pytest.raises(ValueError, match="the document: expected object"):
        read(document)


def test_lines_may_have_more_fields() -> None:
    assert decode({"name": "a", "status": "ok", "more": 1}, Line, SCHEMA) == {"name": "a", "status": "ok"}
    assert decode({"name": "a", "status": "ok", "area": 2}, Line, SCHEMA) == {"name": "a", "status": "ok", "area": 2}


@pytest.mark.parametrize("change", [{"status": "Study-17"}, {"name": ["Study-17"]}, {"area": "Study-17"}])
def test_messages_do_not_have_values(change: dict[str, Any]) -> None:
    """Values of an output folder may be patients' names."""
    with pytest.raises(ValueError, match=next(iter(change))) as caught:
        decode({"name": "a", "status": "ok"} | change, Line, SCHEMA)
    assert "Study-17" not in str(caught.value)


@pytest.mark.parametrize("number", ["inf", "nan", "-inf"])
def test_numbers_of_toml_that_are_none(number: str) -> None:
    with pytest.raises(ValueError, match="ratio"):
        decode(tomllib.loads(f'file = "x"\nratio = {number}'), Part, SCHEMA)


@pytest.mark.parametrize("name", ["", ".", "..", "/a", "a/", "a//b", "a/./b", "a/../../b", "\\a", "C:a", "a\nb", "a\x7f", "~/a/.."])
def test_names_that_may_leave_the_folder(name: str) -> None:
    with pytest.raises(ValueError, match="file: expected a plain path"):
        decode({"file": name, "ratio": 1}, Part, SCHEMA)


@pytest.mark.parametrize("name", ["a", "weights/a.safetensors", ".hidden", "a b", "..a", "é"])
def test_plain_names(name: str) -> None:
    assert decode({"file": name, "ratio": 1}, Part, SCHEMA).file == name


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
    with pytest.raises(ValueError, match="ratio"):
        decode(parse_json(b'{"file": "x", "ratio": 1e999}'), Part, SCHEMA)


def test_a_document_has_a_bound(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="larger than"):
        read_small(tmp_path / "large.json")
    with pytest.raises(OSError, match="a device"):
        read_small(Path(os.devnull))

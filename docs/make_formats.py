"""Writes docs/formats.md from the types that declare the files. `make docs` runs it, and a test compares the page with the types."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import inspect as types

from vessel_rt.bench.schema import BenchFile
from vessel_rt.check.schema import CheckFile
from vessel_rt.evaluation.check_data import CheckReport, DroppedItem
from vessel_rt.formats.bundle import BundleFile
from vessel_rt.formats.engine_sidecar import Engine
from vessel_rt.formats.golden import GoldenFile
from vessel_rt.formats.recipe import RecipeFile
from vessel_rt.formats.schema import FileName, Sha256
from vessel_rt.results.schema import EvaluationFile, JournalEntry, Planned, ResultLine, RunFile, TimingLine

PAGE = Path(__file__).with_name("formats.md")
INTRODUCTION = """# File formats

This page is generated from the types in the code by `make docs`; a test compares the two.

Every file has a `schema`, the version of its format. A file with a newer schema is refused: upgrade vessel-rt to read it.
Older files are read.
Unknown keys are errors in `bundle.json`, sidecars and recipes. In the files of an output folder they are ignored,
and so they are in `check.json` and `bench.json`.
"""
FILES: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("bundle.json", (BundleFile,)),
    ("golden.json", (GoldenFile,)),
    ("Recipes: recipes/*.toml", (RecipeFile,)),
    ("Engine sidecars: engines/&lt;builder&gt;-&lt;architecture&gt;/&lt;stage&gt;.json", (Engine,)),
    ("results.jsonl", (ResultLine,)),
    ("timings.jsonl", (TimingLine,)),
    ("journal.jsonl", (Planned, JournalEntry)),
    ("run.json", (RunFile,)),
    ("evaluation.json", (EvaluationFile,)),
    ("check-data", (CheckReport, DroppedItem)),
    ("check.json", (CheckFile,)),
    ("bench.json", (BenchFile,)),
)
FILE_NAME, SHA256 = (types.type_info(kind).pattern for kind in (FileName, Sha256))  # type: ignore[attr-defined]
LARGE = 2**53 - 1  # bounds from here on are those of JSON's numbers, and not shown


def page() -> str:
    """The text of docs/formats.md."""
    shown: set[type] = set()
    parts = [INTRODUCTION]
    for title, kinds in FILES:
        parts.append(f"\n## {title}\n")
        for kind in kinds:
            parts += [part for found in reachable(kind) if found not in shown for part in _section(found)]
            shown |= set(reachable(kind))
    return "".join(parts)


def _section(kind: type) -> Iterator[str]:
    """The part of the page about one type."""
    summary, described = documented(kind)
    yield f"\n### {kind.__name__}\n\n{summary}\n\n| field | type | meaning |\n|---|---|---|\n"
    for field in types.type_info(kind).fields:  # type: ignore[attr-defined]
        optional = "" if field.required else ", optional"
        yield f"| `{field.encode_name}` | {_type(field.type)}{optional} | {described[field.encode_name]} |\n"


def documented(kind: type) -> tuple[str, dict[str, str]]:
    """The docstring of a type: the text before `Attributes:`, and the description of each field, its base classes' included."""
    described: dict[str, str] = {}
    for base in reversed(inspect.getmro(kind)):
        attributes = textwrap.dedent((base.__doc__ or "").partition("Attributes:\n")[2])
        for name, text in re.findall(r"^(\w+): (.+(?:\n[ ]+.+)*)", attributes, re.MULTILINE):
            described[name] = " ".join((text[0].upper() + text[1:]).split())
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("Attributes:")[0].split()), described


def reachable(kind: type) -> list[type]:
    """`kind` and the types of its fields, in the order of their appearance."""
    found = [kind]
    for each in found:
        for field in types.type_info(each).fields:  # type: ignore[attr-defined]
            found += [other for other in _named(field.type) if other not in found]
    return found


def _named(info: types.Type) -> Iterator[type]:
    match info:
        case types.StructType() | types.TypedDictType():
            yield info.cls
        case types.DictType():
            yield from _named(info.value_type)
        case types.ListType() | types.VarTupleType():
            yield from _named(info.item_type)
        case types.UnionType():
            for each in info.types:
                yield from _named(each)


def _type(info: types.Type) -> str:
    """A type in words."""
    match info:
        case types.StructType() | types.TypedDictType():
            return f"[{info.cls.__name__}](#{info.cls.__name__.lower()})"
        case types.DictType():
            return f"table of {_item(info.value_type)}"
        case types.ListType(min_length=length, max_length=most) if length is not None and length == most:
            return f"list of {length}, each {_item(info.item_type)}"
        case types.ListType() | types.VarTupleType():
            return f"list of {_item(info.item_type)}"
        case types.TupleType():
            return f"list of {len(info.item_types)}, each {_item(info.item_types[0])}"
        case types.UnionType():
            return " or ".join(_type(each) for each in info.types)
        case types.LiteralType():
            return " or ".join(f"`{value}`" for value in info.values)
        case types.IntType() | types.FloatType():
            return f"{'integer' if isinstance(info, types.IntType) else 'number'}{_bounds(info)}"
        case types.StrType():
            return _text(info)
    return {types.BoolType: "true or false", types.NoneType: "null", types.AnyType: "any"}[type(info)]


def _item(info: types.Type) -> str:
    """The type of a list's or table's items, in parentheses where it would run into what follows."""
    words = _type(info)
    return f"({words})" if " or " in words or ", " in words else words


def _bounds(info: Any) -> str:
    least, most = (None if bound is None or abs(bound) >= LARGE else bound for bound in (info.ge, info.le))
    if least is None:
        return ""
    return f", at least {_number(least)}" if most is None else f", {_number(least)} to {_number(most)}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _text(info: types.StrType) -> str:
    return {FILE_NAME: "path", SHA256: "SHA-256"}.get(info.pattern, "text")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

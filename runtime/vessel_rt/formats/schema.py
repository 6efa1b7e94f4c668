"""JSON and TOML documents, decoded to the types that declare them. Does not know any particular document.

A type is a `msgspec.Struct` (bundle.json, sidecars, recipes: unknown keys are refused) or a `TypedDict` (files of an output folder:
unknown keys are ignored). Its annotations are the whole schema: types, bounds, and what may be absent.
"""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Never, TypeVar

import msgspec
from msgspec import Meta

from vessel_rt.io.files import read_regular

__all__ = ["FileName", "Items", "NewerSchemaError", "Sha256", "Table", "Text", "decode", "parse_json", "read_small", "shown", "to_json"]

_MOST_BYTES = 4 << 20  # of a document; bundle.json of the 8B model has 40 kB
_MOST_ITEMS = 1 << 12  # of one list or table
_SHOWN = 100  # characters of a text, or digits, that a message has

_TEXT = r"^[^\x00\ud800-\udfff]*\Z"
_PART = r"(?!\.{1,2}(?:/|\Z))[^/\\:*?\"<>|\x00-\x1f\x7f\ud800-\udfff]+"
_PLAIN_PATH = rf"^{_PART}(?:/{_PART})*\Z"
_WORDS = {_TEXT: "text without NUL and lone surrogates", _PLAIN_PATH: "a plain path inside the folder"}

_T = TypeVar("_T")
_Key = TypeVar("_Key")

Text = Annotated[str, Meta(max_length=1 << 16, pattern=_TEXT)]
FileName = Annotated[str, Meta(max_length=1 << 12, pattern=_PLAIN_PATH)]
"""A relative path that stays in its folder, on every system."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Items = Annotated[tuple[_T, ...], Meta(max_length=_MOST_ITEMS)]
Table = Annotated[dict[_Key, _T], Meta(max_length=_MOST_ITEMS)]


class NewerSchemaError(ValueError):
    """A document that a later version of vessel-rt wrote."""


def shown(value: Any) -> str:
    """A value from outside, as a message has it: in one line, and short."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _SHOWN
    return short.repr(value)


def read_small(path: Path) -> bytes:
    """The content of a document's file. OSError if it cannot be read, is not a regular file, or is too large for a document."""
    return read_regular(path, _MOST_BYTES)


def parse_json(content: bytes) -> Any:
    """The JSON document in `content`, in UTF-8. ValueError if it is not JSON; repeated keys and `NaN` are refused too."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{_key(next(key for key in table if keys.count(key) > 1))} is there twice")
    return table


def _no_number(text: str) -> Never:
    raise ValueError(f"{text} is not a number")


def decode(document: Any, kind: type[_T], newest: int) -> _T:
    """`document`, of the types that JSON and TOML have, as `kind`.

    Args:
        document: the parsed document.
        kind: the type that declares it.
        newest: the newest `schema` that this version reads.

    Raises:
        NewerSchemaError: the document is of a newer schema.
        ValueError: a field is missing, unknown, of another type or out of bounds. The message is
            one line that names the field. It does not contain values of the document.
    """
    schema = document.get("schema") if isinstance(document, dict) else None
    if type(schema) is int and schema > newest:
        raise NewerSchemaError(f"schema {shown(schema)} is newer than {newest}, the newest that this vessel-rt reads; upgrade vessel-rt")
    try:
        return msgspec.convert(document, kind)
    except (msgspec.ValidationError, UnicodeEncodeError):
        raise ValueError(_in_words(document, kind)) from None


def _error(document: Any, kind: Any) -> str:
    """What msgspec says of a document that is not of this type, such as "Expected `int`, got `str` - at `$[0].tiles.size`"."""
    try:
        msgspec.convert([document], tuple[kind])  # in a list, so that every message ends with the path
    except msgspec.ValidationError as e:
        return str(e)
    except UnicodeEncodeError:  # by a key, or by a value that has to be one of some texts
        return "Has a lone surrogate - at `$[0]`"
    return ""


def to_json(document: msgspec.Struct) -> str:
    """The text of a JSON file with this document."""
    return json.dumps(msgspec.to_builtins(document), indent=1, ensure_ascii=False) + "\n"


def _in_words(document: Any, kind: Any) -> str:
    """The error of a document, with the field first."""
    error = _error(document, kind)
    what, _, path = error.rpartition(" - at ")  # the last: before it may be a key
    of_key = path.startswith("`key")
    path = path.rpartition("`$[0]")[2].rstrip("`") + ("[...]" if of_key else "")
    where = _place(document, kind, error, path) if issubclass(kind, msgspec.Struct) else path.lstrip(".")
    if found := re.fullmatch(r"Object (missing required|contains unknown) field `(.*)`", what, re.DOTALL):
        return f"{found[1].split()[-1 if 'unknown' in found[1] else 0]} key {f'{where}.' if where else ''}{_key(found[2])}"
    if what.startswith("Invalid enum value"):
        what = "not one of the values that it may have"
    for pattern, words in _WORDS.items():
        what = what.replace(f"`str` matching regex {pattern!r}", words)
    name = f"the key {where}" if of_key else where or "the document"
    return f"{name}: {what[0].lower()}{what[1:].replace('`', '')}"


def _place(document: Any, kind: Any, error: str, path: str) -> str:
    """The place of the error, such as `stages.vision_encoder.file`, for msgspec's path `.stages[...].file`."""
    value, place = document, ""
    for step in re.findall(r"\.\w+|\[[^]]*\]", path):
        if step == "[...]":
            key, value = _faulty_item(document, kind, error, value)
            place = f"{place}.{_key(key)}"
        else:
            place, value = place + step, value[step[1:] if step[0] == "." else int(step[1:-1])]
    return place.lstrip(".")


def _faulty_item(document: Any, kind: Any, error: str, table: dict[str, Any]) -> tuple[str, Any]:
    """The item of this table of the document that has the error: with no other item in the table, the same error remains."""
    items = dict(table)
    try:
        for key, item in items.items():
            table.clear()
            table[key] = item
            if _error(document, kind) == error:
                return key, item
    finally:
        table.clear()
        table.update(items)
    raise AssertionError


def _key(key: str) -> str:
    """A key of a document, as a message has it."""
    return key if 0 < len(key) < _SHOWN and key.isascii() and key.isprintable() else shown(key)

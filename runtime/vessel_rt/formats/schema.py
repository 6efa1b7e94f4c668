"""JSON and TOML documents, decoded to the types that declare them. Does not know any particular document.

A type is a `msgspec.Struct` (bundle.json, sidecars, recipes: unknown keys are refused) or a `TypedDict` (files of an output folder:
unknown keys are ignored). Its annotations are the whole schema: types, bounds, and what may be absent.
"""

from __future__ import annotations

import copy
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
    error = _error(document, kind)
    if error is not None:
        raise ValueError(_in_words(document, kind, error))
    return msgspec.convert(document, kind)


def _error(document: Any, kind: Any) -> str | None:
    """What msgspec says of a document that is not of this type."""
    try:
        msgspec.convert(document, kind)
    except msgspec.ValidationError as e:
        return str(e)
    except UnicodeEncodeError:  # by a value that has to be one of some texts
        return "Has a lone surrogate"
    return None


def to_json(document: msgspec.Struct) -> str:
    """The text of a JSON file with this document."""
    return json.dumps(msgspec.to_builtins(document), indent=1, ensure_ascii=False) + "\n"


def _in_words(document: Any, kind: Any, error: str) -> str:
    """An error of msgspec, such as "Expected `int`, got `str` - at `$.tiles.size`", with the field first."""
    what, _, path = error.partition(" - at ")
    where = _place(document, kind, error) if issubclass(kind, msgspec.Struct) else path.rpartition("`$")[2].rstrip("`").lstrip(".")
    if found := re.fullmatch(r"Object (missing required|contains unknown) field `(.*)`", what, re.DOTALL):
        return f"{found[1].split()[-1 if 'unknown' in found[1] else 0]} key {f'{where}.' if where else ''}{_key(found[2])}"
    if what.startswith("Invalid enum value"):
        what = "not one of the values that it may have"
    for pattern, words in _WORDS.items():
        what = what.replace(f"`str` matching regex {pattern!r}", words)
    name = f"the key {where}" if "`key` in" in path else where or "the document"
    return f"{name}: {what[0].lower()}{what[1:].replace('`', '')}"


def _place(document: Any, kind: Any, error: str) -> str:
    """Where the error is, such as `stages.vision_encoder.file`. msgspec writes `$.stages[...].file`."""
    document = copy.deepcopy(document)
    value, place, path = document, "", error.rpartition("`$")[2]
    for step in re.findall(r"\.\w+|\[[^]]*\]", path + ("[...]" if "`key` in" in error else "")):
        if step == "[...]":
            for key, item in dict(value).items():  # with no other key in the table, the same error remains
                value.clear()
                value[key] = item
                if _error(document, kind) == error:
                    break
            place, value = f"{place}.{_key(key)}", item
        else:
            place, value = place + step, value[step[1:] if step[0] == "." else int(step[1:-1])]
    return place.lstrip(".")


def _key(key: str) -> str:
    """A key of a document, as a message has it."""
    return key if len(key) < _SHOWN and key.isascii() and key.isprintable() else shown(key)

"""Documents from outside, JSON or TOML, as frozen dataclasses: one reader and one decoder for bundle, sidecar and recipe.

A field's annotation is its whole schema: its type, whether it may be absent (a default) and its bounds (`Annotated[int, Within(1, 9)]`).
Knows no particular document.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import reprlib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Never

from vessel_rt.io.files import read_regular

__all__ = ["FileName", "Within", "decode", "parse_json", "read_small", "shown"]

_MOST_BYTES = 4 << 20  # of a document; bundle.json of the 8B model has 40 kB
_MOST_TEXT = 1 << 16  # characters of one text
_MOST_ITEMS = 1 << 12  # of one list or table

_SHOWN = 100  # characters of a text, or digits, that a message has

_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}


@dataclasses.dataclass(frozen=True)
class Within:
    """Annotates a number: from `least` to `most`, both included."""

    least: float
    most: float

    def fault(self, value: float) -> str | None:
        """What is wrong with `value`, or None."""
        return None if self.least <= value <= self.most else f"not from {self.least} to {self.most}"


class _PlainPath:
    """Annotates a text: a relative path that stays in its folder on every system."""

    def fault(self, value: str) -> str | None:
        """What is wrong with `value`, or None."""
        plain = not re.search(r'[\\:*?"<>|\x00-\x1f\x7f]', value) and not {"", ".", ".."} & set(value.split("/"))
        return None if plain else "not a plain path inside the folder"


FileName = Annotated[str, _PlainPath()]


def shown(value: Any) -> str:
    """A value from outside, as a message has it: in one line, and short."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _SHOWN
    return short.repr(value)


def read_small(path: Path) -> bytes:
    """The content of a document's file. OSError where it cannot be read, is not a regular file, or is too large for a document."""
    return read_regular(path, _MOST_BYTES)


def parse_json(content: bytes) -> Any:
    """The JSON document in `content`, in UTF-8. ValueError where it is none: a key twice and `NaN` are none either."""
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


def decode(kind: Any, value: Any, where: str = "", **known: Any) -> Any:
    """`value`, a document or a part of it, as the annotated type `kind`.

    Args:
        kind: a dataclass, or another annotation of one of its fields.
        value: of the types that JSON and TOML have.
        where: what `value` is called in messages.
        known: fields of the dataclass `kind` that are not of the document.

    Raises:
        ValueError: a field is missing or unknown, of another type, or out of bounds. It is named, in one line.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where, known)
    if origin is Annotated:
        found = decode(arguments[0], value, where)
        for rule in arguments[1:]:
            if fault := rule.fault(found):
                raise ValueError(f"{where} is {shown(found)}, {fault}")
        return found
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, value, where)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is dict:
        return _decode_dict(arguments, value, where)
    return _decode_scalar(kind, value, where)


def _decode_dataclass(kind: Any, value: Any, where: str, known: dict[str, Any]) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the document'} is {shown(value)}, not a table")
    prefix = f"{where}." if where else ""
    hints = {name: hint for name, hint in typing.get_type_hints(kind, include_extras=True).items() if name not in known}
    optional = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }
    missing, unknown = hints.keys() - value.keys() - optional, value.keys() - hints.keys()
    for what, keys in (("unknown", unknown), ("missing", missing)):
        if keys:
            raise ValueError(f"{what} key {', '.join(sorted(prefix + _key(key) for key in list(keys)[:8]))}")
    return kind(**known, **{name: decode(hints[name], item, prefix + name) for name, item in value.items()})


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """By the type of `value`: of the kinds of one union no two take the same."""
    plain = {kind: typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind for kind in kinds}
    for kind, bare in plain.items():
        if type(value) is bare or (dataclasses.is_dataclass(bare) and isinstance(value, dict)):
            return decode(kind, value, where)
    if len(kinds) == 2 and types.NoneType in kinds:
        return decode(next(kind for kind in kinds if kind is not types.NoneType), value, where)
    raise ValueError(f"{where} is {shown(value)}, not {' or '.join(_KINDS.get(bare, 'a table') for bare in plain.values())}")


def _decode_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    many = kinds[-1] is Ellipsis
    if not isinstance(value, list) or len(value) > _MOST_ITEMS or not (many or len(value) == len(kinds)):
        raise ValueError(f"{where} is {shown(value)}, not a list of {'at most ' + str(_MOST_ITEMS) if many else len(kinds)}")
    return tuple(decode(kinds[0] if many else kinds[i], item, f"{where}[{i}]") for i, item in enumerate(value))


def _decode_dict(kinds: tuple[Any, ...], value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict) or len(value) > _MOST_ITEMS:
        raise ValueError(f"{where} is {shown(value)}, not a table of at most {_MOST_ITEMS} keys")
    return {decode(kinds[0], key, f"a key of {where}"): decode(kinds[1], item, f"{where}.{_key(key)}") for key, item in value.items()}


def _decode_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {shown(value)}, not {_KINDS[kind]}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, not a finite number")
    if kind is str:
        _check_text(value, where)
    return value


def _check_text(value: str, where: str) -> None:
    if len(value) > _MOST_TEXT:
        raise ValueError(f"{where} has {len(value)} characters, more than {_MOST_TEXT}")
    if re.search(r"[\x00\ud800-\udfff]", value):
        raise ValueError(f"{where} is {shown(value)}, which holds a character that is none")


def _key(key: str) -> str:
    """A key of a document, as a message has it."""
    return key if len(key) < _SHOWN and key.isascii() and key.isprintable() else shown(key)

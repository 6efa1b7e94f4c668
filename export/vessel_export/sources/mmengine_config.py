"""mmengine's training configuration, stored in a checkpoint as Python source. It is read as data and never run."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

__all__ = ["UNKNOWN", "find", "find_all", "read_config"]

UNKNOWN = "unknown"  # stands for values that are missing or computed by code

_LONGEST_TEXT = 1 << 20  # characters; Sa2VA's configuration has about 20,000
_DEEPEST = 50  # nested lists and dictionaries
_LARGEST = 1 << 20  # values and characters in total, with names replaced by their values


class _TooLarge(ValueError):
    pass


def read_config(text: str) -> dict[str, Any]:
    """The assignments in `text`: literals, lists, tuples, dictionaries, `dict(...)`, and names assigned before. Anything else is UNKNOWN.

    Text that is not Python, or that is larger than a configuration can be, gives an empty dictionary.
    """
    if len(text) > _LONGEST_TEXT:
        return {}
    reader = _Reader()
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in the text
            body = ast.parse(text).body
        for statement in body:
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
                reader.names[statement.targets[0].id] = reader.value(statement.value, 0)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return reader.names


class _Reader:
    """Turns expressions into plain values, each a separate copy, up to a limit on their total size."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self._size = 0

    def value(self, node: ast.expr, depth: int) -> Any:
        self._spend(1, depth)
        match node:
            case ast.Constant():
                return self._copy(node.value, depth)
            case ast.List() | ast.Tuple() | ast.Set():
                return [self.value(element, depth + 1) for element in node.elts]
            case ast.Dict():
                pairs = zip(node.keys, node.values, strict=True)
                return {key.value: self.value(value, depth + 1) for key, value in pairs if _is_text(key)}
            case ast.Call(func=ast.Name(id="dict"), args=[]):
                return {keyword.arg: self.value(keyword.value, depth + 1) for keyword in node.keywords if keyword.arg}
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return self._copy(-number, depth)
            case ast.Name():
                return self._copy(self.names.get(node.id, UNKNOWN), depth)
        return UNKNOWN

    def _copy(self, value: Any, depth: int) -> Any:
        self._spend(1, depth)
        match value:
            case list():
                return [self._copy(element, depth + 1) for element in value]
            case dict():
                return {key: self._copy(element, depth + 1) for key, element in value.items()}
            case str() if value.isprintable():
                self._spend(len(value), depth)
                return value
            case None | float():
                return value
            case int() if abs(value) < 1 << 63:
                return value
        return UNKNOWN

    def _spend(self, size: int, depth: int) -> None:
        self._size += size
        if self._size > _LARGEST or depth > _DEEPEST:
            raise _TooLarge


def _is_text(node: ast.expr | None) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isprintable()


def find(config: Mapping[str, Any], key: str) -> Any:
    """The first value of `key` at any depth; UNKNOWN if there is none."""
    return next(_found(config, key), UNKNOWN)


def find_all(config: Mapping[str, Any], key: str) -> list[Any]:
    """All values of `key` at any depth."""
    return list(_found(config, key))


def _found(value: Any, key: str) -> Iterator[Any]:
    if isinstance(value, Mapping):
        if key in value:
            yield value[key]
        for inner in value.values():
            yield from _found(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _found(inner, key)

"""mmengine's training configuration, which a checkpoint holds as Python text: read as data, never run."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["UNKNOWN", "find", "read_config"]

UNKNOWN = "unknown"  # in place of what the text does not tell, or tells by code


def read_config(text: str) -> dict[str, Any]:
    """The assignments of `text`: literals, lists, tuples, dictionaries and `dict(...)`, and names assigned before; all else is UNKNOWN.

    Text that is not Python gives an empty dictionary.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    names: dict[str, Any] = {}
    for statement in body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
            names[statement.targets[0].id] = _value(statement.value, names)
    return names


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple() | ast.Set():
            return [_value(element, names) for element in node.elts]
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return {key.value: _value(value, names) for key, value in pairs if isinstance(key, ast.Constant)}
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return {keyword.arg: _value(keyword.value, names) for keyword in node.keywords if keyword.arg}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Name():
            return names.get(node.id, UNKNOWN)
    return UNKNOWN


def find(config: Mapping[str, Any], key: str) -> Any:
    """The first value under `key`, at whatever depth; UNKNOWN if there is none."""
    return next(_found(config, key), UNKNOWN)


def _found(value: Any, key: str) -> Iterator[Any]:
    if isinstance(value, Mapping):
        if key in value:
            yield value[key]
        for inner in value.values():
            yield from _found(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _found(inner, key)

"""What may happen to a JSON document: its values, its form, its bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from tests.fuzz.damage import damaged

__all__ = ["damaged_json", "damaged_lines", "damaged_text"]

# Values that programs tend not to expect.
_ODD: tuple[Callable[[Any], Any], ...] = (
    lambda value: None,
    lambda value: [],
    lambda value: {},
    lambda value: "",
    lambda value: True,
    lambda value: -1,
    lambda value: 0,
    lambda value: 2**63,
    lambda value: 10**400,
    lambda value: float("nan"),
    lambda value: float("inf"),
    lambda value: 1e-320,
    lambda value: "../../etc/passwd",
    lambda value: "a\0b",
    lambda value: "\ud800",
    lambda value: [value],
    lambda value: {"": value},
    lambda value: [value] * 50,
    lambda value: str(value),
    lambda value: "x" * 5000,
)


def damaged_json(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one to three of its parts replaced, removed, repeated or renamed."""
    document = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        document = _with_one_change(rng, document)
    return document


def damaged_text(rng: random.Random, value: Any) -> bytes:
    """A JSON document of `value`, damaged in its structure, its bytes, or both."""
    text = json.dumps(damaged_json(rng, value) if rng.random() < 0.7 else value)
    kind = rng.randrange(12)
    if kind == 0:
        depth = rng.choice((100, 5000, 200_000))
        text = "[" * depth + text + "]" * depth
    elif kind == 1:
        text = text.replace("1", "1" * 5000, 1)
    elif kind == 2:
        text = text.replace(":", ":" + text + ",", 1)
    encoded = text.encode("utf-8", "surrogatepass")
    if kind == 3:
        encoded = b"\xef\xbb\xbf" + encoded
    elif kind == 4:
        encoded = text.encode("utf-16", "surrogatepass")
    return damaged(rng, encoded) if rng.random() < 0.3 else encoded


def damaged_lines(rng: random.Random, content: bytes) -> bytes:
    """JSON Lines of which one is damaged, as a value or as bytes, or is missing, or is there twice."""
    lines = content.splitlines(keepends=True)
    if not lines or rng.random() < 0.2:
        return damaged(rng, content)
    place = rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        del lines[place]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines) + 1), lines[place])
    else:
        lines[place] = damaged_text(rng, json.loads(lines[place])).replace(b"\n", b" ") + b"\n"
    return b"".join(lines)


def _with_one_change(rng: random.Random, document: Any) -> Any:
    places = list(_places(document))
    if not places:
        return rng.choice(_ODD)(document)
    parent, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(("x", key.upper(), key + " "))] = parent.pop(key)
    elif kind == 2:
        other, name = rng.choice(places)
        parent[key] = json.loads(json.dumps(other[name]))
    else:
        parent[key] = rng.choice(_ODD)(parent[key])
    return document


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every part of a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        found += [(each, key) for key in keys]
        waiting += [each[key] for key in keys]
    return found

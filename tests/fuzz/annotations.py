"""Mutated annotations: what a file in Sa2VA's fine-tuning format may look like by accident or by intent."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

__all__ = ["IMAGES", "SIZE", "mutate"]

IMAGES = ("a.png", "b.png", "sub/c.png")  # what the seed names, all of SIZE
SIZE = (96, 64)  # width, height

_SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
_SEED: list[dict[str, Any]] = [
    {"image": "a.png", "mask": [[_SQUARE], [[50.5, 10.25, 70, 10, 70, 30]]], "text": ["Vessel.", "catheter"]},
    {"image": "b.png", "mask": [[_SQUARE, [40, 40, 60, 40, 50, 60]]], "text": ["vessel"]},
    {"image": "sub/c.png", "mask": [[_SQUARE]], "text": ["vessel"], "source": {"reader": 1, "note": None}},
]

_NUMBERS = (0, -1, -0.0, 1e5, 1e6, 1e9, 1e308, 1e999, -1e999, float("nan"), 2**31, 2**63, 2**64, 10**400, 5e-324)
_STRINGS = (
    "",
    ".",
    "..",
    "/",
    "../a.png",
    "/etc/passwd",
    "a\0.png",
    "w" * 300,
    "a\ud800.png",
    "\x1b[2J",
    "caf\u00e9",
    "A.png",
    "sub",
    "x\ny",
)
_TOKENS = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"NaN", b"-", b",", b"]", b"\\u0000")
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [[[]]], {"": 0}, [0] * 6, "0 0 9 9")


def mutate(rng: random.Random) -> bytes:
    """One file: the seed with up to four mutations of its structure, then, in a third of all, with some of its bytes."""
    items: Any = copy.deepcopy(_SEED)
    for _ in range(rng.randint(0, 4)):
        items = rng.choice(_OF_STRUCTURE)(rng, items)
    text = _repeat_key(rng, json.dumps(items, ensure_ascii=rng.random() < 0.8, indent=rng.choice((None, 1))))
    content = text.encode(rng.choice(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "utf-32")), "surrogatepass")
    if rng.random() < 0.05:
        content = content.replace(b"10", b"7" * 5000, 1)
    return rng.choice(_OF_BYTES)(rng, content) if rng.random() < 1 / 3 else content


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in `value` with each of its keys."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, list | dict):
            found += [(one, key) for key in (one if isinstance(one, dict) else range(len(one)))]
            left += list(one.values() if isinstance(one, dict) else one)[:50]
    return found


def _anything(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice((*_NUMBERS, *_STRINGS, *_OTHERS)))


def _replace(rng: random.Random, items: Any) -> Any:
    """Another value, of whatever type, somewhere."""
    places = _places(items)
    if not places or rng.random() < 0.02:
        return _anything(rng)
    container, key = rng.choice(places)
    container[key] = _anything(rng)
    return items


def _number(rng: random.Random, items: Any) -> Any:
    """Another number in a polygon: huge, tiny, not finite, or a little outside."""
    places = [(container, key) for container, key in _places(items) if isinstance(container[key], int | float)]
    if places:
        container, key = rng.choice(places)
        container[key] = rng.choice((*_NUMBERS, rng.uniform(-200, 200), rng.randint(-10, 110)))
    return items


def _drop(rng: random.Random, items: Any) -> Any:
    """A key or an entry less: a coordinate (an odd polygon), a text, a mask, an item."""
    places = _places(items)
    if places:
        container, key = rng.choice(places)
        del container[key]
    return items


def _repeat(rng: random.Random, items: Any) -> Any:
    """An entry twice, or many times, up to a file of some 100 kB."""
    places = [(container, key) for container, key in _places(items) if isinstance(container, list)]
    if places:
        container, key = rng.choice(places)
        size = len(json.dumps(container[key]))
        container[key:key] = [copy.deepcopy(container[key])] * rng.choice((1, 1, 1, 2, max(2, 100_000 // size)))
    return items


def _swap(rng: random.Random, items: Any) -> Any:
    """Two values in each other's place: masks among texts, polygons among objects."""
    places = _places(items)
    if len(places) > 1:
        (one, key), (other, other_key) = rng.sample(places, 2)
        if other[other_key] is not one and one[key] is not other:  # neither inside itself
            one[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(one[key])
    return items


def _nest(rng: random.Random, items: Any) -> Any:
    """A value inside lists or objects, a few or many deep (the mutator itself must not run out of stack)."""
    places = _places(items)
    if places:
        container, key = rng.choice(places)
        for _ in range(rng.choice((1, 2, 60, 80))):
            container[key] = [container[key]] if rng.random() < 0.7 else {"mask": container[key]}
    return items


def _zigzag(rng: random.Random, items: Any) -> Any:
    """A polygon whose outline is far longer than the image: the library that fills it allocates by its length."""
    far = rng.choice((100, 16_000, 16_384, 1_000_000))
    polygon = [value for step in range(rng.choice((3, 4, 50, 2000))) for value in (far if step % 2 else -far, step)]
    return [*items, {"image": "a.png", "mask": [[polygon]], "text": ["vessel"]}] if isinstance(items, list) else items


def _rename(rng: random.Random, items: Any) -> Any:
    """Another name of an image."""
    named = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    if named:
        rng.choice(named)["image"] = rng.choice((*IMAGES, *_STRINGS, "other/a.png", "./a.png", "a.jpg"))
    return items


def _repeat_key(rng: random.Random, text: str) -> str:
    """Now and then a key twice in an item, which the json module cannot write."""
    return text.replace('"text":', '"text": ["other"], "text":', 1) if rng.random() < 0.05 else text


def _deep(rng: random.Random, content: bytes) -> bytes:
    """Nested far deeper than the parser's stack allows, closed or not."""
    depth = rng.choice((900, 5000, 200_000))
    return b"[" * depth + content + b"]" * rng.choice((0, depth))


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _insert(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice((*_TOKENS, rng.randbytes(9))) + content[at:]


def _join(rng: random.Random, content: bytes) -> bytes:
    """A piece of the file a second time, at its end."""
    at = rng.randrange(len(content) + 1)
    return content + content[at : at + rng.randrange(200)]


_OF_STRUCTURE: tuple[Callable[[random.Random, Any], Any], ...] = (
    _replace, _number, _number, _drop, _drop, _repeat, _swap, _nest, _zigzag, _rename,
)  # fmt: skip
_OF_BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (_deep, _cut, _flip, _insert, _join)

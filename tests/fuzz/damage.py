"""What may happen to the bytes of any file."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

__all__ = ["damaged", "replaced"]

_EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def damaged(rng: random.Random, content: bytes) -> bytes:
    """`content` after one to three mutations."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = _MUTATIONS[rng.choice([*_MUTATIONS])](rng, content) if content else rng.randbytes(rng.randrange(64))
    return content


def replaced(rng: random.Random, content: bytes, at: int, size: int, order: str = "little") -> bytes:
    """`content` with another number of `size` bytes at `at`: one at the edge of what fits, or any."""
    number = rng.choice((*_EDGES, rng.getrandbits(8 * size))) & (256**size - 1)
    return content[:at] + number.to_bytes(size, "big" if order == "big" else "little") + content[at + size :]


def _span(rng: random.Random, content: bytes) -> tuple[int, int]:
    start = rng.randrange(len(content))
    return start, min(len(content), start + rng.choice((1, 2, 4, 16, 64, 1024)))


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def _splice(rng: random.Random, content: bytes) -> bytes:
    """A piece from elsewhere in the file over another."""
    (start, end), place = _span(rng, content), rng.randrange(len(content))
    return content[:place] + content[start:end] + content[place + end - start :]


def _duplicate(rng: random.Random, content: bytes) -> bytes:
    start, end = _span(rng, content)
    return content[:end] + content[start:end] * rng.choice((1, 2, 100)) + content[end:]


def _zero(rng: random.Random, content: bytes) -> bytes:
    start, end = _span(rng, content)
    return content[:start] + bytes(end - start) + content[end:]


def _remove(rng: random.Random, content: bytes) -> bytes:
    start, end = _span(rng, content)
    return content[:start] + content[end:]


def _noise(rng: random.Random, content: bytes) -> bytes:
    start, end = _span(rng, content)
    return content[:start] + rng.randbytes(end - start) + content[end:]


def _number(rng: random.Random, content: bytes) -> bytes:
    return replaced(rng, content, rng.randrange(len(content)), rng.choice((1, 2, 4, 8)), rng.choice(("little", "big")))


_MUTATIONS: Mapping[str, Callable[[random.Random, bytes], bytes]] = {
    mutation.__name__: mutation for mutation in (_flip, _truncate, _splice, _duplicate, _zero, _remove, _noise, _number)
}

"""Animated WebP: the frames of a cine as a file that browsers play. Frames are encoded one at a time: memory does not grow with the cine.

Pillow would keep all frames until it writes the first. So each frame is encoded by itself, as Pillow's still image, and put into WebP's
container (developers.google.com/speed/webp/docs/riff_container): VP8X, ANIM, then an ANMF for each frame. Does not know what frames show.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from typing import IO

from PIL import Image

__all__ = ["write_animation"]

MOST_FRAMES = 300
_MOST_BYTES = 2_000_000  # about: it is estimated from a few frames
_SETTINGS = ((512, 60), (512, 40), (384, 40), (320, 35), (256, 30))  # longer side in pixels and quality, tried in turn
_SAMPLED = 8  # frames
_ANIMATED, _NO_BLENDING = 0x02, 0x02  # flags of VP8X and ANMF
_HEADER = 12  # bytes of a file before its first chunk


def write_animation(target: IO[bytes], picture: Callable[[int], Image.Image], durations: Sequence[float]) -> None:
    """Write frames as an animation that repeats: of at most 300 frames, 512 pixels on the longer side, and about 2 MB.

    A longer cine is thinned evenly, and plays as long as it did. If the frames take more room, they lose quality, then size.

    Args:
        target: a new file, open for writing and seekable.
        picture: frame `number`, from 0; it may be asked for twice. All get the size of the first.
        durations: how long each frame is shown, in ms; at least one.
    """
    step = -(-len(durations) // MOST_FRAMES)
    numbers = range(0, len(durations), step)
    sampled = numbers[:: max(1, len(numbers) // _SAMPLED)]
    pictures = [picture(number) for number in sampled]
    for side, quality in _SETTINGS:
        scale = min(1.0, side / max(pictures[0].size))
        size = max(1, round(pictures[0].width * scale)), max(1, round(pictures[0].height * scale))
        found = sum(len(_still(each, size, quality)) for each in pictures)
        if found * len(numbers) <= _MOST_BYTES * len(sampled):
            break
    begins = target.tell()
    target.write(struct.pack("<4sI4s", b"RIFF", 0, b"WEBP"))
    target.write(_chunk(b"VP8X", struct.pack("<I", _ANIMATED) + _three(size[0] - 1) + _three(size[1] - 1)))
    target.write(_chunk(b"ANIM", struct.pack("<IH", 0, 0)))
    for number in numbers:
        shown = round(sum(durations[number : number + step]))
        place = _three(0) + _three(0) + _three(size[0] - 1) + _three(size[1] - 1) + _three(min(shown, 2**24 - 1)) + bytes([_NO_BLENDING])
        target.write(_chunk(b"ANMF", place + _still(picture(number), size, quality)))
    length = target.tell() - begins
    target.seek(begins + 4)
    target.write(struct.pack("<I", length - 8))
    target.seek(begins + length)


def _still(picture: Image.Image, size: tuple[int, int], quality: int) -> bytes:
    """The chunk of a still image, without a header."""
    buffer = io.BytesIO()
    picture.convert("RGB").resize(size, Image.Resampling.BOX).save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()[_HEADER:]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI", kind, len(content)) + content + bytes(len(content) % 2)


def _three(value: int) -> bytes:
    return value.to_bytes(3, "little")

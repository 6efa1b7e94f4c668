"""Damaged and lying JPG, PNG, TIFF, BMP and WebP files, made of small ones of every kind that is accepted, and of some that are not."""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, features

from tests.fuzz.damage import damaged, replaced
from tests.support.image_files import png, png_chunk, tiff

__all__ = ["mutate", "seeds"]

_COMPRESSIONS = ("tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "jpeg", "zstd", "lzma", "group3", "group4", "tiff_ccitt")


def mutate(rng: random.Random) -> tuple[str, bytes]:
    """The name of a file, with a suffix that need not be right, and its content."""
    name, content = rng.choice(seeds())
    kinds = {"png": _lying_png, "tif": _lying_tiff, "jpg": _lying_jpeg, "bmp": _lying_bmp, "webp": _lying_webp}
    structural = kinds[name.rpartition(".")[2]]
    how: list[Callable[[random.Random, bytes], bytes]] = [damaged, structural]
    for change in rng.choice((how[:1], how[1:], how[1:], how[::-1])):
        content = change(rng, content)
    return (name if rng.random() < 0.9 else rng.choice(("a.jpg", "a.png", "a.tif", "a.bmp", "a.webp", "a"))), content


@functools.cache
def seeds() -> tuple[tuple[str, bytes], ...]:
    """Whole files by name: no mutation of them may crash, hang, or be read but as an image or an error."""
    values = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    picture = Image.fromarray(values)
    gray, deep = picture.convert("L"), np.asarray(picture.convert("L")).astype(np.uint16) * np.uint16(257)
    found = {f"{mode}.jpg": _saved(picture.convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")}
    found["progressive.jpg"] = _saved(picture, "JPEG", progressive=True)
    found["pictures.jpg"] = _saved(picture, "MPO", save_all=True, append_images=[picture])
    found |= {f"{mode}.png": _saved(picture.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
    found |= {f"gray-{bits}.png": png(np.asarray(gray) >> (8 - bits), bits) for bits in (1, 2, 4)}
    found |= {f"deep-{channels}.png": png(np.repeat(deep[..., None], channels, axis=2)) for channels in (1, 2, 3, 4)}
    found["animated.png"] = _saved(picture, "PNG", save_all=True, append_images=[gray.convert("RGB")])
    found |= {f"{mode}.bmp": _saved(picture.convert(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")}
    found |= {f"{kind}.webp": _saved(picture, "WEBP", lossless=kind == "lossless") for kind in ("lossy", "lossless")}
    found["alpha.webp"] = _saved(picture.convert("RGBA"), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    found["animated.webp"] = _saved(picture, "WEBP", save_all=True, append_images=[gray.convert("RGB")])
    found |= {f"{mode}.tif": _saved(picture.convert(mode), "TIFF") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")}
    for compression in _COMPRESSIONS if features.check("libtiff") else ():
        image = picture.convert("1") if compression.startswith(("group", "tiff_ccitt")) else picture
        found[f"{compression}.tif"] = _saved(image, "TIFF", compression=compression, tiffinfo={278: 8})
        found[f"{compression}-pages.tif"] = _saved(image, "TIFF", compression=compression, save_all=True, append_images=[image] * 3)
    found["pages.tif"] = _saved(gray, "TIFF", save_all=True, append_images=[picture, Image.fromarray(deep)])
    found["big.tif"] = _saved(gray, "TIFF", save_all=True, append_images=[gray], big_tiff=True)
    found["strips.tif"] = _saved(gray, "TIFF", tiffinfo={278: 4})
    found["deep.tif"] = tiff(deep)
    found["signed.tif"] = tiff(deep.astype(np.int32), {339: (3, 2)})
    found["float.tif"] = tiff((deep / 65535).astype(np.float32), {339: (3, 3)})
    found["white.tif"] = tiff(deep, {262: (3, 0)})
    found["colours.tif"] = tiff(np.repeat(deep[..., None], 3, axis=2), {262: (3, 2), 277: (3, 3)})
    return tuple(found.items())


def _saved(image: Image.Image, kind: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def _lying_png(rng: random.Random, content: bytes) -> bytes:
    """A chunk of which something is changed, left out or doubled; the checksums are right."""
    chunks, at = [], 8
    while at + 8 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return content
    place = rng.randrange(len(chunks))
    name, data = chunks[place]
    change = rng.randrange(5)
    if change == 0:
        del chunks[place]
    elif change == 1:
        chunks.insert(rng.randrange(len(chunks)), (name, data))
    elif change == 2:
        chunks.insert(1, (rng.choice((b"acTL", b"fcTL", b"tRNS", b"PLTE", b"iCCP", b"eXIf")), rng.randbytes(rng.choice((0, 8, 26, 768)))))
    elif name == b"IDAT":
        chunks[place] = name, zlib.compress(damaged(rng, zlib.decompress(data)) if change == 3 else bytes(10**6))
    elif data:
        chunks[place] = name, replaced(rng, data, rng.randrange(len(data)), rng.choice((1, 4)), "big")[: len(data)]
    return content[:8] + b"".join(png_chunk(name, data) for name, data in chunks)


def _lying_tiff(rng: random.Random, content: bytes) -> bytes:
    """A field of a directory with another tag, type, count or value; or a list of pages that leads elsewhere."""
    big, order = content[2:3] == b"\x2b", "<"
    if len(content) < 16 or not content.startswith(b"II"):
        return content
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)
    directories = []
    for _ in range(rng.randrange(1, 4)):
        if not 0 < at < len(content) - 16:
            break
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), content, at)
        directories.append((at, count))
        following = at + (8 + 20 * count if big else 2 + 12 * count)
        if following + 8 > len(content):
            break
        (at,) = struct.unpack_from(order + ("Q" if big else "I"), content, following)
    if not directories:
        return content
    begins, count = rng.choice(directories)
    step, head, size = (20, 8, 8) if big else (12, 2, 4)
    change = rng.randrange(6)
    if change == 0:  # the number of fields
        return replaced(rng, content, begins, head)
    if change == 1:  # the next page
        pointer = rng.choice([directory for directory, _ in directories] + [rng.randrange(len(content)), len(content), 2**32 - 1])
        place = begins + head + step * count
        return content[:place] + pointer.to_bytes(size, "little") + content[place + size :]
    field = begins + head + step * rng.randrange(max(count, 1))
    if change == 2:
        return replaced(rng, content, field, 2)  # its tag
    if change == 3:
        return content[: field + 2] + struct.pack("<H", rng.randrange(20)) + content[field + 4 :]  # its type
    return replaced(rng, content, field + (4 if change == 4 else step - size), size)  # its count, or its value


def _lying_jpeg(rng: random.Random, content: bytes) -> bytes:
    """A number in a segment of the header."""
    places, at = [], 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        places.extend(range(at + 2, min(at + 2 + length, len(content) - 4)))
        at += 2 + length
    return replaced(rng, content, rng.choice(places), rng.choice((1, 2)), "big") if places else content


def _lying_bmp(rng: random.Random, content: bytes) -> bytes:
    """A number in the header."""
    return replaced(rng, content, rng.choice((2, 10, 14, 18, 22, 26, 28, 30, 34, 46, 50, rng.randrange(54))), rng.choice((2, 4)))


def _lying_webp(rng: random.Random, content: bytes) -> bytes:
    """A number in the RIFF header, or at the beginning of its first chunk."""
    return replaced(rng, content, rng.choice((4, 16, 20, 21, 23, 24, 26, 27, rng.randrange(12, 40))), rng.choice((1, 2, 4)))

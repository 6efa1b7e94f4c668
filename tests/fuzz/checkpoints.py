"""Mutated checkpoints: a small one in both of torch.save's formats, damaged as files are, or rewritten as an attacker would."""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.synth.file_formats import save_checkpoint
from vessel_export.sources.names import LORA_PREFIX

__all__ = ["FOREIGN", "GLOBAL", "REDUCE", "STOP", "mutate", "proto", "records", "seed", "text", "zipped"]

STOP, REDUCE, MARK, TUPLE, BUILD = b".", b"R", b"(", b"t", b"b"
FOREIGN = (
    "os system", "posix system", "builtins eval", "__builtin__ exec", "builtins getattr", "subprocess Popen", "torch.hub load",
    "torch load", "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch._utils _rebuild_nested_tensor",
    "torch._tensor _rebuild_from_type_v2", "torch._utils _rebuild_meta_tensor_no_storage", "torch.storage _load_from_bytes",
    "numpy dtype", "numpy ndarray", "numpy._core.multiarray _reconstruct", "numpy.core.multiarray scalar", "numpy.dtypes Float64DType",
    "collections OrderedDict", "collections Counter", "torch Size", "torch BFloat16Storage", "torch ComplexDoubleStorage", "torch int64",
)  # fmt: skip


def mutate(rng: random.Random) -> tuple[str, bytes]:
    """One mutated checkpoint: a file name that says what was done, and the bytes."""
    mutation = rng.choice(_MUTATIONS)
    return f"{mutation.__name__.strip('_')}.pth", mutation(rng)


@functools.cache
def seed(legacy: bool = False) -> bytes:
    """The checkpoint that all others are made of: a few tensors, mmengine's records, a parameter, a view."""
    memory = io.BytesIO()
    lora = {f"{LORA_PREFIX}model.layers.0.mlp.up_proj.lora_{part}.weight": torch.arange(16).reshape(2, 8).bfloat16() for part in "AB"}
    wide = torch.arange(24.0).reshape(6, 4)
    state = lora | {
        "mllm.model.mlp1.0.weight": wide[1:4, ::2],
        "text_hidden_fcs.0.bias": torch.nn.Parameter(torch.ones(3)),
        "scalar": wide[0, 0],
    }
    if legacy:
        views = {"mllm.model.mlp1.0.weight": wide[1:4, ::2], "text_hidden_fcs.0.bias": wide[0]}
        document = {"state_dict": views, "meta": {"iter": 7, "cfg": "lora_alpha = 16"}}
        torch.save(document, memory, _use_new_zipfile_serialization=False)
        key = str(wide.untyped_storage()._cdata).encode()  # an address, another in every process
        return memory.getvalue().replace(key, b"7" * len(key))
    save_checkpoint(memory, state, rank=2, alpha=4)
    return memory.getvalue()


@functools.cache
def records() -> dict[str, bytes]:
    """The seed's records, by name."""
    with zipfile.ZipFile(io.BytesIO(seed())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(changed: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of such records, with right checksums."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", compression) as archive:
        for name, data in changed.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return memory.getvalue()


def proto(*parts: bytes) -> bytes:
    """A pickle of protocol 2 of these parts."""
    return b"\x80\x02" + b"".join(parts) + STOP


def text(value: str) -> bytes:
    """The opcode that pushes `value`."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def GLOBAL(name: str) -> bytes:
    """The opcode that pushes what `name`, "module name", is."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _with_pickle(data: bytes) -> bytes:
    pickled = next(name for name in records() if name.endswith("/data.pkl"))
    return zipped(records() | {pickled: data})


def _pickle() -> bytes:
    return next(data for name, data in records().items() if name.endswith("/data.pkl"))


@functools.cache
def _opcodes() -> tuple[tuple[str, Any, bytes], ...]:
    """(name, argument, bytes) of each opcode of the seed's pickle."""
    data = _pickle()
    found = list(pickletools.genops(data))
    ends = [position for _, _, position in found[1:]] + [len(data)]
    return tuple((code.name, argument, data[start:end]) for (code, argument, start), end in zip(found, ends, strict=True))  # type: ignore[misc]


def _joined(opcodes: list[tuple[str, Any, bytes]]) -> bytes:
    return b"".join(data for _, _, data in opcodes)


def _flipped(rng: random.Random, data: bytes, most: int = 8) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _bits_flipped(rng: random.Random) -> bytes:
    return _flipped(rng, seed())


def _cut_short(rng: random.Random) -> bytes:
    whole = seed(legacy=rng.random() < 0.3)
    return whole[: rng.randrange(len(whole))]


def _header_field(rng: random.Random) -> bytes:
    """A field of one of the archive's own structures becomes something else."""
    data = bytearray(seed())
    starts = [i for i in range(len(data) - 4) if data[i : i + 2] == b"PK"]
    start, width = rng.choice(starts), rng.choice((1, 2, 4, 8))
    at = min(start + rng.randrange(60), len(data) - width)
    data[at : at + width] = rng.choice((b"\0" * width, b"\xff" * width, rng.randbytes(width)))
    return bytes(data)


def _records_changed(rng: random.Random) -> bytes:
    """Records swapped, lost, shortened, lengthened, or under another name; the checksums are right."""
    changed = dict(records())
    first, second = rng.sample(sorted(changed), 2)
    match rng.randrange(5):
        case 0:
            changed[first], changed[second] = changed[second], changed[first]
        case 1:
            del changed[first]
        case 2:
            changed[first] = changed[first][: rng.randrange(len(changed[first]) + 1)]
        case 3:
            changed[first] += rng.randbytes(rng.randrange(1, 64))
        case _:
            changed[rng.choice(("../x", "/etc/x", "archive/data/99", first.upper(), "\u00e9"))] = changed.pop(first)
    return zipped(changed)


def _compressed(_: random.Random) -> bytes:
    return zipped(records(), zipfile.ZIP_DEFLATED)


def _pickle_bits_flipped(rng: random.Random) -> bytes:
    return _with_pickle(_flipped(rng, _pickle()))


def _opcodes_changed(rng: random.Random) -> bytes:
    """Opcodes lost, repeated, moved, or replaced by any byte."""
    opcodes = list(_opcodes())
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randrange(len(opcodes)), rng.randrange(len(opcodes))
        match rng.randrange(4):
            case 0:
                del opcodes[at]
            case 1:
                opcodes[at:at] = [opcodes[at]] * rng.choice((1, 2, 1000))
            case 2:
                opcodes[at], opcodes[other] = opcodes[other], opcodes[at]
            case _:
                opcodes[at] = ("", None, rng.randbytes(rng.randint(1, 9)))
    return _with_pickle(_joined(opcodes))


def _numbers_changed(rng: random.Random) -> bytes:
    """Shapes, strides, offsets and storages' sizes become others: negative, huge, slightly off."""
    opcodes = list(_opcodes())
    numbers = [i for i, (name, _, _) in enumerate(opcodes) if name.startswith("BININT")]
    for at in rng.sample(numbers, rng.randint(1, 3)):
        old = int(opcodes[at][1])
        new = rng.choice((old + 1, old - 1, -1, 0, 1 << 31, 1 << 40, (1 << 62) + 1, -(1 << 63), 1 << 2000, old * 1000))
        opcodes[at] = ("", None, pickle.dumps(new, 2)[2:-1])
    return _with_pickle(_joined(opcodes))


def _names_changed(rng: random.Random) -> bytes:
    """Classes, functions and dtypes become others."""
    opcodes = list(_opcodes())
    names = [i for i, (name, _, _) in enumerate(opcodes) if name == "GLOBAL"]
    for at in rng.sample(names, rng.randint(1, 2)):
        opcodes[at] = ("", None, GLOBAL(rng.choice(FOREIGN)))
    return _with_pickle(_joined(opcodes))


def _texts_changed(rng: random.Random) -> bytes:
    """Names of tensors and storages, and the training configuration, become others."""
    opcodes = list(_opcodes())
    texts = [i for i, (name, _, _) in enumerate(opcodes) if name == "BINUNICODE"]
    configuration = max(texts, key=lambda i: len(opcodes[i][1]))
    at = rng.choice((configuration, rng.choice(texts)))
    nested = "lora_alpha = " + "[" * 150 + "]" * 150
    doubling = (
        "a = [1]\n"
        + "".join(f"{b} = [{a}, {a}]\n" for a, b in zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True)) * 3
    )
    values = (
        "",
        "\x1b[2J",
        "\ud800",
        "x" * 100_000,
        "\n",
        "0",
        "lora_alpha = 2 * 64",
        "lora_alpha = 1e999",
        "lora_alpha = -1",
        nested,
        doubling,
    )
    opcodes[at] = ("", None, text(rng.choice(values)))
    return _with_pickle(_joined(opcodes))


def _deep(rng: random.Random) -> bytes:
    """Containers in containers, and ever more of them from few opcodes."""
    depth = rng.choice((10, 1000, 100_000))
    put, get = b"q\x00", b"h\x00"
    body = rng.choice(
        (
            b"]" * depth + b"a" * (depth - 1),
            b")" + b"\x85" * depth,
            b"}" + (text("a") + b"}") * depth + b"s" * depth,
            b")" + put + (get + get + b"\x86" + put) * min(depth, 1000),
            b"}" + b")" + (put + get + b"\x86") * 60 + b"Ns",  # as a dictionary's key: hashed in 2^60 steps
            b"}(" + b"".join(pickle.dumps(i * ((1 << 61) - 1), 2)[2:-1] + b"N" for i in range(min(depth, 20_000))) + b"u",
            b"]r" + struct.pack("<I", rng.choice((1 << 20, (1 << 32) - 1))),
            b"]" + put + get + b"a",  # a list in itself
        )
    )
    return _with_pickle(proto(b"}", text("state_dict"), body, b"s"))


def _dtype_state(rng: random.Random) -> bytes:
    """numpy.dtype with a state of the attacker's, and an array and a scalar of it."""
    numbers = [rng.choice((-1, 0, 1, 3, 1 << 30, -(1 << 31))) for _ in range(4)]
    fields = rng.choice((None, {"a": 1}, ("a", "b"), "x"))
    state = (rng.choice((3, 4, -5)), rng.choice(("<", "|", "")), fields, fields, None, *numbers)
    dtype = GLOBAL("numpy dtype") + pickle.dumps((rng.choice(("f8", "O8", "V16", "x")), False, True), 2)[2:-1] + REDUCE
    dtype += pickle.dumps(state, 2)[2:-1] + BUILD
    array = GLOBAL("numpy._core.multiarray _reconstruct") + b"(" + GLOBAL("numpy ndarray") + b"K\x00\x85" + text("b") + TUPLE + REDUCE
    array += b"(K\x01K\x05\x85" + dtype + b"\x89" + text("x" * rng.choice((0, 8, 40))) + TUPLE + BUILD
    scalar = GLOBAL("numpy._core.multiarray scalar") + dtype + text("12345678") + b"\x86" + REDUCE
    return _with_pickle(proto(b"}", text("state_dict"), b"}", text("a"), rng.choice((array, scalar, dtype)), b"s", b"s"))


def _legacy_bits_flipped(rng: random.Random) -> bytes:
    return _flipped(rng, seed(legacy=True))


_MUTATIONS: tuple[Callable[[random.Random], bytes], ...] = (
    _bits_flipped, _cut_short, _header_field, _records_changed, _compressed, _pickle_bits_flipped, _opcodes_changed, _numbers_changed,
    _names_changed, _texts_changed, _deep, _dtype_state, _legacy_bits_flipped,
)  # fmt: skip

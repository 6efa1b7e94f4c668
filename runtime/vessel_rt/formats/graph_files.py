"""Reads which files an ONNX graph names, without the onnx package. ONNX Runtime opens them when it loads the graph.

Walks protobuf's wire format to every place that can have a tensor or an EPContext node. Does not know anything else about graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vessel_rt.io.files import read_regular

__all__ = ["named_files"]

_MOST_BYTES = 8 << 20  # of a graph without its weights: 16 times the expected size of the 8B model's largest

# The fields of a message that lead to tensors and nodes, by their numbers in onnx.proto.
_CHILDREN = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}

# Messages of a key and a value that can name a file: the fields' numbers, and the keys whose values are file names.
_NAMES = {
    "entry": (1, 2, {b"location"}),  # of a tensor's external data
    "attribute": (1, 4, {b"ep_cache_context", b"onnx_model_filename"}),  # of an EPContext node
}


def named_files(path: Path) -> set[str]:
    """The files that the graph at `path` names, relative to its folder.

    Raises:
        OSError: the file cannot be read, or is too large for a graph.
        ValueError: the file is not a graph.
    """
    return {str(PurePosixPath(name)) for name in _names(memoryview(read_regular(path, _MOST_BYTES)))}


def _names(model: memoryview) -> Iterator[str]:
    waiting = [("model", model)]
    while waiting:
        kind, message = waiting.pop()
        children = _CHILDREN.get(kind, {})
        key_field, value_field, wanted = _NAMES.get(kind, (0, 0, set()))
        keys, values = set(), []
        for number, content in _fields(message):
            if content and number in children:
                waiting.append((children[number], content))
            if number == key_field:
                keys.add(bytes(content[:64]))
            elif number == value_field:
                values.append(content)
        if keys & wanted:
            yield from (str(value, "utf-8") for value in values or [memoryview(b"")])


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The number and the content of each field of variable length. ValueError if parsers could read the bytes differently."""
    at = 0
    while at < len(message):
        tag, at = _number(message, at)
        wire = tag & 7
        if wire == 2:
            length, at = _number(message, at)
            yield tag >> 3, message[at : at + length]
            at += length
        elif wire == 0:
            while at < len(message) and message[at] >= 0x80:
                at += 1
            at += 1
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
    if at != len(message):
        raise ValueError("cut short")


def _number(message: memoryview, at: int) -> tuple[int, int]:
    """The base-128 number of a tag or a length, in its shortest form, and the position after it."""
    value = shift = 0
    for byte in message[at : at + 5]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if value >= 2**31 or (shift > 7 and not byte):
                break
            return value, at + shift // 7
    raise ValueError(f"no number at byte {at}")

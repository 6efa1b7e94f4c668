"""Writing a .safetensors file tensor by tensor, so that only one is ever in memory (the safetensors library wants all at once).

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data without gaps
(https://huggingface.co/docs/safetensors). Alignment for memory mapping comes from the order alone: tensors are sorted by the largest
power of two that divides their size, so each one's offset is a multiple of its own; the header is padded so that the data start on a page.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from vessel_export.errors import CheckpointError

__all__ = ["OutputTensor", "TensorLocation", "write_safetensors"]

_PAGE = 4096
_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}


@dataclasses.dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: `make` computes it (any layout, any dtype that rounds once to `dtype`) when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorLocation:
    """Where a tensor lies: `file` relative to the bundle, `offset` and `length` in bytes from the file's start."""

    file: str
    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_safetensors(
    folder: Path, file: str, tensors: Iterable[OutputTensor], *, progress: Callable[[int], object] = lambda _bytes: None
) -> dict[str, TensorLocation]:
    """Write `tensors` to `folder/file` and say where each lies; `progress` hears of the bytes after each.

    Raises:
        CheckpointError: a value does not fit its dtype (becomes infinite in float16).
        OSError: the disk is full or not writable.
    """
    ordered = sorted(tensors, key=lambda tensor: (-(tensor.bytes & -tensor.bytes), tensor.name))
    header: dict[str, object] = {}
    position = 0
    for tensor in ordered:
        end = position + tensor.bytes
        header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    locations = {}
    with (folder / file).open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            locations[tensor.name] = TensorLocation(file, out.tell(), tensor.bytes, tensor.shape, tensor.dtype)
            out.write(_bytes_of(tensor))
            progress(tensor.bytes)
    return locations


def _bytes_of(tensor: OutputTensor) -> memoryview:
    value = tensor.make()
    if tuple(value.shape) != tensor.shape:
        raise ValueError(f"{tensor.name}: made {tuple(value.shape)}, planned {tensor.shape}")
    value = value.to(tensor.dtype).contiguous()
    if tensor.dtype is torch.float16 and not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{tensor.name} exceeds float16's range (65504); export with --precision fp32")
    return value.reshape(-1).view(torch.uint8).numpy().data

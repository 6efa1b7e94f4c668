"""Writes a .safetensors file piece by piece. No tensor is ever whole in memory, as the safetensors library would need.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data without gaps
(https://huggingface.co/docs/safetensors). Tensors are sorted by the largest power of two that divides their size, so that every tensor is
aligned to that power. The header is padded so that the data start on a page. Together this makes the file fit for memory mapping.

A file that equals an older one, byte for byte, is not written but hard-linked to it. Does not know about bundles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import torch

from vessel_export.errors import CheckpointError
from vessel_export.io.files import drop_from_cache, link_or_copy

__all__ = ["PIECE", "ROWS", "OutputTensor", "TensorLocation", "WrittenFile", "file_size", "in_pieces", "write_safetensors"]

PIECE = 1 << 21  # values computed at a time: small enough for malloc to reuse the same memory
ROWS = 128  # of a large tensor, computed together: whole blocks of a quantized matrix, and of a transposed view 256 bytes of each row

_PAGE = 4096
_IN_FLIGHT = 16  # pieces that are computed and not yet written
_FLUSH = 1 << 26  # bytes after which what was written is dropped from the page cache
_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclasses.dataclass(frozen=True)
class OutputTensor:
    """A tensor to write. `pieces` yields slices of its first axis in order, of any layout and dtype; each is rounded once to `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorLocation:
    """Where a tensor is stored: `file` relative to the bundle, `offset` from the file's start and `length` in bytes."""

    file: str
    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """The result of `write_safetensors`: tensor locations, size, SHA-256, and the number of bytes written (0 if hard-linked)."""

    locations: dict[str, TensorLocation]
    bytes: int
    sha256: str
    bytes_written: int


def in_pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Slices of `tensor`'s first axis of about PIECE values. They are views: a memory-mapped tensor is read as they are used.

    Slices of a matrix have a multiple of ROWS rows, except the last one.
    """
    if tensor.ndim == 0 or tensor.numel() <= PIECE:
        yield tensor
    else:
        unit = ROWS if tensor.ndim == 2 else 1
        yield from torch.split(tensor, max(1, PIECE * len(tensor) // tensor.numel() // unit) * unit)


def file_size(tensors: Iterable[OutputTensor]) -> int:
    """The size in bytes of the file that `write_safetensors` writes for `tensors`."""
    tensors = list(tensors)
    return len(_header(_ordered(tensors))) + sum(tensor.bytes for tensor in tensors)


def write_safetensors(
    folder: Path,
    file: str,
    tensors: Iterable[OutputTensor],
    *,
    older: Path | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> WrittenFile:
    """Write `folder/file`, or hard-link it to `older` if the two are equal. `progress` is called with the size of each piece.

    Raises:
        CheckpointError: a value does not fit its dtype (above 65504 in float16).
        OSError: the disk is full or not writable.
    """
    ordered = _ordered(tensors)
    header = _header(ordered)
    locations, position = {}, len(header)
    with _one_torch_thread(), _Sink(folder / file, older) as sink:
        sink.put(lambda: memoryview(header))
        for tensor in ordered:
            locations[tensor.name] = TensorLocation(file, position, tensor.bytes, tensor.shape, tensor.dtype)
            written = 0
            for piece in tensor.pieces():
                sink.put(functools.partial(_as_bytes, piece, tensor))
                size = piece.numel() * tensor.dtype.itemsize
                progress(size)
                written += size
            if written != tensor.bytes:
                raise ValueError(f"{tensor.name}: {written} bytes were computed, {tensor.bytes} planned")
            position += written
    return WrittenFile(locations, position, sink.sha256, sink.bytes_written)


def _ordered(tensors: Iterable[OutputTensor]) -> list[OutputTensor]:
    return sorted(tensors, key=lambda tensor: (-(tensor.bytes & -tensor.bytes), tensor.name))


def _header(ordered: Iterable[OutputTensor]) -> bytes:
    """The bytes before the data."""
    header: dict[str, object] = {}
    position = 0
    for tensor in ordered:
        end = position + tensor.bytes
        header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    return len(text).to_bytes(8, "little") + text


def _as_bytes(piece: torch.Tensor, tensor: OutputTensor) -> memoryview:
    # Round first, then lay out: torch transposes within one dtype much faster than across two.
    value = (piece.mT.to(tensor.dtype).mT if _is_transposed(piece) else piece.to(tensor.dtype)).contiguous()
    if value.is_floating_point() and value.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(value)):
        raise CheckpointError(
            f"{tensor.name} exceeds the range of {str(tensor.dtype).removeprefix('torch.')}; export with --precision bf16"
        )
    return value.reshape(-1).view(torch.uint8).numpy().data


def _is_transposed(piece: torch.Tensor) -> bool:
    return piece.ndim == 2 and piece.stride(0) == 1


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Pieces are small: computing, rounding and hashing different pieces in parallel beats splitting each of them over the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Sink:
    """A file being written. Compared with `older` as long as the two agree; written from the first difference on.

    The caller computes pieces, a second thread rounds them, a third hashes and writes them in order.
    """

    def __init__(self, path: Path, older: Path | None) -> None:
        self._path, self._older = path, older
        self._source: BinaryIO | None = older.open("rb") if older else None
        self._target: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._position = 0
        self._rounder, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self.bytes_written = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def put(self, piece: Callable[[], memoryview]) -> None:
        """Queue the bytes that `piece` returns. Raises the error of an earlier piece."""
        rounded = self._rounder.submit(piece)
        self._pending.append(self._writer.submit(lambda: self._take(rounded.result())))
        self._settle(_IN_FLIGHT)

    def _settle(self, unfinished: int) -> None:
        """Wait until at most `unfinished` pieces are in flight."""
        while len(self._pending) > unfinished:
            self._pending.popleft().result()

    def _take(self, data: memoryview) -> None:
        self._digest.update(data)
        if self._source and not np.array_equal(np.frombuffer(self._source.read(len(data)), np.uint8), np.frombuffer(data, np.uint8)):
            self._part_from_older()
        if not self._source:
            self._target = self._target or self._path.open("wb")
            self._target.write(data)
            self.bytes_written += len(data)
            if self._position // _FLUSH != (self._position + len(data)) // _FLUSH:
                drop_from_cache(self._target)
        self._position += len(data)

    def _part_from_older(self) -> None:
        """Start the file with the bytes that it shares with the older one."""
        assert self._source
        self._target = self._path.open("wb")
        self._source.seek(0)
        while rest := self._position - self._target.tell():
            self._target.write(self._source.read(min(rest, 1 << 24)))
        self.bytes_written = self._position
        self._source.close()
        self._source = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self._settle(0)
                self._finish()
        finally:
            self._rounder.shutdown(cancel_futures=True)
            self._writer.shutdown(cancel_futures=True)
            for file in (self._source, self._target):
                if file:
                    file.close()

    def _finish(self) -> None:
        if not self._source or not self._older:
            return
        if self._source.read(1):  # the older file is longer
            self._part_from_older()
            return
        if not link_or_copy(self._older, self._path):
            self.bytes_written = self._position

"""Reads a file of torch.save without torch.load: nothing in it is run, and tensors are views of the bytes that were checked.

The current format is an uncompressed ZIP archive with a pickle and one record per storage, each with its CRC-32. The older format is a
sequence of pickles followed by the storages' bytes, without checksums. Does not know models and tensor names.
"""

from __future__ import annotations

import dataclasses
import io
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from vessel_export.errors import UnreadableFile
from vessel_export.sources.pickle_reader import Pickle, PickleRefused, StoredTensor, read_pickle
from vessel_rt.errors import first_line

__all__ = ["FLOATS", "DamagedFile", "TorchFile", "read_torch_file"]

FLOATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s2H18x2H")  # signature, version, flags, ..., lengths of name and extra field (APPNOTE.TXT 4.3.7)
_HARMLESS_FLAGS = 0x808  # sizes after the data, names in UTF-8; the others mean encryption or compression
_UTF8 = 0x800
_MOST_PICKLE = 1 << 27  # bytes; the logs of a long training take about 30 MB
_PIECE = 1 << 22  # bytes read at a time
_READERS = 4  # records checked at once; two of them are large
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


class DamagedFile(UnreadableFile):
    """Not a complete file of torch.save. The message is a phrase that says why."""


@dataclasses.dataclass(frozen=True)
class _Record:
    """The place of a record's bytes in the file. `crc` is None in the older format."""

    name: str
    offset: int
    size: int
    crc: int | None


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """A memory-mapped file of torch.save. `document` is its pickle's value. The older format has no `checksums`."""

    document: Any
    checksums: bool
    _records: Mapping[str, _Record]  # by the storage's key
    _mapped: mmap.mmap

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor that `stored` describes, of a dtype in FLOATS: a view of the mapped file if it is aligned, otherwise a copy.

        Raises:
            DamagedFile: the tensor extends beyond its storage.
        """
        record, size = self._records[stored.key], FLOATS[stored.dtype].itemsize
        values, count = record.size // size, math.prod(stored.shape)
        if count == 0:
            possible = math.prod(max(1, length) for length in stored.shape) < 1 << 62
            return torch.empty(stored.shape if possible else (0,), dtype=FLOATS[stored.dtype])
        last = stored.offset + sum((length - 1) * step for length, step in zip(stored.shape, stored.stride, strict=True))
        if last >= values or count > values:
            raise DamagedFile(f"a tensor of {list(stored.shape)} extends beyond {record.name}, which has {values} values")
        if record.offset % size:
            data: Any = bytearray(self._mapped[record.offset : record.offset + record.size])
            flat = torch.frombuffer(data, dtype=FLOATS[stored.dtype])
        else:
            flat = torch.frombuffer(self._mapped, dtype=FLOATS[stored.dtype], count=values, offset=record.offset)
        stride = [step if length > 1 else 1 for length, step in zip(stored.shape, stored.stride, strict=True)]
        return flat.as_strided(stored.shape, stride, stored.offset)


def read_torch_file(path: Path, *, check_values: bool) -> TorchFile:
    """Read the file at `path`. Its structure and pickle are always checked, its values against their CRC-32 only with `check_values`.

    Raises:
        DamagedFile: not a file of torch.save, cut short, or with a checked record that does not match its CRC-32.
        PickleRefused: its pickle has more than tensors and plain values.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        if not os.fstat(file.fileno()).st_size:
            raise DamagedFile("is empty")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        pickled, records = _read_zip(file, path, check_values) if is_zip else _read_legacy(file, len(mapped))
    for key, storage in pickled.storages.items():
        if key not in records:
            raise DamagedFile(f"lacks the record data/{key}")
        if records[key].size != storage.values * getattr(torch, storage.dtype).itemsize:
            raise DamagedFile(
                f"{records[key].name} has {records[key].size} bytes, but {storage.values} {storage.dtype} values by its pickle"
            )
    return TorchFile(pickled.value, is_zip, records, mapped)


def _read_zip(file: BinaryIO, path: Path, check_values: bool) -> tuple[Pickle, dict[str, _Record]]:
    records = _zip_records(file)
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise DamagedFile("has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if records[pickles[0]].size > _MOST_PICKLE:
        raise DamagedFile(f"its pickle has {records[pickles[0]].size} bytes, more than {_MOST_PICKLE}")
    small = [records[name] for name in (pickles[0], folder + "byteorder") if name in records]
    _check(file, list(records.values()) if check_values else small, path)
    if len(small) == 2 and _read(file, small[1]) != b"little":
        raise DamagedFile("was saved on a machine of another byte order")
    prefix = folder + "data/"
    data = {name.removeprefix(prefix): record for name, record in records.items() if name.startswith(prefix)}
    return read_pickle(io.BytesIO(_read(file, small[0]))), data


class _SmallReads(io.FileIO):
    """A file that refuses large reads: a damaged ZIP archive can claim a directory of gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MOST_PICKLE:
            raise zipfile.BadZipFile("its directory is too large")
        return super().read(size)


def _zip_records(file: BinaryIO) -> dict[str, _Record]:
    """Every record of the archive by name. Records may not overlap and must be stored uncompressed."""
    try:
        with _SmallReads(file.fileno(), closefd=False) as raw, zipfile.ZipFile(raw) as archive:
            infos, end = sorted(archive.infolist(), key=lambda info: info.header_offset), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, IndexError, struct.error, OSError) as e:
        raise DamagedFile(f"its ZIP archive is damaged: {first_line(e)}") from e
    records: dict[str, _Record] = {}
    last = 0
    for info in infos:
        name = info.orig_filename
        if not 0 <= info.header_offset < end:
            raise DamagedFile(f"the record {name} extends beyond the end")
        offset = _data_offset(file, info)
        if info.header_offset < last or name in records:
            raise DamagedFile(f"the record {name} overlaps another, or appears twice")
        last = offset + info.file_size
        records[name] = _Record(name, offset, info.file_size, info.CRC)
    if last > end:
        raise DamagedFile(f"the record {infos[-1].orig_filename} extends beyond the end")
    return records


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """The start of a record's bytes. Its local header must agree with the directory."""
    header = os.pread(file.fileno(), _LOCAL_HEADER.size, info.header_offset)
    if len(header) == _LOCAL_HEADER.size:
        signature, _, flags, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        name = os.pread(file.fileno(), name_length, info.header_offset + len(header))
        expected = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if signature == _ZIP_MAGIC and name == expected and stored and not (flags | info.flag_bits) & ~_HARMLESS_FLAGS:
            return int(info.header_offset + len(header) + name_length + extra_length)
    raise DamagedFile(f"the record {info.orig_filename} has a damaged header, or is compressed or encrypted")


def _read(file: BinaryIO, record: _Record) -> bytes:
    return os.pread(file.fileno(), record.size, record.offset)


def _check(file: BinaryIO, records: Sequence[_Record], path: Path) -> None:
    """Check every record against its CRC-32, the largest first, several at once."""
    ordered = sorted(records, key=lambda record: -record.size)
    pool = ThreadPoolExecutor(_READERS)
    total = sum(record.size for record in ordered)
    try:
        with tqdm(total=total, desc=f"checking {path.name}", unit="B", unit_scale=True, disable=None, delay=2) as bar:
            for record, crc in zip(ordered, pool.map(lambda record: _crc(file, record), ordered), strict=True):
                if crc != record.crc:
                    raise DamagedFile(f"the record {record.name} is damaged: its CRC-32 is {crc:08x}, not {record.crc:08x}")
                bar.update(record.size)
    finally:
        pool.shutdown(cancel_futures=True)


def _crc(file: BinaryIO, record: _Record) -> int:
    crc, buffer = 0, bytearray(min(_PIECE, record.size))
    position, end = record.offset, record.offset + record.size
    while position < end:
        piece = memoryview(buffer)[: min(len(buffer), end - position)]
        count = os.preadv(file.fileno(), [piece], position)
        if count == 0:
            raise DamagedFile(f"the record {record.name} extends beyond the end")
        crc = zlib.crc32(piece[:count], crc)
        position += count
    return crc


def _read_legacy(file: BinaryIO, size: int) -> tuple[Pickle, dict[str, _Record]]:
    """The format before torch 1.6: magic number, version, sizes of the machine, the object, the storages' keys, the storages."""
    file.seek(0)
    start = io.BytesIO(file.read(_MOST_PICKLE))
    try:
        magic, version = read_pickle(start).value, read_pickle(start).value
    except PickleRefused as e:
        raise DamagedFile("is not in a format of torch.save") from e
    if magic != _LEGACY_MAGIC or version != _LEGACY_VERSION:
        raise DamagedFile("is not in a format of torch.save")
    machine = read_pickle(start).value
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise DamagedFile("was saved on a machine of another byte order")
    pickled, keys = read_pickle(start), read_pickle(start).value
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(pickled.storages):
        raise DamagedFile("has a damaged list of storages")
    records: dict[str, _Record] = {}
    position = start.tell()
    for key in keys:  # each starts with its number of values
        values, storage = int.from_bytes(os.pread(file.fileno(), 8, position), "little"), pickled.storages[key]
        begin, position = position + 8, position + 8 + storage.values * getattr(torch, storage.dtype).itemsize
        if values != storage.values or position > size:
            raise DamagedFile("is cut short")
        records[key] = _Record(f"data/{key}", begin, position - begin, None)
    return pickled, records

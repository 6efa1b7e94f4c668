"""Files of torch.save's: read as torch reads them, and refused where a byte of theirs is not what was saved."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.fuzz.checkpoints import records, seed, zipped
from tests.support.paths import Tiny
from vessel_export.cli import main
from vessel_export.errors import CheckpointError
from vessel_export.sources.checkpoint import open_checkpoint, survey_checkpoint
from vessel_export.sources.pickle_reader import StoredTensor
from vessel_export.sources.torch_file import DamagedFile, read_torch_file

SHARED = torch.arange(60.0).reshape(3, 4, 5)
TENSORS = {
    "whole": SHARED,
    "view": SHARED[1:, ::2, 3],
    "transposed": SHARED.permute(2, 0, 1),
    "bf16": torch.randn(7, 3).bfloat16(),
    "half": torch.randn(5).half(),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "parameter": torch.nn.Parameter(torch.ones(3, 2)),
}


def data_records(data: bytes) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [info for info in archive.infolist() if "/data/" in info.filename and info.file_size]


def begin_of(data: bytes, info: zipfile.ZipInfo) -> int:
    name, extra = struct.unpack_from("<2H", data, info.header_offset + 26)
    return info.header_offset + 30 + int(name) + int(extra)


@pytest.mark.parametrize("new", [True, False])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path: Path, new: bool) -> None:
    torch.save(TENSORS, tmp_path / "t.pth", _use_new_zipfile_serialization=new)
    file, expected = read_torch_file(tmp_path / "t.pth", check_values=True), torch.load(tmp_path / "t.pth", weights_only=True)
    assert file.checksums is new
    for name, tensor in expected.items():
        stored = file.document[name]
        assert isinstance(stored, StoredTensor)
        read = file.tensor(stored)
        assert torch.equal(read, tensor)
        assert read.dtype is tensor.dtype


def test_the_tiny_checkpoint_is_read_as_torch_reads_it(tiny: Tiny, tmp_path: Path) -> None:
    tensors = open_checkpoint(tiny.checkpoint).tensors
    torch.save(dict(tensors), tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("number", range(30))
def test_a_flipped_bit_in_a_record_is_found_and_named(tiny: Tiny, tmp_path: Path, number: int) -> None:
    rng, data = random.Random(number), bytearray(tiny.checkpoint.read_bytes())
    info = rng.choice(data_records(bytes(data)))
    data[begin_of(bytes(data), info) + rng.randrange(info.file_size)] ^= 1 << rng.randrange(8)
    (tmp_path / "iter_1.pth").write_bytes(data)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path / "iter_1.pth")
    assert "iter_1.pth" in str(refused.value)
    assert info.filename in str(refused.value)
    assert survey_checkpoint(tmp_path / "iter_1.pth").tensors  # `inspect` reads no values


@pytest.mark.parametrize("command", ["export", "verify"])
def test_commands_refuse_a_damaged_checkpoint(
    tiny: Tiny, fp32_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(tiny.checkpoint.read_bytes())
    info = data_records(bytes(data))[5]
    data[begin_of(bytes(data), info)] ^= 1
    damaged = tmp_path / "iter_9.pth"
    damaged.write_bytes(data)
    monkeypatch.setattr("vessel_export.parity.verify.sha256_of", lambda path: _promised(fp32_bundle))  # as if the bundle were made of it
    common = ["--ckpt", str(damaged), "--base", str(tiny.base), "--sam2", str(tiny.sam2)]
    arguments = {
        "export": [*common, "--recipe", "engines/cpu.toml", "--out", str(tmp_path / "b")],
        "verify": [*common, "--bundle", str(fp32_bundle)],
    }
    assert main([command, *arguments[command]]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "iter_9.pth" in line
    assert info.filename in line
    assert not (tmp_path / "b").exists()


def _promised(bundle: Path) -> str:
    from vessel_rt.formats.bundle import Bundle

    return Bundle.load(bundle).provenance.checkpoint_sha256


def _without_checksums(data: bytearray, info: zipfile.ZipInfo) -> None:
    """The directory's CRC-32 of a record becomes 0, and a bit of the record another."""
    at = data.rindex(info.filename.encode()) - 46
    data[at + 16 : at + 20] = bytes(4)
    data[begin_of(bytes(data), info)] ^= 1


def _compressed(data: bytearray, info: zipfile.ZipInfo) -> None:
    data[:] = zipped(records(), zipfile.ZIP_DEFLATED)


def _encrypted(data: bytearray, info: zipfile.ZipInfo) -> None:
    data[data.rindex(info.filename.encode()) - 46 + 8] |= 1


def _renamed_locally(data: bytearray, info: zipfile.ZipInfo) -> None:
    data[info.header_offset + 30] ^= 1


def _moved(data: bytearray, info: zipfile.ZipInfo) -> None:
    """The local header says that the record begins 8 bytes later than it does: what torch would map."""
    data[info.header_offset + 28] ^= 8


def _overlapping(data: bytearray, info: zipfile.ZipInfo) -> None:
    """Two entries of the directory with one record's bytes."""
    other = data_records(bytes(data))[-1]
    at = data.rindex(other.filename.encode()) - 46
    data[at + 42 : at + 46] = struct.pack("<I", info.header_offset)


def _beyond_the_end(data: bytearray, info: zipfile.ZipInfo) -> None:
    at = data.rindex(info.filename.encode()) - 46
    data[at + 20 : at + 28] = struct.pack("<2I", 1 << 30, 1 << 30)


def _two_of_a_name(data: bytearray, info: zipfile.ZipInfo) -> None:
    memory = io.BytesIO(bytes(data))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(memory, "a") as archive:
        archive.writestr(info.filename, bytes(info.file_size))
    data[:] = memory.getvalue()


def _huge_directory(data: bytearray, info: zipfile.ZipInfo) -> None:
    at = data.rindex(b"PK\6\6")  # torch writes the 64-bit one
    data[at + 40 : at + 48] = struct.pack("<Q", 1 << 31)


def _of_another_byte_order(data: bytearray, info: zipfile.ZipInfo) -> None:
    data[:] = zipped({name: b"big" if name.endswith("byteorder") else record for name, record in records().items()})


def _without_a_record(data: bytearray, info: zipfile.ZipInfo) -> None:
    data[:] = zipped({name: record for name, record in records().items() if not name.endswith("data/1")})


def _with_a_short_record(data: bytearray, info: zipfile.ZipInfo) -> None:
    data[:] = zipped({name: record[:-2] if name.endswith("data/1") else record for name, record in records().items()})


@pytest.mark.parametrize(
    "damage",
    [
        _without_checksums, _compressed, _encrypted, _renamed_locally, _moved, _overlapping, _beyond_the_end, _two_of_a_name,
        _huge_directory, _of_another_byte_order, _without_a_record, _with_a_short_record,
    ],
)  # fmt: skip
def test_an_archive_that_is_not_as_torch_saves_it(tiny: Tiny, tmp_path: Path, damage: Callable[[bytearray, zipfile.ZipInfo], None]) -> None:
    data = bytearray(tiny.checkpoint.read_bytes())
    damage(data, data_records(bytes(data))[3])
    (tmp_path / "c.pth").write_bytes(data)
    with pytest.raises(DamagedFile):
        read_torch_file(tmp_path / "c.pth", check_values=True)


def test_an_archive_without_checksums_is_refused(tmp_path: Path) -> None:
    """torch can be told to save none, and records 0 then."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(TENSORS, tmp_path / "c.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(DamagedFile, match="CRC-32"):
        read_torch_file(tmp_path / "c.pth", check_values=True)


def test_a_record_that_is_not_aligned_is_read(tmp_path: Path) -> None:
    """An archive that another program packed again."""
    (tmp_path / "c.pth").write_bytes(zipped(records()))
    with zipfile.ZipFile(tmp_path / "c.pth") as archive:
        assert all(zlib.crc32(records()[info.filename]) == info.CRC for info in archive.infolist())
    packed = open_checkpoint(tmp_path / "c.pth").tensors
    (tmp_path / "c.pth").write_bytes(seed())
    assert all(torch.equal(tensor, packed[name]) for name, tensor in open_checkpoint(tmp_path / "c.pth").tensors.items())


def test_the_older_format_is_read_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a.lora_A.weight": TENSORS["whole"][0]}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(open_checkpoint(tmp_path / "old.pth").tensors["a.lora_A.weight"], SHARED[0])
    [line] = capsys.readouterr().err.splitlines()
    assert "old.pth" in line
    assert "no checksums" in line


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_the_older_format_cut_short(tmp_path: Path, keep: int) -> None:
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pth").read_bytes()
    (tmp_path / "old.pth").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"old\.pth"):
        open_checkpoint(tmp_path / "old.pth")


def test_a_file_that_grows_no_memory(tmp_path: Path) -> None:
    """Tensors far larger than their storage: refused by their numbers, before memory is taken."""
    for shape, stride in (((1 << 40,), (0,)), ((1 << 30, 1 << 30), (0, 0)), ((3,), (1 << 61,)), ((0, 1 << 61, 1 << 61), (1, 1, 1))):
        file = read_torch_file(_saved(tmp_path, torch.ones(4)), check_values=True)
        stored = file.document["t"]
        hostile = StoredTensor(stored.key, "float32", 0, shape, stride)
        if 0 in shape:
            assert file.tensor(hostile).numel() == 0
        else:
            with pytest.raises(DamagedFile, match="beyond"):
                file.tensor(hostile)


def _saved(folder: Path, tensor: torch.Tensor) -> Path:
    torch.save({"t": tensor}, folder / "t.pth")
    return folder / "t.pth"

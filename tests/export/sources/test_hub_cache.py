"""Files of Hugging Face's cache are compared with the SHA-256 that they are named by."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import pytest

from vessel_export.bundle.bundle_writer import ExportRequest, export_bundle
from vessel_export.errors import BaseModelError
from vessel_export.sources.hub_cache import hashing, recorded_sha256


def cached(folder: Path, name: str, data: bytes) -> Path:
    """A file as the cache keeps it: a link into a folder of blobs."""
    blob, link = folder / "blobs" / hashlib.sha256(data).hexdigest(), folder / "snapshots" / "0" / name
    blob.parent.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link


def test_only_the_caches_files_have_a_hash(tmp_path: Path) -> None:
    link = cached(tmp_path, "model.safetensors", b"data")
    assert recorded_sha256(link) == hashlib.sha256(b"data").hexdigest()
    (tmp_path / "blobs" / ("a" * 40)).write_bytes(b"")  # git's own hash, which small files have
    assert recorded_sha256(tmp_path / "blobs" / ("a" * 40)) is None
    (tmp_path / "model.safetensors").write_bytes(b"data")
    assert recorded_sha256(tmp_path / "model.safetensors") is None


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    good, bad = cached(tmp_path, "a.safetensors", b"a" * 1000), cached(tmp_path, "b.safetensors", b"b" * 1000)
    with hashing([good, bad]) as wait:
        wait()
    bad.resolve().write_bytes(b"b" * 999 + b"c")
    with hashing([good, bad]) as wait, pytest.raises(BaseModelError, match=r"b\.safetensors: damaged.*download it again"):
        wait()


def test_a_block_that_fails_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vessel_export.sources.hub_cache._PIECE", 1)
    big = cached(tmp_path, "a.safetensors", bytes(1 << 24))
    with pytest.raises(RuntimeError, match="first"), hashing([big] * 100):
        raise RuntimeError("first")


@pytest.mark.usefixtures("traced_once")
def test_an_export_from_a_damaged_cache_leaves_nothing(small: ExportRequest, tmp_path: Path) -> None:
    for path in Path(small.base).iterdir():
        cached(tmp_path / "cache", path.name, path.read_bytes())
    folder = tmp_path / "cache" / "snapshots" / "0"
    request = dataclasses.replace(small, base=str(folder), out=tmp_path / "b")
    export_bundle(request)
    blob = (folder / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(data)
    with pytest.raises(BaseModelError, match=r"model\.safetensors: damaged"):
        export_bundle(dataclasses.replace(request, out=tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    assert not list(tmp_path.glob(".*"))

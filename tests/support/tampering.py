"""Bundles with changed files whose hashes fit again: what only a comparison with the checkpoint can notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle
from vessel_rt.io.checked_files import sha256_of

__all__ = ["change_tensor", "rehash"]

_DTYPES = {"I8": np.int8, "U8": np.uint8, "F16": np.float16, "F32": np.float32}


def change_tensor(folder: Path, file: str, name: str, change: Callable[[npt.NDArray[Any]], None]) -> None:
    """Apply `change` to one tensor of a bundle's .safetensors file, where it lies."""
    path = folder / file
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    record = json.loads(path.read_bytes()[8 : 8 + header_bytes])[name]
    offset = 8 + header_bytes + record["data_offsets"][0]
    values = np.memmap(path, _DTYPES[record["dtype"]], "r+", offset=offset, shape=tuple(record["shape"]))
    change(values)
    values.flush()
    rehash(folder, file)


def rehash(folder: Path, *files: str) -> None:
    """Make bundle.json say of `files` what they are."""
    bundle = Bundle.load(folder)
    records = {file: msgspec.structs.replace(bundle.files[file], sha256=sha256_of(folder / file)) for file in files}
    (folder / BUNDLE_FILE).write_text(msgspec.structs.replace(bundle, files=bundle.files | records).to_json(), encoding="utf-8")

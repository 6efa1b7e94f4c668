"""Fixtures of the runtime's tests: bundles whose answer is known, and frames to feed them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.frames import make_frame
from tests.support.paths import Tiny
from tests.support.standin import build_standin
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.pseudonyms import StudyCodes


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Answers `Mask [SEG].`; not to be written to."""
    return build_standin(tmp_path_factory.mktemp("standin") / "standin")


@pytest.fixture(autouse=True)
def own_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key for study codes that is not the user's."""
    key = tmp_path_factory.getbasetemp() / "study-codes.key"
    if not key.exists():
        StudyCodes.load(key)
    monkeypatch.setenv("VESSEL_KEY", str(key))


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A folder of three good frames: a.jpg, b.png and c.tif."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for seed, name in enumerate(("a.jpg", "b.png", "c.tif")):
        make_frame(seed=seed).save(folder / name)
    return folder


@pytest.fixture
def tiny_frames(tiny: Tiny) -> list[Path]:
    """The frames that come with examples/tiny, sorted."""
    return sorted(tiny.frames.glob("*.jpg"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with _mounted(tmp_path / "small_disk", "size=1m") as place:
        yield place


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that nobody, not even root, can write to."""
    with _mounted(tmp_path / "read_only", "ro,size=1m") as place:
        yield place


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))


_VERSION, _OVERRIDE = 0x20080522, 0b110  # of Linux's capabilities; CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Permissions count for this thread and those it starts, though it be root's; not for processes that it starts."""
    if os.name != "posix" or os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may read everything here")
    library, header = ctypes.CDLL(None), _Header(_VERSION, 0)
    before, less = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()  # twice: effective, permitted, inheritable
    assert library.capget(ctypes.byref(header), before) == 0
    less[:] = [before[0] & ~_OVERRIDE, *before[1:]]
    assert library.capset(ctypes.byref(header), less) == 0
    try:
        yield
    finally:
        assert library.capset(ctypes.byref(header), before) == 0


@contextmanager
def _mounted(place: Path, how: str) -> Iterator[Path]:
    place.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a file system of its own may not be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)

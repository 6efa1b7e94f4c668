"""Fixtures of the runtime's tests: bundles whose answer is known, and frames to feed them."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checks import with_goldens
from tests.support.disks import SmallDisk, limited_files, mounted
from tests.support.frames import make_frame
from tests.support.paths import Tiny
from tests.support.standin import build_standin
from tests.support.standin_gpu import StandinGpu
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.pseudonyms import StudyCodes


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Answers `Mask [SEG].`; not to be written to."""
    return build_standin(tmp_path_factory.mktemp("standin") / "standin")


@pytest.fixture(scope="session")
def golden_standin(standin: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that answers `Mask [SEG].`, with goldens. Not to be written to."""
    folder = tmp_path_factory.mktemp("golden") / "standin"
    with_goldens(folder, standin.folder, "Please segment vessel in this image.")
    return folder


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


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))


# Of Linux's capabilities: the interface's version; CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH. Of prctl: what it gets and sets, and the
# bit without which a program that root starts has all capabilities again.
_VERSION, _OVERRIDE = 0x20080522, 0b110
_GET_SECUREBITS, _SET_SECUREBITS, _NOROOT = 27, 28, 1


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Permissions count for this thread and for the threads and processes that it starts, even when root runs the tests."""
    if os.name != "posix" or os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may read everything here")
    library, header = ctypes.CDLL(None), _Header(_VERSION, 0)
    before, less = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()  # twice: effective, permitted, inheritable
    assert library.capget(ctypes.byref(header), before) == 0
    if not before[0] & _OVERRIDE:
        yield
        return
    bits = library.prctl(_GET_SECUREBITS)
    less[:] = [before[0] & ~_OVERRIDE, *before[1:]]
    assert library.prctl(_SET_SECUREBITS, bits | _NOROOT) == 0
    assert library.capset(ctypes.byref(header), less) == 0
    try:
        yield
    finally:
        assert library.capset(ctypes.byref(header), before) == 0
        assert library.prctl(_SET_SECUREBITS, bits) == 0


@pytest.fixture
def read_only(tmp_path: Path, unprivileged: None) -> Iterator[Path]:
    """A folder that neither the test nor a process that it starts may write to."""
    if os.name != "posix":
        pytest.skip("folders have no such permission here")
    folder = tmp_path / "read_only"
    folder.mkdir(0o555)
    yield folder
    folder.chmod(0o755)


@pytest.fixture(params=["limit", pytest.param("mount", marks=pytest.mark.slow)])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    """A folder where space ends soon: files of limited size anywhere, a file system of 1 MiB where one may be mounted."""
    with (limited_files if request.param == "limit" else mounted)(tmp_path / "small_disk") as disk:
        yield disk


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> StandinGpu:
    """A CUDA device of this test, in place of all real ones: see StandinGpu."""
    return StandinGpu(monkeypatch)

"""Engines: a stage compiled for one kind of GPU. What lies beside an engine says what it was built from, and is checked before loading.

`bundle/engines/<builder>-<architecture>/<stage>.json` is the sidecar of `<stage>.onnx`, which wraps the engine files named in it.
An engine is code that a GPU runs and cannot be inspected, so it is never deserialised before its hash, its sources and its target agree.

What must agree to the letter: the files, the bundle's graph and weights, the GPU's architecture, and the version of the builder's library:
TensorRT-RTX and TensorRT promise to run an engine only by the version that built it. What is only recorded: the driver, which has to be new
enough for the library but is not part of an engine, and ONNX Runtime, which wraps the engine in a node of a released operator.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Self

from msgspec import Meta, Struct

from vessel_rt.errors import EngineError
from vessel_rt.formats.bundle import CINE_STAGES, STAGES, Bundle, named_and_unchecked
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.formats.profiles import max_shape
from vessel_rt.formats.schema import FileName, Sha256, Table, Text, decode, parse_json, read_small, to_json
from vessel_rt.io.checked_files import CheckedFiles, check_files

__all__ = ["BUILDERS", "ENGINES", "SCHEMA", "Engine", "EngineSet", "Target", "builder_version", "packed_cuda_runtime", "writable_by_anyone"]

ENGINES = "engines"  # the folder in a bundle
BUILDERS = ("rtx", "tensorrt")
SCHEMA = 1

_LIBRARY = re.compile(r"libtensorrt_rtx\.so[\d.]*|tensorrt_rtx[\d_]*\.dll")


@dataclasses.dataclass(frozen=True)
class Target:
    """What is to run engines: a builder's library of one `version`, on GPUs of one `architecture` (`sm86`)."""

    builder: str
    architecture: str
    version: str

    def folder(self, bundle: Bundle) -> Path:
        """Where `bundle` has its engines for this target."""
        return bundle.folder / ENGINES / f"{self.builder}-{self.architecture}"


class Engine(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sidecar of one engine.

    Attributes:
        schema: the version of this format.
        stage: the stage (graph) that was compiled.
        builder: `rtx` or `tensorrt`.
        architecture: the GPU architecture for which it was built, such as `sm86`.
        gpu: the name of the GPU.
        precision: the precision of the bundle.
        files: size and hash of the engine's files; paths are relative to the sidecar's folder.
        sources: the SHA-256 of each file from which it was built (graph and weights); paths are relative to the bundle.
        profile: the min, opt and max shape of each input, such as `1x3x448x448, 2x3x448x448, 8x3x448x448`.
        versions: the versions of the builder's library (under the builder's name), `onnxruntime` and the `driver` (null if there was none).
    """

    schema: Annotated[int, Meta(ge=1, le=SCHEMA)]
    stage: Text
    builder: Text
    architecture: Text
    gpu: Text
    precision: Text
    files: Table[FileName, FileRecord]
    sources: Table[FileName, Sha256]
    profile: Table[Text, Text]
    versions: Table[Text, Text | None]

    @property
    def partitions(self) -> int:
        """How many compiled files it has; one more file chains them."""
        return len(self.files) - 1

    @classmethod
    def load(cls, path: Path) -> Engine:
        """Read a sidecar. What it says is not checked here: see `differences` and `check_files`.

        Raises:
            EngineError: it is missing, not JSON, or not a sidecar of this schema.
        """
        try:
            return decode(parse_json(read_small(path)), cls, SCHEMA)
        except FileNotFoundError:
            raise EngineError(f"{path}: no such engine; vessel-export build makes it") from None
        except (OSError, ValueError) as e:
            said = e.strerror if isinstance(e, OSError) else e
            raise EngineError(f"{path}: not an engine's description ({said}); vessel-export build --rebuild makes it anew") from e

    def to_json(self) -> str:
        """The sidecar's text."""
        return to_json(self)

    def differences(self, folder: Path, bundle: Bundle, target: Target) -> list[str]:
        """Why the engine in `folder` is not to be loaded for `bundle` on `target`, in words; its files' contents are not read."""
        found = []
        if (self.builder, self.architecture) != (target.builder, target.architecture):
            found.append(f"it was built by {self.builder} for {self.architecture}, not by {target.builder} for {target.architecture}")
        if self.versions.get(target.builder) != target.version:
            found.append(f"it was built by {target.builder} {self.versions.get(target.builder)}, and {target.version} is installed")
        graph = bundle.all_stages[self.stage].file if self.stage in bundle.all_stages else self.stage
        if graph not in self.sources:
            found.append(f"it was not built from {graph}")
        for source, sha256 in self.sources.items():
            if source not in bundle.files or bundle.files[source].sha256 != sha256:
                found.append(f"it was built from another {source}")
        for name, record in self.files.items():
            path = folder / name
            if Path(name).name != name:
                found.append(f"{name} is not a file beside it")
            elif not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != record.bytes:
                found.append(f"{name} has {path.stat().st_size} bytes, not {record.bytes}")
        writable = [folder, folder / f"{self.stage}.json", *(folder / name for name in self.files)]
        return found + [f"{path.name} may be written by anyone (chmod o-w mends it)" for path in writable if writable_by_anyone(path)]


@dataclasses.dataclass(frozen=True)
class EngineSet:
    """The engines of a bundle's stages for one target, in one folder; those of cines only if all of them are built."""

    folder: Path
    engines: dict[str, Engine]

    @classmethod
    def open(cls, bundle: Bundle, target: Target) -> Self:
        """Read the sidecars of `bundle`'s engines for `target`, and compare everything with them but the contents of the files.

        Raises:
            EngineError: an engine is missing, or one was not built for this bundle on this target; every difference is named.
        """
        folder = target.folder(bundle)
        build = f"vessel-export build --bundle {bundle.folder}"
        absent = [stage for stage in STAGES if not (folder / f"{stage}.json").is_file()]
        if absent:
            raise EngineError(f"{folder}: no engine of {', '.join(absent)}; {build} makes them")
        cine = [stage for stage in CINE_STAGES if stage in bundle.all_stages and (folder / f"{stage}.json").is_file()]
        stages = (*STAGES, *(cine if len(cine) == len(CINE_STAGES) else ()))
        engines = {stage: Engine.load(folder / f"{stage}.json") for stage in stages}
        faults = []
        for stage, engine in engines.items():
            found = engine.differences(folder, bundle, target)
            if engine.stage != stage:
                found.append(f"it is the engine of {engine.stage}")
            if f"{stage}.onnx" not in engine.files:
                found.append(f"{stage}.onnx is not of its files")
            faults += [f"{stage}: {fault}" for fault in found]
        if faults:
            raise EngineError(f"{folder}: {'; '.join(faults)}; {build} --rebuild makes them anew")
        return cls(folder, engines)

    @property
    def files(self) -> dict[str, FileRecord]:
        """Every file of the engines, relative to the folder."""
        return {name: record for engine in self.engines.values() for name, record in engine.files.items()}

    @property
    def max_batch(self) -> int:
        """How many images at once the engines were built for: the first axis of the max shape of SAM2's pixels."""
        try:
            images, _, _, _ = max_shape(self.engines["sam2_image_encoder"].profile["pixel_values"])
        except (KeyError, ValueError):
            images = 0
        if not 0 < images < 10000:
            raise EngineError(f"{self.folder / 'sam2_image_encoder.json'}: has no shapes of pixel_values; {self._rebuild}")
        return images

    def verify(self, progress: Callable[[int], object] | None = None) -> CheckedFiles:
        """Compare the contents of every file with its SHA-256; `progress` is told of each bytes read.

        Raises:
            EngineError: a file was changed, or is not in the bundle; an engine's graph names a file that is not of the engine. All such
                files are named.
        """
        root, place = self.folder.parents[1], f"{ENGINES}/{self.folder.name}"
        checked, faults = check_files(root, {f"{place}/{name}": record for name, record in self.files.items()}, progress)
        faults = faults or named_and_unchecked(root, [f"{place}/{stage}.onnx" for stage in self.engines], checked)
        if faults:
            raise EngineError(f"{self.folder}: {'; '.join(faults)}; {self._rebuild}")
        return checked

    @property
    def _rebuild(self) -> str:
        return f"vessel-export build --bundle {self.folder.parents[1]} --rebuild"


def writable_by_anyone(path: Path) -> bool:
    """Whether every user of this machine may write to `path`. Windows' permissions are of another kind, and not looked at."""
    return os.name == "posix" and path.exists() and bool(path.stat().st_mode & stat.S_IWOTH)


def packed_cuda_runtime(provider: Path) -> tuple[Path, ...]:
    """CUDA's runtime that comes with TensorRT-RTX's `provider`, under a name that the loader does not look for; to be loaded before it.

    Where CUDA is not installed, none other is there.
    """
    return tuple(sorted(provider.parent.glob("libcudart.so.*")))


def builder_version(builder: str) -> str | None:
    """The version of the library that builds and runs `builder`'s engines here; None where it is not installed."""
    if builder == "tensorrt":
        try:
            return importlib.metadata.version("tensorrt")
        except importlib.metadata.PackageNotFoundError:
            return None
    package = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    if package is None or package.origin is None:
        return None
    # The package has a version of its own. The library's is asked of it: `getInferLibVersion` of NvInferRuntime.h, 10701 for 1.7.1.
    libraries = sorted(path for path in Path(package.origin).parent.iterdir() if _LIBRARY.fullmatch(path.name))
    if not libraries:
        return None
    number = ctypes.CDLL(str(libraries[0])).getInferLibVersion()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"

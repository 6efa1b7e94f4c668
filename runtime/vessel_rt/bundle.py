"""The bundle: a folder that describes itself in `bundle.json`.

The exporter writes these dataclasses, the runtime reads them, and nothing else is shared: every name, shape, token id,
preprocessing constant and file hash that the runtime uses is here, so that it never guesses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import types
import typing
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vessel_rt.errors import BundleError

if TYPE_CHECKING:  # the schema itself needs the standard library only
    import numpy as np

__all__ = [
    "BUNDLE_FILE",
    "SCHEMA",
    "STAGES",
    "Bundle",
    "EmbeddingTable",
    "FileRecord",
    "LanguageModelSpec",
    "MaskSpec",
    "PromptSpec",
    "Provenance",
    "StageSpec",
    "TensorSpec",
    "TileSpec",
    "changed_files",
    "decode",
    "sha256_of",
]

BUNDLE_FILE = "bundle.json"
SCHEMA = 1
STAGES = ("vision_encoder", "language_model", "sam2_image_encoder", "sam2_mask_decoder")

_CHUNK = 1 << 20  # bytes hashed between two reports of progress
_READERS = 4  # files hashed at once: a disk gives more than one core can hash


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output: `dtype` is a NumPy name or `bfloat16`, `shape` mixes sizes and the names of dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """One graph of the pipeline, its file relative to the bundle."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, name: str) -> TensorSpec:
        """The input of that name."""
        return next(spec for spec in self.inputs if spec.name == name)

    def input_dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of an input, for the array that is to be fed to it."""
        import numpy as np

        return np.dtype(self.input(name).dtype)


@dataclasses.dataclass(frozen=True)
class TileSpec:
    """How an image becomes `pixel_values` of vision_encoder: InternVL's dynamic tiling (pixels, ImageNet constants)."""

    size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    tokens_per_tile: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def most(self) -> int:
        """The greatest number of tiles that an image is cut into, its thumbnail included."""
        return self.max_tiles + (self.thumbnail and self.max_tiles > 1)


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """How an image becomes `pixel_values` of sam2_image_encoder, and the side of the low-res mask it gives (pixels)."""

    size: int
    low_res_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class PromptSpec:
    """The text around image and question, as in training, and the ids of the tokens that steer the pipeline.

    The prompt is `prefix + image_start + image_token * N + image_end + "\\n" + question + suffix`.
    `answers` are the sentences that training taught; the first is the likeliest.
    """

    tokenizer: str
    prefix: str
    image_start: str
    image_token: str
    image_end: str
    suffix: str
    default_question: str
    answers: tuple[str, ...]
    image_token_id: int
    seg_token_id: int
    stop_token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LanguageModelSpec:
    """Sizes of the language model; `capacity` is the KV cache's length in tokens, prompt and answer together."""

    layers: int
    hidden_size: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    capacity: int
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class EmbeddingTable:
    """Where the rows of embed_tokens lie: tensor `name`, [vocabulary, hidden_size], in a safetensors `file`."""

    file: str
    name: str


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What the bundle was made from; `None` where the checkpoint does not tell. `skipped` tensors were left out by request."""

    checkpoint: str
    checkpoint_sha256: str
    iteration: int | None
    lora_rank: int
    lora_alpha: float
    base: str
    sam2: str
    recipe: str
    skipped: tuple[str, ...]
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of the bundle."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Bundle:
    """`bundle.json`, read. `folder` is where it lies; it is not part of the file."""

    folder: Path
    precision: str
    tiles: TileSpec
    mask: MaskSpec
    prompt: PromptSpec
    language_model: LanguageModelSpec
    embed_tokens: EmbeddingTable
    stages: dict[str, StageSpec]
    provenance: Provenance
    files: dict[str, FileRecord]

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read `folder/bundle.json`. Hashes are not checked here: see `verify_files`.

        Raises:
            BundleError: no bundle there, not JSON, a field missing or of the wrong kind, a stage missing, or a schema newer
                than SCHEMA.
        """
        path = folder / BUNDLE_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"{folder}: no bundle here ({BUNDLE_FILE} is missing); make one with `make export CKPT=...` or `make demo`"
            ) from None
        except (OSError, UnicodeDecodeError) as e:
            raise BundleError(f"{path}: cannot be read ({e}); export it again") from e
        try:
            document = json.loads(text)
            schema = document.pop("schema")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as e:
            raise BundleError(f"{path}: not a bundle description ({type(e).__name__}: {e}); export it again") from e
        if not isinstance(schema, int) or schema > SCHEMA:
            raise BundleError(f"{path}: schema {schema} is newer than {SCHEMA}, the newest that this vessel-rt reads; upgrade vessel-rt")
        try:
            bundle: Bundle = decode(cls, {**document, "folder": folder})
        except (KeyError, TypeError, ValueError) as e:
            raise BundleError(f"{path}: damaged ({e}); export it again") from e
        absent = set(STAGES) - bundle.stages.keys()
        if absent:
            raise BundleError(f"{path}: damaged (stages lack {', '.join(sorted(absent))}); export it again")
        return bundle

    def to_json(self) -> str:
        """The text of `bundle.json`."""
        document = {"schema": SCHEMA, **dataclasses.asdict(self)}
        del document["folder"]
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    def used_files(self, *, graphs: bool = True) -> dict[str, FileRecord | None]:
        """The files to be read, relative to the bundle, with their records; None for one that is used and has none.

        Without `graphs`, only those that every device needs, whatever it runs the stages from.
        """
        names = {self.prompt.tokenizer, self.embed_tokens.file}
        if graphs:  # they name their weights in turn, which are of the other files
            names |= {stage.file for stage in self.stages.values()} | self.files.keys()
        return {name: self.files.get(name) for name in sorted(names)}

    def verify_files(self, progress: Callable[[int], object] | None = None, *, graphs: bool = True) -> None:
        """Compare the size and SHA-256 of `used_files` with what was written; `progress` is told of each bytes read.

        Raises:
            BundleError: a file is missing, or its size or hash differs, or was never recorded; all such files are named.
        """
        faults = changed_files(self.folder, self.used_files(graphs=graphs), progress)
        if faults:
            raise BundleError(f"{self.folder}: damaged bundle: {'; '.join(faults)}; copy or export it again")


def changed_files(
    folder: Path, records: Mapping[str, FileRecord | None], progress: Callable[[int], object] | None = None
) -> tuple[str, ...]:
    """What differs between the files of `folder` and their records, in words; `progress` is told of each bytes read.

    Several files are read at once; `progress` is called by one thread at a time.
    """
    lock, stopped = threading.Lock(), threading.Event()

    def advance(read: int) -> None:
        with lock:
            if stopped.is_set():
                raise InterruptedError
            if progress:
                progress(read)

    with ThreadPoolExecutor(_READERS) as pool:
        try:
            faults = pool.map(lambda name: _fault(folder / name, name, records[name], advance), records)
            return tuple(fault for fault in faults if fault)
        except BaseException:  # an interrupt must not wait until gigabytes are read
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _fault(path: Path, name: str, record: FileRecord | None, progress: Callable[[int], object]) -> str | None:
    if record is None:
        return f"{name} has no recorded SHA-256"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != record.bytes:
        return f"{name} has {path.stat().st_size} bytes, not {record.bytes}"
    return f"{name} was changed (its SHA-256 differs)" if sha256_of(path, progress) != record.sha256 else None


def sha256_of(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; `progress` is told how many bytes were read, piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            if progress:
                progress(len(piece))
    return digest.hexdigest()


def decode(kind: Any, value: Any) -> Any:
    """`value`, from JSON, as the annotated type `kind`, a dataclass say; TypeError or KeyError name what does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{value!r} is not a {kind.__name__}")  # type: ignore[union-attr]
        hints = typing.get_type_hints(kind)
        missing = hints.keys() - value.keys()
        if missing:
            raise KeyError(f"{kind.__name__} lacks {', '.join(sorted(missing))}")  # type: ignore[union-attr]
        return kind(**{name: decode(hint, value[name]) for name, hint in hints.items()})  # type: ignore[operator]
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if not isinstance(value, list) or len(kinds) != len(value):
            raise TypeError(f"{value!r} is not a list of {len(kinds)}")
        return tuple(decode(k, v) for k, v in zip(kinds, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(f"{value!r} is not a table")
        return {k: decode(arguments[1], v) for k, v in value.items()}
    kinds = arguments if origin in (typing.Union, types.UnionType) else (kind,)
    if float in kinds and isinstance(value, int):
        return float(value)
    if not isinstance(value, kinds):
        raise TypeError(f"{value!r} is not {kind}")
    return value

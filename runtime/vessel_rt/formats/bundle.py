"""The bundle: a folder that describes itself in `bundle.json`.

The exporter writes these dataclasses, the runtime reads them, and nothing else is shared: every name, shape, token id,
preprocessing constant and file hash that the runtime uses is here, so that it never guesses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle_faults import bundle_faults
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.formats.graph_files import named_files
from vessel_rt.formats.schema import FileName, Within, decode, parse_json, read_small, shown
from vessel_rt.io.checked_files import CheckedFiles, check_files, sha256_of

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
    "Quantization",
    "StageSpec",
    "TensorSpec",
    "TileSpec",
    "named_and_unchecked",
    "sha256_of",
]

BUNDLE_FILE = "bundle.json"
SCHEMA = 1
STAGES = ("vision_encoder", "language_model", "sam2_image_encoder", "sam2_mask_decoder")
_NO_MODEL = "virtual_model.onnx"  # what TensorRT-RTX calls a graph that it compiled from memory: no such file may be there

_Count = Annotated[int, Within(1, 2**20)]
_Bytes = Annotated[int, Within(0, 2**40)]
_Side = Annotated[int, Within(1, 8192)]  # pixels
_TokenId = Annotated[int, Within(0, 2**20)]
_Deviation = Annotated[float, Within(1e-6, 1e6)]
_Mean = Annotated[float, Within(-1e6, 1e6)]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output: `dtype` is a NumPy name or `bfloat16`, `shape` mixes sizes and the names of dynamic axes."""

    name: str
    dtype: str
    shape: tuple[_Count | str, ...]


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """One graph of the pipeline. `file` and `weights`, the files of its weights, are relative to the bundle.

    `activation_bytes` estimates the activations of one tile (vision_encoder), one token of the cache (language_model), one image
    (sam2_image_encoder) or one mask (sam2_mask_decoder). Bundles of older versions have neither it nor `weights`.
    """

    file: FileName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[FileName, ...] = ()
    activation_bytes: _Bytes = 0

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

    size: _Side
    min_tiles: Annotated[int, Within(1, 1024)]
    max_tiles: Annotated[int, Within(1, 1024)]
    thumbnail: bool
    tokens_per_tile: _Count
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Deviation, _Deviation, _Deviation]

    @property
    def most(self) -> int:
        """The greatest number of tiles that an image is cut into, its thumbnail included."""
        return self.max_tiles + (self.thumbnail and self.max_tiles > 1)


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """How an image becomes `pixel_values` of sam2_image_encoder, and the side of the low-res mask it gives (pixels)."""

    size: _Side
    low_res_size: _Side
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Deviation, _Deviation, _Deviation]


@dataclasses.dataclass(frozen=True)
class PromptSpec:
    """The text around image and question, as in training, and the ids of the tokens that steer the pipeline.

    The prompt is `prefix + image_start + image_token * N + image_end + "\\n" + question + suffix`.
    `answers` are the sentences that training taught; the first is the likeliest.
    """

    tokenizer: FileName
    prefix: str
    image_start: str
    image_token: str
    image_end: str
    suffix: str
    default_question: str
    answers: tuple[str, ...]
    image_token_id: _TokenId
    seg_token_id: _TokenId
    stop_token_ids: tuple[_TokenId, ...]


@dataclasses.dataclass(frozen=True)
class LanguageModelSpec:
    """Sizes of the language model; `capacity` is the KV cache's length in tokens, prompt and answer together."""

    layers: Annotated[int, Within(1, 1024)]
    hidden_size: _Count
    kv_heads: Annotated[int, Within(1, 1024)]
    head_dim: Annotated[int, Within(1, 8192)]
    vocabulary: _Count
    capacity: _Count
    max_new_tokens: _Count


@dataclasses.dataclass(frozen=True)
class EmbeddingTable:
    """Where the rows of embed_tokens lie: tensor `name`, [vocabulary, hidden_size], in a safetensors `file`."""

    file: FileName
    name: str


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What the bundle was made from; `None` where the checkpoint does not tell. `skipped` tensors were left out by request."""

    checkpoint: str
    checkpoint_sha256: str
    iteration: Annotated[int, Within(0, 2**63)] | None
    lora_rank: Annotated[int, Within(0, 2**20)]
    lora_alpha: float
    base: str
    sam2: str
    recipe: str
    skipped: tuple[str, ...]
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which matrices are integers of the type `weights` (`int8`, `int4`).

    `matrices` has for each quantized stage its matrices [in, out], and how many rows of each share a scale. `kept` has the stages and
    matrices that are not quantized, each with the reason.
    """

    weights: str
    matrices: dict[str, dict[str, _Count]]
    kept: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """`bundle.json`, read. `folder` is where it lies, `sha256` the hash of its bytes; they are not part of the file."""

    folder: Path
    precision: str
    tiles: TileSpec
    mask: MaskSpec
    prompt: PromptSpec
    language_model: LanguageModelSpec
    embed_tokens: EmbeddingTable
    stages: dict[str, StageSpec]
    provenance: Provenance
    files: dict[FileName, FileRecord]
    quantization: Quantization | None = None
    sha256: str = dataclasses.field(default="", compare=False)

    @property
    def weights(self) -> str:
        """The type of the matrices: that of the quantized ones, or else `precision`."""
        return self.quantization.weights if self.quantization else self.precision

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read `folder/bundle.json`. Files are not looked at here: see `verify_files`.

        Raises:
            BundleError: no bundle there, not JSON, a field missing, unknown, of the wrong kind or out of bounds, fields that contradict
                each other, or a schema newer than SCHEMA.
        """
        path = folder / BUNDLE_FILE
        try:
            content = read_small(path)
            document = parse_json(content)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"{folder}: no bundle here ({BUNDLE_FILE} is missing); make one with `make export CKPT=...` or `make demo`"
            ) from None
        except OSError as e:
            raise BundleError(f"{path}: cannot be read ({e.strerror}); allow it, or export it again") from e
        except ValueError as e:
            raise BundleError(f"{path}: not a bundle description ({e}); export it again") from e
        schema = document.pop("schema", None) if isinstance(document, dict) else None
        if type(schema) is not int or schema < 1:
            raise BundleError(f"{path}: not a bundle description (it has no schema number); export it again")
        if schema > SCHEMA:
            raise BundleError(f"{path}: schema {schema} is newer than {SCHEMA}, the newest that this vessel-rt reads; upgrade vessel-rt")
        try:
            bundle: Bundle = decode(cls, document, folder=folder, sha256=hashlib.sha256(content).hexdigest())
            for fault in bundle_faults(bundle, STAGES):
                raise ValueError(fault)
        except ValueError as e:
            raise BundleError(f"{path}: damaged ({e}); export it again") from e
        return bundle

    def to_json(self) -> str:
        """The text of `bundle.json`."""
        document = {"schema": SCHEMA, **dataclasses.asdict(self)}
        del document["folder"], document["sha256"]
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    def used_files(self, *, graphs: bool = True) -> dict[str, FileRecord | None]:
        """The files to be read, relative to the bundle, with their records; None for one that is used and has none.

        Without `graphs`, only those that every device needs, whatever it runs the stages from.
        """
        names = {self.prompt.tokenizer, self.embed_tokens.file}
        if graphs:  # they name their weights in turn, which are of the other files
            names |= {stage.file for stage in self.stages.values()} | self.files.keys()
        return {name: self.files.get(name) for name in sorted(names)}

    def verify_files(self, progress: Callable[[int], object] | None = None, *, graphs: bool = True) -> CheckedFiles:
        """Compare the size and SHA-256 of `used_files` with what was written; `progress` is told of each bytes read.

        Raises:
            BundleError: a file is missing, not in the folder, or its size or hash differs, or was never recorded; a graph names a file
                that is not of the bundle. All such files are named.
        """
        checked, faults = check_files(self.folder, self.used_files(graphs=graphs), progress)
        if graphs and not faults:
            faults = named_and_unchecked(self.folder, [stage.file for stage in self.stages.values()], checked)
        if faults:
            raise BundleError(f"{self.folder}: damaged bundle: {'; '.join(faults)}; copy or export it again")
        return checked


def named_and_unchecked(folder: Path, graphs: Iterable[str], checked: CheckedFiles) -> tuple[str, ...]:
    """The files that `graphs` of `folder` name and that are not among the checked ones, and graphs that are none, in words."""
    faults = []
    for graph in graphs:
        path = folder / graph
        try:
            faults += [
                f"{graph} names {shown(name)}, which has no recorded SHA-256"
                for name in sorted(named_files(path))
                if path.parent / name not in checked and not (name == _NO_MODEL and not os.path.lexists(path.parent / name))
            ]
        except (OSError, ValueError) as e:
            faults.append(f"{graph} is not an ONNX graph ({e.strerror if isinstance(e, OSError) else e})")
    return tuple(faults)

"""The bundle: a folder that describes itself in `bundle.json`.

The exporter writes these types, the runtime reads them, and the two share nothing else: every name, shape, token id, preprocessing
constant and file hash that the runtime uses is here, so that it never guesses.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta, Struct

from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle_faults import bundle_faults
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.formats.graph_files import named_files
from vessel_rt.formats.schema import FileName, Items, NewerSchemaError, Table, Text, decode, parse_json, read_small, shown, to_json
from vessel_rt.io.checked_files import CheckedFiles, check_files, sha256_of

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "BUNDLE_FILE",
    "CINE_STAGES",
    "SCHEMA",
    "STAGES",
    "Bundle",
    "BundleFile",
    "CineSpec",
    "EmbeddingTable",
    "FileRecord",
    "GoldenFiles",
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
SCHEMA = 2  # 2 added `cine`
STAGES = ("vision_encoder", "language_model", "sam2_image_encoder", "sam2_mask_decoder")
CINE_STAGES = ("sam2_memory_attention", "sam2_memory_encoder", "sam2_tracking_decoder")
_NO_MODEL = "virtual_model.onnx"  # what TensorRT-RTX calls a graph that it compiled from memory: no such file may be there

_Count = Annotated[int, Meta(ge=1, le=2**20)]
_Side = Annotated[int, Meta(ge=1, le=8192)]
_TokenId = Annotated[int, Meta(ge=0, le=2**20)]
_Deviation = Annotated[float, Meta(ge=1e-6, le=1e6)]
_Mean = Annotated[float, Meta(ge=-1e6, le=1e6)]


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of a graph.

    Attributes:
        name: the name in the graph.
        dtype: a NumPy dtype, or `bfloat16`.
        shape: the size of each axis, or its name if it is dynamic.
    """

    name: Text
    dtype: Text
    shape: Items[_Count | Text]

    @property
    def fixed(self) -> tuple[int, ...]:
        """The sizes of the axes that are not dynamic."""
        return tuple(axis for axis in self.shape if isinstance(axis, int))


class StageSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One graph of the pipeline.

    Attributes:
        file: the ONNX graph, relative to the bundle.
        inputs: the inputs of the graph.
        outputs: the outputs of the graph.
        weights: the weights files of the graph, relative to the bundle. Bundles from older versions do not list them.
        activation_bytes: the estimated memory of activations per tile (vision_encoder), token of the cache (language_model),
            image (sam2_image_encoder), mask (sam2_mask_decoder), frame (sam2_memory_encoder, sam2_tracking_decoder) or memory
            (sam2_memory_attention, whose frame counts as one more). 0 in bundles from older versions.
        flops: the floating-point operations of matrix products for one of these units; for a token, with one live slot and its next token;
            for sam2_memory_attention, those of a run with one memory and one object pointer. 0 in bundles from older versions.
    """

    file: FileName
    inputs: Items[TensorSpec]
    outputs: Items[TensorSpec]
    weights: Items[FileName] = ()
    activation_bytes: Annotated[int, Meta(ge=0, le=2**40)] = 0
    flops: Annotated[int, Meta(ge=0, le=2**53)] = 0

    def input(self, name: str) -> TensorSpec:
        """The input of that name."""
        return next(spec for spec in self.inputs if spec.name == name)

    def input_dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of an input, for the array that is to be fed to it."""
        import numpy as np

        return np.dtype(self.input(name).dtype)


class TileSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """How an image becomes `pixel_values` of vision_encoder: InternVL's dynamic tiling.

    Attributes:
        size: the side of a tile, in pixels.
        min_tiles: the minimum number of tiles, without the thumbnail.
        max_tiles: the maximum number of tiles, without the thumbnail.
        thumbnail: whether images with several tiles get a thumbnail as an additional last tile.
        tokens_per_tile: the number of image tokens per tile in the prompt.
        mean: the mean of red, green and blue (each 0 to 1), which is subtracted.
        std: the standard deviation of red, green and blue, by which the difference is divided.
    """

    size: _Side
    min_tiles: Annotated[int, Meta(ge=1, le=1024)]
    max_tiles: Annotated[int, Meta(ge=1, le=1024)]
    thumbnail: bool
    tokens_per_tile: _Count
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Deviation, _Deviation, _Deviation]

    @property
    def most(self) -> int:
        """The greatest number of tiles that an image is cut into, its thumbnail included."""
        return self.max_tiles + (self.thumbnail and self.max_tiles > 1)


class MaskSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """How an image becomes `pixel_values` of sam2_image_encoder, and the size of the masks.

    Attributes:
        size: the side of the square that the image is resized to, in pixels.
        low_res_size: the side of a low-res mask, in pixels.
        mean: the mean of red, green and blue (each 0 to 1), which is subtracted.
        std: the standard deviation of red, green and blue, by which the difference is divided.
    """

    size: _Side
    low_res_size: _Side
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Deviation, _Deviation, _Deviation]


class PromptSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """The text around image and question, as in training, and the ids of the special tokens.

    The prompt is `prefix + image_start + image_token * N + image_end + "\\n" + question + suffix`.

    Attributes:
        tokenizer: the tokenizer's file, relative to the bundle.
        prefix: the text before the image.
        image_start: the token before the image tokens.
        image_token: the placeholder for one image embedding; it occurs N times.
        image_end: the token after the image tokens.
        suffix: the text after the question.
        default_question: the question if the user gives none.
        answers: the answers used in training, the most likely first.
        image_token_id: the id of `image_token`.
        seg_token_id: the id of [SEG].
        stop_token_ids: the ids of the tokens that end an answer.
    """

    tokenizer: FileName
    prefix: Text
    image_start: Text
    image_token: Text
    image_end: Text
    suffix: Text
    default_question: Text
    answers: Items[Text]
    image_token_id: _TokenId
    seg_token_id: _TokenId
    stop_token_ids: Items[_TokenId]


class LanguageModelSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the language model.

    Attributes:
        layers: the number of transformer layers.
        hidden_size: the width of the residual stream.
        kv_heads: the number of key-value heads.
        head_dim: the width of an attention head.
        vocabulary: the number of token ids.
        capacity: the length of the KV cache in tokens, prompt and answer together.
        max_new_tokens: the longest answer, in tokens.
    """

    layers: Annotated[int, Meta(ge=1, le=1024)]
    hidden_size: _Count
    kv_heads: Annotated[int, Meta(ge=1, le=1024)]
    head_dim: Annotated[int, Meta(ge=1, le=8192)]
    vocabulary: _Count
    capacity: _Count
    max_new_tokens: _Count


class CineSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """How an object is tracked through the frames of a cine: SAM 2.0's memory, as in Sa2VA's inference.

    Attributes:
        prompted_frames: the number of frames that the language model sees; Sa2VA takes the first ones.
        memories: the number of temporal positions of memories: that of prompted frames, and one for each of the last frames.
        pointers: object pointers are those of prompted frames and of one frame less than this number before the current one.
        stages: the three graphs; docs/architecture.md lists their names.
        memory_flops: the floating-point operations of sam2_memory_attention for each memory after the first. 0 in bundles from older
            versions.
    """

    prompted_frames: Annotated[int, Meta(ge=1, le=64)]
    memories: Annotated[int, Meta(ge=2, le=64)]
    pointers: Annotated[int, Meta(ge=1, le=1024)]
    stages: Table[Text, StageSpec]
    memory_flops: Annotated[int, Meta(ge=0, le=2**53)] = 0


class EmbeddingTable(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the embedding table, embed_tokens, is stored.

    Attributes:
        file: a .safetensors file, relative to the bundle.
        name: the name of the tensor in the file; its shape is [vocabulary, hidden_size].
    """

    file: FileName
    name: Text


class Provenance(Struct, frozen=True, forbid_unknown_fields=True):
    """What the bundle was made from.

    Attributes:
        checkpoint: the file name of the checkpoint.
        checkpoint_sha256: the SHA-256 of the checkpoint.
        iteration: the training iteration; null if the checkpoint does not record it.
        lora_rank: the rank of the merged LoRA; 0 if there is none.
        lora_alpha: the alpha of the LoRA.
        base: the base model.
        sam2: SAM2's checkpoint.
        recipe: the name of the recipe.
        skipped: tensors of the checkpoint that were left out with `--skip`.
        versions: the versions of the exporter and its libraries.
    """

    checkpoint: Text
    checkpoint_sha256: Text
    iteration: Annotated[int, Meta(ge=0, le=2**53)] | None
    lora_rank: Annotated[int, Meta(ge=0, le=2**20)]
    lora_alpha: Annotated[float, Meta(ge=-1e30, le=1e30)]
    base: Text
    sam2: Text
    recipe: Text
    skipped: Items[Text]
    versions: Table[Text, Text]


class Quantization(Struct, frozen=True, forbid_unknown_fields=True):
    """Which matrices are stored as integers.

    Attributes:
        weights: the type of the integers: `int8` or `int4`.
        matrices: for each quantized stage its matrices [in, out], with the number of rows that share a scale.
        kept: the stages and matrices that are not quantized, each with the reason.
    """

    weights: Text
    matrices: Table[Text, Table[Text, _Count]]
    kept: Table[Text, Text]


class GoldenFiles(Struct, frozen=True, forbid_unknown_fields=True):
    """The reference's answers for a few generated frames (formats/golden.py). Only a check of the bundle reads them.

    Attributes:
        file: golden.json.
        arrays: golden.npz.
    """

    file: FileRecord
    arrays: FileRecord


class BundleFile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`bundle.json`.

    Attributes:
        schema: the version of this format.
        precision: `fp32`, `fp16` or `bf16`.
        tiles: preprocessing for vision_encoder.
        mask: preprocessing for sam2_image_encoder.
        prompt: the prompt's text and tokens.
        language_model: the sizes of the language model.
        embed_tokens: the embedding table.
        stages: the four graphs; docs/architecture.md lists their names.
        provenance: what the bundle was made from.
        files: size and hash of every file but the goldens', by its path relative to the bundle.
        quantization: which matrices are stored as integers; null if none are.
        golden: the files with the reference's answers; null if there are none.
        cine: how objects are tracked through the frames of a cine; null in bundles from older versions.
    """

    schema: Annotated[int, Meta(ge=1, le=SCHEMA)]
    precision: Text
    tiles: TileSpec
    mask: MaskSpec
    prompt: PromptSpec
    language_model: LanguageModelSpec
    embed_tokens: EmbeddingTable
    stages: Table[Text, StageSpec]
    provenance: Provenance
    files: Table[FileName, FileRecord]
    quantization: Quantization | None = None
    golden: GoldenFiles | None = None
    cine: CineSpec | None = None

    @property
    def all_stages(self) -> dict[str, StageSpec]:
        """The stages of a frame and those of cines."""
        return {**self.stages, **(self.cine.stages if self.cine else {})}

    @property
    def weights(self) -> str:
        """The type of the matrices: that of the quantized ones, or else `precision`."""
        return self.quantization.weights if self.quantization else self.precision

    def weight_bytes(self, stage: str) -> int:
        """The bytes of the files with the weights of `stage`; 0 if an older version exported the bundle."""
        return sum(self.files[file].bytes for file in self.all_stages[stage].weights)


class Bundle(BundleFile, frozen=True, kw_only=True):
    """`bundle.json`, read. `folder` is where it is, `sha256` the hash of its bytes; they are not part of the file."""

    folder: Path
    sha256: str = ""

    def sized_stages(self) -> dict[str, StageSpec]:
        """The stages, which all have the sizes that an estimate of memory needs.

        Raises:
            BundleError: one has not, because an older version exported the bundle.
        """
        for name, stage in self.stages.items():
            if not stage.weights or not stage.activation_bytes:
                raise BundleError(
                    f"{self.folder / BUNDLE_FILE}: stages.{name} has no weights and activation_bytes; export the bundle again"
                )
        return self.stages

    def require_cine(self) -> CineSpec:
        """How objects are tracked through cines.

        Raises:
            BundleError: an older version exported the bundle.
        """
        if self.cine is None:
            raise BundleError(f"{self.folder}: an older version exported it, without the graphs of cines; export it again")
        return self.cine

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read `folder/bundle.json`. Files are not looked at here: see `verify_files`.

        Raises:
            BundleError: no bundle there, not JSON, a field missing, unknown, of the wrong type or out of bounds, fields that contradict
                each other, or a schema newer than SCHEMA.
        """
        path = folder / BUNDLE_FILE
        try:
            content = read_small(path)
            found = decode(parse_json(content), BundleFile, SCHEMA)
            for fault in bundle_faults(found, STAGES, CINE_STAGES):
                raise ValueError(fault)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"{folder}: no bundle here ({BUNDLE_FILE} is missing); make one with `make export CKPT=...` or `make demo`"
            ) from None
        except OSError as e:
            raise BundleError(f"{path}: cannot be read ({e.strerror}); allow it, or export it again") from e
        except NewerSchemaError as e:
            raise BundleError(f"{path}: {e}") from e
        except ValueError as e:
            raise BundleError(f"{path}: damaged ({e}); export it again") from e
        return cls(**msgspec.structs.asdict(found), folder=folder, sha256=hashlib.sha256(content).hexdigest())

    def to_json(self) -> str:
        """The text of `bundle.json`."""
        found = msgspec.structs.asdict(self)
        return to_json(BundleFile(**{name: found[name] for name in BundleFile.__struct_fields__}))

    def used_files(self, *, graphs: bool = True) -> dict[str, FileRecord | None]:
        """The files to be read, relative to the bundle, with their records; None for one that is used and has none.

        Without `graphs`, only those that every device needs, whatever it runs the stages from.
        """
        names = {self.prompt.tokenizer, self.embed_tokens.file}
        if graphs:  # they name their weights in turn, which are of the other files
            names |= {stage.file for stage in self.all_stages.values()} | self.files.keys()
        return {name: self.files.get(name) for name in sorted(names)}

    def verify_files(self, progress: Callable[[int], object] | None = None, *, graphs: bool = True) -> CheckedFiles:
        """Compare the size and SHA-256 of `used_files` with what was written; `progress` is told of each bytes read.

        Raises:
            BundleError: a file is missing, not in the folder, or its size or hash differs, or was never recorded; a graph names a file
                that is not of the bundle. All such files are named.
        """
        checked, faults = check_files(self.folder, self.used_files(graphs=graphs), progress)
        if graphs and not faults:
            faults = named_and_unchecked(self.folder, [stage.file for stage in self.all_stages.values()], checked)
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

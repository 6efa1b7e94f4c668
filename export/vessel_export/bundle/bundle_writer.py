"""Export: checkpoint, base model, SAM2 and recipe -> a bundle, which appears under its name when it is complete."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import vessel_rt
from vessel_export.bundle.merge_lora import MergePlan, plan_merge
from vessel_export.bundle.reuse import find_neighbours, link_engines, older_file
from vessel_export.bundle.sam2_stages import Written, write_sam2_stages
from vessel_export.errors import BaseModelError, CheckpointError
from vessel_export.graphs.assemble import DTYPES, TO_IR, Graph, save_graph
from vessel_export.graphs.language_model import build_language_model
from vessel_export.graphs.quantize import Form, MatrixType, quantize_graph, with_quantized
from vessel_export.graphs.vision_encoder import build_vision_encoder
from vessel_export.io.files import staging
from vessel_export.io.safetensors_writer import OutputTensor, WrittenFile, file_size, write_safetensors
from vessel_export.io.subprocess_call import SubprocessCall, subprocess_call
from vessel_export.sources.base_model import BaseModel, Sam2, open_base, open_sam2
from vessel_export.sources.checkpoint import Checkpoint, open_checkpoint
from vessel_export.sources.hub_cache import hashing
from vessel_export.sources.names import NEW_TOKENS
from vessel_export.sources.tokenizer import extend_tokenizer
from vessel_rt.errors import RecipeError
from vessel_rt.formats.bundle import (
    BUNDLE_FILE,
    SCHEMA,
    Bundle,
    CineSpec,
    EmbeddingTable,
    LanguageModelSpec,
    MaskSpec,
    PromptSpec,
    Provenance,
    Quantization,
    StageSpec,
    TileSpec,
)
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.formats.profiles import MAX_TEXT_TOKENS
from vessel_rt.formats.recipe import Recipe
from vessel_rt.io.checked_files import sha256_of

__all__ = ["Export", "ExportRequest", "export_bundle"]

# Constants of Sa2VA that the base model does not set: inference (modeling_sa2va_chat.py, templates.py), training (datasets/common.py).
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MIN_TILES, _MAX_TILES, _THUMBNAIL = 1, 12, True
_PREFIX, _SUFFIX = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
_IMAGE_START, _IMAGE_TOKEN, _IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
_STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
_QUESTION = "Please segment vessel in this image."
_ANSWERS = ("It is [SEG].", "Sure, [SEG].", "Sure, it is [SEG].", "Sure, the segmentation result is [SEG].", "[SEG].")

_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "sam2")


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """What to export.

    `base` and `sam2` are local paths or Hugging Face ids. `lora_alpha` overrides the checkpoint's. `skip` names tensors of the checkpoint
    to leave out.
    """

    checkpoint: Path
    base: str
    sam2: str
    out: Path
    recipe: Recipe
    lora_alpha: float | None = None
    skip: tuple[str, ...] = ()
    overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class Export:
    """A finished export: the bundle, the number of bytes written, and the files and engines that are links to older ones."""

    bundle: Bundle
    bytes_written: int
    reused_files: tuple[str, ...]
    reused_engines: tuple[str, ...]


def export_bundle(request: ExportRequest) -> Export:
    """Write the bundle of `request`.

    Files and engines that equal those of another bundle in the same folder become hard links to them. Files are compared byte for byte, as
    they are written. An engine is linked if it was built from files with the same SHA-256.

    Raises:
        VesselError: an input is missing, damaged, or does not fit the others. Nothing is left behind.
    """
    out = request.out.absolute()
    _check_out(out, request.overwrite)
    with staging(out) as folder, subprocess_call(write_sam2_stages) as sam2_stages, ThreadPoolExecutor(1) as thread:
        checkpoint = open_checkpoint(request.checkpoint, request.skip)
        sha256 = thread.submit(sha256_of, request.checkpoint)
        base, sam2 = open_base(request.base), open_sam2(request.sam2)
        _check_recipe(request.recipe, base)
        alpha = _alpha(checkpoint, request.lora_alpha)
        sizes, dtype = request.recipe.language_model, DTYPES[request.recipe.precision]
        plan = plan_merge(checkpoint, base, sam2, alpha=alpha, capacity=sizes.capacity, dtype=dtype)
        tokenizer = extend_tokenizer(base.folder, base.language.vocabulary, NEW_TOKENS)
        prompt = _prompt(tokenizer, base)
        neighbours = find_neighbours(out, request.base, request.recipe)
        with hashing(base.files) as hashed:
            stages, cine, written, quantization = _write_stages(folder, plan, base, sam2, request.recipe, neighbours, sam2_stages)
            hashed()
        tokenizer.save(str(folder / prompt.tokenizer))
        files = _records(folder, written)
        engines = link_engines(folder, files, neighbours)
        bundle = Bundle(
            schema=SCHEMA,
            folder=folder,
            precision=request.recipe.precision,
            tiles=TileSpec(
                base.vision.image_size, _MIN_TILES, _MAX_TILES, _THUMBNAIL, base.vision.tokens_per_tile, _IMAGENET_MEAN, _IMAGENET_STD
            ),
            mask=MaskSpec(sam2.image_size, sam2.image_size // 4, _IMAGENET_MEAN, _IMAGENET_STD),
            prompt=prompt,
            language_model=LanguageModelSpec(
                base.language.layers,
                base.language.hidden_size,
                base.language.kv_heads,
                base.language.head_dim,
                plan.vocabulary,
                sizes.capacity,
                sizes.max_new_tokens,
            ),
            embed_tokens=EmbeddingTable("weights/embed_tokens.safetensors", "embed_tokens.weight"),
            stages=stages,
            cine=cine,
            provenance=_provenance(request, checkpoint, sha256.result(), alpha),
            files=files,
            quantization=quantization,
        )
        (folder / BUNDLE_FILE).write_text(bundle.to_json(), encoding="utf-8")
        fresh = [record.bytes for name, record in files.items() if name not in written]
        bytes_written = sum(fresh) + sum(file.bytes_written for file in written.values())
    reused = tuple(name for name, file in written.items() if file.bytes_written == 0)
    return Export(Bundle.load(request.out), bytes_written, reused, engines)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out}: exists; choose another --out, or replace it with --overwrite")
    if out.exists() and not (out / BUNDLE_FILE).is_file():
        raise CheckpointError(f"{out}: not a bundle, so --overwrite does not replace it; choose another --out")


def _alpha(checkpoint: Checkpoint, given: float | None) -> float:
    alpha = given if given is not None else checkpoint.lora_alpha
    if alpha is None:
        raise CheckpointError(
            f"{checkpoint.path}: does not record LoRA's alpha as one plain number; give it with --lora-alpha"
            f" (Sa2VA trains with 2 r = {2 * checkpoint.lora_rank})"
        )
    return alpha


def _check_recipe(recipe: Recipe, base: BaseModel) -> None:
    if recipe.weights and recipe.precision == "bf16":  # its scales would have 8 bits
        raise RecipeError(f'recipe {recipe.name}: weights = "{recipe.weights}" goes with the precisions fp32 and fp16, not with bf16')
    need = (_MAX_TILES + _THUMBNAIL) * base.vision.tokens_per_tile + MAX_TEXT_TOKENS + recipe.language_model.max_new_tokens
    capacity = recipe.language_model.capacity
    if not need <= capacity <= base.language.max_positions:
        raise RecipeError(
            f"recipe {recipe.name}: language_model.capacity is {capacity}; it must be from {need} ({_MAX_TILES + _THUMBNAIL} tiles, text"
            f" and answer) to {base.language.max_positions} (the model's positions)"
        )


def _write_stages(
    folder: Path,
    plan: MergePlan,
    base: BaseModel,
    sam2: Sam2,
    recipe: Recipe,
    neighbours: Sequence[Bundle],
    sam2_stages: SubprocessCall[..., Written],
) -> tuple[dict[str, StageSpec], CineSpec, dict[str, WrittenFile], Quantization | None]:
    """Write the weights, then the graphs that point into them. A child process traces and writes SAM2's stages, which takes long."""
    dtype = DTYPES[recipe.precision]
    graphs = [
        build_vision_encoder(base.vision, base.language.hidden_size, TO_IR[dtype]),
        build_language_model(base.language, plan.vocabulary, recipe.language_model.capacity, TO_IR[dtype]),
    ]
    _check_weights(graphs, plan.files, base)
    files, quantization = _quantize(graphs, plan.files, recipe, recipe.weights) if recipe.weights else (plan.files, None)
    older = {file: older_file(neighbours, file, file_size(tensors)) for file, tensors in files.items()}
    fresh = sum(file_size(tensors) for file, tensors in files.items() if older[file] is None)
    _check_space(folder, fresh + sum(tensor.numel() * dtype.itemsize for tensor in sam2.state_dict.values()))
    (folder / "weights").mkdir()
    trained = _as_arrays(plan.sam2_updates), _as_arrays(plan.prompt_head)
    sam2_stages.start(folder, sam2.path, *trained, recipe, neighbours)
    written: dict[str, WrittenFile] = {}
    total = sum(tensor.bytes for tensors in files.values() for tensor in tensors)
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=None) as bar:
        for file, tensors in files.items():
            written[file] = write_safetensors(folder, file, tensors, older=older[file], progress=bar.update)
    locations = {name: location for file in written.values() for name, location in file.locations.items()}
    stages = {graph.name: save_graph(graph, folder, locations) for graph in graphs}
    traced = sam2_stages.result()
    if quantization:
        matrices, kept = quantization.matrices | traced.matrices, traced.kept | quantization.kept
        quantization = Quantization(quantization.weights, matrices, kept)
    return stages | traced.stages, traced.cine, written | traced.files, quantization


def _quantize(
    graphs: Sequence[Graph], files: Mapping[str, Sequence[OutputTensor]], recipe: Recipe, weights: str
) -> tuple[dict[str, list[OutputTensor]], Quantization]:
    """Quantize the matrices of `graphs`, and of `files`, which are planned for them: in the form for CPUs if the activations are FP32."""
    kind = MatrixType.named(weights)
    form: Form = "MatMulNBits" if recipe.precision == "fp32" else "DequantizeLinear"
    matrices: dict[str, dict[str, int]] = {}
    kept: dict[str, str] = {}
    blocks: dict[str, int] = {}
    for graph in graphs:
        matrices[graph.name], reasons = quantize_graph(graph, kind, recipe.keep, form)
        kept |= reasons
        blocks |= matrices[graph.name]
    planned = {file: with_quantized(tensors, blocks, kind, form) for file, tensors in files.items()}
    return planned, Quantization(weights, matrices, kept)


def _as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors for the child process. NumPy has no BF16; FP32 holds it exactly."""
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def _check_weights(graphs: Sequence[Graph], files: Mapping[str, Sequence[OutputTensor]], base: BaseModel) -> None:
    """Compare the planned shapes, which come from the files, with the graphs', which come from config.json."""
    planned = {tensor.name: tensor.shape for tensors in files.values() for tensor in tensors}
    for value in (value for graph in graphs for value in graph.weights):
        shape = planned.get(str(value.name))
        if shape is None or list(shape) != list(value.shape or ()):
            raise BaseModelError(
                f"{base.folder}: {value.name} is {shape}, but {value.shape} by config.json; download the whole base model again"
            )


def _check_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(
            f"{folder.parent}: {free / 1e9:.1f} GB free, the bundle takes {need / 1e9:.1f}; free some, or choose another --out"
        )


def _prompt(tokenizer: Tokenizer, base: BaseModel) -> PromptSpec:
    return PromptSpec(
        tokenizer="tokenizer.json",
        prefix=_PREFIX,
        image_start=_IMAGE_START,
        image_token=_IMAGE_TOKEN,
        image_end=_IMAGE_END,
        suffix=_SUFFIX,
        default_question=_QUESTION,
        answers=_ANSWERS,
        image_token_id=_token_id(tokenizer, _IMAGE_TOKEN, base),
        seg_token_id=_token_id(tokenizer, NEW_TOKENS[0], base),
        stop_token_ids=tuple(_token_id(tokenizer, token, base) for token in _STOP_TOKENS),
    )


def _token_id(tokenizer: Tokenizer, token: str, base: BaseModel) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise BaseModelError(f"{base.folder}: its tokenizer lacks {token}; give --base an InternVL3 folder")
    return int(found)


def _provenance(request: ExportRequest, checkpoint: Checkpoint, sha256: str, alpha: float) -> Provenance:
    versions = {"vessel-rt": vessel_rt.__version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return Provenance(
        checkpoint=request.checkpoint.name,
        checkpoint_sha256=sha256,
        iteration=checkpoint.iteration,
        lora_rank=checkpoint.lora_rank,
        lora_alpha=alpha,
        base=request.base,
        sam2=request.sam2,
        recipe=request.recipe.name,
        skipped=request.skip,
        versions=versions,
    )


def _records(folder: Path, written: Mapping[str, WrittenFile]) -> dict[str, FileRecord]:
    """A record of every file of the bundle. Files that were hashed while they were written are not read again."""
    records = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        sha256 = written[name].sha256 if name in written else sha256_of(path)
        records[name] = FileRecord(path.stat().st_size, sha256)
    return records

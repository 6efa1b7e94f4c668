"""Export: checkpoint + base model + SAM2 + recipe -> a bundle, which appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import vessel_rt
from vessel_export.base_model import BaseModel, Sam2, open_base, open_sam2
from vessel_export.checkpoint import Checkpoint, open_checkpoint
from vessel_export.errors import BaseModelError, CheckpointError, RecipeError
from vessel_export.graphs.assemble import TO_IR, Graph, save_graph
from vessel_export.graphs.language_model import build_language_model
from vessel_export.graphs.sam2_image_encoder import trace_sam2_image_encoder
from vessel_export.graphs.sam2_mask_decoder import trace_sam2_mask_decoder
from vessel_export.graphs.vision_encoder import build_vision_encoder
from vessel_export.merge import NEW_TOKENS, MergePlan, plan_merge
from vessel_export.recipe import Recipe
from vessel_export.safetensors_writer import OutputTensor, TensorLocation, write_safetensors
from vessel_export.tokenizer import extend_tokenizer
from vessel_rt.bundle import (
    BUNDLE_FILE,
    Bundle,
    EmbeddingTable,
    FileRecord,
    LanguageModelSpec,
    MaskSpec,
    PromptSpec,
    Provenance,
    StageSpec,
    TileSpec,
    sha256_of,
)

__all__ = ["ExportRequest", "export_bundle"]

# Sa2VA's own constants, which the base model does not set: inference (modeling_sa2va_chat.py, templates.py), training (datasets/common.py).
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MIN_TILES, _MAX_TILES, _THUMBNAIL = 1, 12, True
_PREFIX, _SUFFIX = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
_IMAGE_START, _IMAGE_TOKEN, _IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
_STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
_QUESTION = "Please segment vessel in this image."
_ANSWERS = ("It is [SEG].", "Sure, [SEG].", "Sure, it is [SEG].", "Sure, the segmentation result is [SEG].", "[SEG].")
_TEXT_TOKENS = 256  # room in the cache for the question and the template around it

# TensorRT has a kernel for the fused Attention (opset 23) in FP16; on the CPU, where FP32 runs, the spelled-out form is faster.
_SAM2_OPSET = {"fp32": 20, "fp16": 23}

_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "sam2")


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """What to export. `base` and `sam2` are local paths or Hugging Face ids; `lora_alpha` goes before what the checkpoint tells;
    `skip` names tensors of the checkpoint to leave out."""

    checkpoint: Path
    base: str
    sam2: str
    out: Path
    recipe: Recipe
    lora_alpha: float | None = None
    skip: tuple[str, ...] = ()
    overwrite: bool = False


def export_bundle(request: ExportRequest) -> Bundle:
    """Make the bundle that `request` describes and return it, read back.

    Raises:
        VesselError: an input is missing, damaged, or does not fit the others; nothing is left behind.
    """
    out = request.out.absolute()
    _check_out(out, request.overwrite)
    checkpoint = open_checkpoint(request.checkpoint, request.skip)
    base, sam2 = open_base(request.base), open_sam2(request.sam2)
    _check_capacity(request.recipe, base)
    alpha = _alpha(checkpoint, request.lora_alpha)
    plan = plan_merge(checkpoint, base, sam2, alpha=alpha, capacity=request.recipe.capacity, dtype=request.recipe.dtype)
    tokenizer = extend_tokenizer(base.folder, base.language.vocabulary, NEW_TOKENS)
    prompt = _prompt(tokenizer, base)
    with _staging(out) as folder:
        tokenizer.save(str(folder / prompt.tokenizer))
        stages = _write_stages(folder, plan, base, sam2, request.recipe)
        bundle = Bundle(
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
                request.recipe.capacity,
                request.recipe.max_new_tokens,
            ),
            embed_tokens=EmbeddingTable("weights/embed_tokens.safetensors", "embed_tokens.weight"),
            stages=stages,
            provenance=_provenance(request, checkpoint, alpha),
            files=_records(folder),
        )
        (folder / BUNDLE_FILE).write_text(bundle.to_json(), encoding="utf-8")
    return Bundle.load(request.out)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out}: exists; choose another --out, or replace it with --overwrite")
    if out.exists() and not (out / BUNDLE_FILE).is_file():
        raise CheckpointError(f"{out}: not a bundle, so --overwrite leaves it alone; choose another --out")


def _alpha(checkpoint: Checkpoint, given: float | None) -> float:
    alpha = given if given is not None else checkpoint.lora_alpha
    if alpha is None:
        raise CheckpointError(
            f"{checkpoint.path}: does not tell LoRA's alpha; give it with --lora-alpha (Sa2VA trains with 2 r = {2 * checkpoint.lora_rank})"
        )
    return alpha


def _check_capacity(recipe: Recipe, base: BaseModel) -> None:
    need = (_MAX_TILES + _THUMBNAIL) * base.vision.tokens_per_tile + _TEXT_TOKENS + recipe.max_new_tokens
    if not need <= recipe.capacity <= base.language.max_positions:
        raise RecipeError(
            f"engines/{recipe.name}.toml: capacity {recipe.capacity} must be from {need} ({_MAX_TILES + _THUMBNAIL} tiles, text and answer)"
            f" to {base.language.max_positions} (the model's positions)"
        )


def _write_stages(folder: Path, plan: MergePlan, base: BaseModel, sam2: Sam2, recipe: Recipe) -> dict[str, StageSpec]:
    """Weights first, then the graphs that point into them."""
    dtype, opset = recipe.dtype, _SAM2_OPSET[recipe.precision]
    (folder / "weights").mkdir()
    graphs = [
        build_vision_encoder(base.vision, base.language.hidden_size, TO_IR[dtype]),
        build_language_model(base.language, plan.vocabulary, recipe.capacity, TO_IR[dtype]),
    ]
    files = dict(plan.files)
    sam2_model = sam2.build(plan.sam2_updates)
    traced: list[tuple[Graph, list[OutputTensor]]] = [
        trace_sam2_image_encoder(sam2_model, sam2.image_size, dtype, opset=opset),
        trace_sam2_mask_decoder(sam2_model, _prompt_head(plan), base.language.hidden_size, dtype, opset=opset),
    ]
    for graph, weights in traced:
        graphs.append(graph)
        files[f"weights/{graph.name}.safetensors"] = weights
    _check_weights(graphs, files, base)
    total = sum(tensor.bytes for tensors in files.values() for tensor in tensors)
    _check_space(folder, total)
    locations: dict[str, TensorLocation] = {}
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=None) as bar:
        for file, tensors in files.items():
            locations |= write_safetensors(folder, file, tensors, progress=bar.update)
    return {graph.name: save_graph(graph, folder, locations) for graph in graphs}


def _check_weights(graphs: Sequence[Graph], files: Mapping[str, Sequence[OutputTensor]], base: BaseModel) -> None:
    """Compare the planned shapes, which are the files' own, with the graphs', which come from config.json."""
    planned = {tensor.name: tensor.shape for tensors in files.values() for tensor in tensors}
    for value in (value for graph in graphs for value in graph.weights):
        shape = planned.get(str(value.name))
        if shape is None or list(shape) != list(value.shape or ()):
            raise BaseModelError(f"{base.folder}: {value.name} is {shape}, by config.json {value.shape}; download the base model whole")


def _check_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(f"{folder.parent}: {free / 1e9:.1f} GB free, the bundle takes {need / 1e9:.1f}; choose another --out")


def _prompt_head(plan: MergePlan) -> torch.nn.Sequential:
    hidden, narrow = plan.prompt_head["0.weight"].shape[0], plan.prompt_head["2.weight"].shape[0]
    head = torch.nn.Sequential(torch.nn.Linear(hidden, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, narrow))
    head.load_state_dict({name: tensor.float() for name, tensor in plan.prompt_head.items()}, strict=True)
    return head.eval()


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
        raise BaseModelError(f"{base.folder}: its tokenizer lacks {token}; it is not InternVL3's")
    return int(found)


def _provenance(request: ExportRequest, checkpoint: Checkpoint, alpha: float) -> Provenance:
    versions = {"vessel-rt": vessel_rt.__version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return Provenance(
        checkpoint=request.checkpoint.name,
        checkpoint_sha256=sha256_of(request.checkpoint),
        iteration=checkpoint.iteration,
        lora_rank=checkpoint.lora_rank,
        lora_alpha=alpha,
        base=request.base,
        sam2=request.sam2,
        recipe=request.recipe.name,
        skipped=request.skip,
        versions=versions,
    )


def _records(folder: Path) -> dict[str, FileRecord]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256_of(path)) for path in paths}


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block succeeds, and vanishes when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():  # a run was killed between its two renames
        os.replace(old, out)
    for leftover in (folder, old):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(folder, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

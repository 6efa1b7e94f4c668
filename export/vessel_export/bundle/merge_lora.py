"""LoRA merge: base model and checkpoint -> the graphs' weights, one tensor at a time.

A merged weight is `W + (B @ A) * alpha / r`, computed in FP32 and rounded once to the output dtype. Tensors of `modules_to_save` replace
the base model's. Matrices are stored transposed, [in, out], as the graphs' MatMul expects; norms and layer scales stay FP32.
Planning lists every output tensor and accounts for every tensor of the checkpoint. Values are computed later, piece by piece, while the
file is written. Does not know the graphs or the bundle's layout.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch

from vessel_export.errors import CheckpointError
from vessel_export.io.safetensors_writer import PIECE, ROWS, OutputTensor, in_pieces
from vessel_export.sources.base_model import BaseModel, Sam2
from vessel_export.sources.checkpoint import Checkpoint, faults_in
from vessel_export.sources.names import (
    LORA_TARGETS,
    MASK_DECODER_PREFIX,
    NEW_TOKENS,
    PROJECTOR_PREFIX,
    PROMPT_HEAD_PREFIX,
    SAM2_PREFIX,
    lora_pair,
    saved_module,
)

__all__ = ["MergePlan", "plan_merge"]

_HOST = {torch.bfloat16: torch.float32}  # the runtime reads embed_tokens with NumPy, which has no BF16; FP32 holds it exactly
_MOST_SHOWN = 12  # faults in one message


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """Every weight of a bundle: files of output tensors for the built graphs, state dicts for the traced SAM2 graphs."""

    files: dict[str, list[OutputTensor]]
    vocabulary: int
    sam2_updates: dict[str, torch.Tensor]
    prompt_head: dict[str, torch.Tensor]


def plan_merge(checkpoint: Checkpoint, base: BaseModel, sam2: Sam2, *, alpha: float, capacity: int, dtype: torch.dtype) -> MergePlan:
    """Plan the bundle's weights in `dtype`, for a cache of `capacity` tokens. Nothing is merged yet.

    Raises:
        CheckpointError: a tensor is missing, unknown, wrongly shaped, empty, NaN or infinite; every such tensor is named.
    """
    ledger = _Ledger(checkpoint)
    vocabulary = base.language.vocabulary + len(NEW_TOKENS)
    plan = MergePlan(
        files={
            "weights/vision_model.safetensors": _vision_model(base, dtype),
            "weights/projector.safetensors": _projector(ledger, base, dtype),
            "weights/language_model.safetensors": _language_model(ledger, base, vocabulary, alpha, dtype)
            + _rotary_tables(base, capacity)
            + _common_keys(base, capacity),
            "weights/embed_tokens.safetensors": _embedding(ledger, base, vocabulary, _HOST.get(dtype, dtype)),
        },
        vocabulary=vocabulary,
        sam2_updates=_sam2_updates(ledger, sam2),
        prompt_head=_prompt_head(ledger, base, sam2),
    )
    ledger.close()
    return plan


class _Ledger:
    """Hands out the checkpoint's tensors, once each, and records those that are missing, misshapen or left over."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.lora_rank = checkpoint.lora_rank
        self._left = dict(checkpoint.tensors)
        self._faults: list[str] = []

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Tensor `name`, or an empty tensor if it is missing or misshapen: `close` reports the fault."""
        tensor = self._left.pop(name, None)
        if tensor is None:
            self._faults.append(f"{name} is missing")
        elif tuple(tensor.shape) != shape:
            self._faults.append(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
        else:
            return tensor
        return torch.empty(0)

    def close(self) -> None:
        """Raise CheckpointError unless every tensor was handed out, in shape, and holds only finite values."""
        faults = self._faults + [f"{name} is unknown" for name in sorted(self._left)]
        # Values are read only if the names fit: a checkpoint of another model lacks every tensor.
        faults = faults or faults_in(self._checkpoint.tensors)
        if faults:
            more = f"; and {len(faults) - _MOST_SHOWN} more" if len(faults) > _MOST_SHOWN else ""
            raise CheckpointError(
                f"{self._checkpoint.path}: does not fit the base model, or is damaged: {'; '.join(faults[:_MOST_SHOWN])}{more};"
                " check --base and --sam2, or copy the checkpoint again (--skip NAME leaves out an unknown tensor)"
            )


def _stored(name: str, source: BaseModel, key: str, dtype: torch.dtype) -> OutputTensor:
    return OutputTensor(name, source.shape(key), dtype, lambda: in_pieces(source.tensor(key)))


def _transposed(name: str, source: BaseModel, key: str, dtype: torch.dtype) -> OutputTensor:
    rows, columns = source.matrix_shape(key)
    return OutputTensor(name, (columns, rows), dtype, lambda: in_pieces(source.tensor(key).T))


def _given(name: str, tensor: torch.Tensor, dtype: torch.dtype, *, transpose: bool = False) -> OutputTensor:
    value = tensor.T if transpose and tensor.ndim == 2 else tensor
    return OutputTensor(name, tuple(value.shape), dtype, lambda: in_pieces(value))


def _vision_model(base: BaseModel, dtype: torch.dtype) -> list[OutputTensor]:
    """InternViT, unchanged: norms and layer scales in FP32, embeddings' convolution and matrices in `dtype`."""
    f32 = torch.float32
    root = "vision_model.embeddings."
    tensors = [
        _stored("vision_model.embeddings.class_embedding", base, root + "class_embedding", f32),
        _stored("vision_model.embeddings.position_embedding", base, root + "position_embedding", f32),
        _stored("vision_model.embeddings.patch_embedding.weight", base, root + "patch_embedding.weight", dtype),
        _stored("vision_model.embeddings.patch_embedding.bias", base, root + "patch_embedding.bias", dtype),
    ]
    for i in range(base.vision.layers):
        source, target = f"vision_model.encoder.layers.{i}.", f"vision_model.layers.{i}."
        tensors += [
            _stored(target + part, base, source + part, f32) for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
        ]
        tensors += [_stored(target + part, base, source + part, f32) for part in ("ls1", "ls2")]
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            tensors.append(_transposed(f"{target}{part}.weight", base, f"{source}{part}.weight", dtype))
            to_residual = part in ("attn.proj", "mlp.fc2")  # their bias is added in FP32
            tensors.append(_stored(f"{target}{part}.bias", base, f"{source}{part}.bias", f32 if to_residual else dtype))
    return tensors


def _projector(ledger: _Ledger, base: BaseModel, dtype: torch.dtype) -> list[OutputTensor]:
    """mlp1: LayerNorm, Linear, GELU, Linear."""
    wide, hidden = base.vision.hidden_size * base.vision.downsample**2, base.language.hidden_size
    take = ledger.take
    return [
        _given("projector.norm.weight", take(PROJECTOR_PREFIX + "0.weight", (wide,)), torch.float32),
        _given("projector.norm.bias", take(PROJECTOR_PREFIX + "0.bias", (wide,)), torch.float32),
        _given("projector.linear_1.weight", take(PROJECTOR_PREFIX + "1.weight", (hidden, wide)), dtype, transpose=True),
        _given("projector.linear_1.bias", take(PROJECTOR_PREFIX + "1.bias", (hidden,)), dtype),
        _given("projector.linear_2.weight", take(PROJECTOR_PREFIX + "3.weight", (hidden, hidden)), dtype, transpose=True),
        _given("projector.linear_2.bias", take(PROJECTOR_PREFIX + "3.bias", (hidden,)), dtype),
    ]


def _language_model(ledger: _Ledger, base: BaseModel, vocabulary: int, alpha: float, dtype: torch.dtype) -> list[OutputTensor]:
    """Qwen2's layers with LoRA merged, the final norm, and the head that training saved whole."""
    hidden = base.language.hidden_size
    tensors = []
    for i in range(base.language.layers):
        for module in LORA_TARGETS:
            tensors.append(_merged(ledger, base, f"model.layers.{i}.{module}", f"layers.{i}.{module}.weight", alpha, dtype))
        root = f"language_model.model.layers.{i}."
        for name, kind in (("q_proj", torch.float32), ("k_proj", torch.float32), ("v_proj", dtype)):  # rotation is FP32
            tensors.append(_stored(f"layers.{i}.self_attn.{name}.bias", base, f"{root}self_attn.{name}.bias", kind))
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors.append(_stored(f"layers.{i}.{name}.weight", base, f"{root}{name}.weight", torch.float32))
    tensors.append(_stored("norm.weight", base, "language_model.model.norm.weight", torch.float32))
    head = ledger.take(saved_module("lm_head"), (vocabulary, hidden))
    tensors.append(_given("lm_head.weight", head, dtype, transpose=True))
    return tensors


def _rotary_tables(base: BaseModel, capacity: int) -> list[OutputTensor]:
    angles = _angles(base, capacity)
    return [_given("rotary_cos", angles.cos(), torch.float32), _given("rotary_sin", angles.sin(), torch.float32)]


def _angles(base: BaseModel, capacity: int) -> torch.Tensor:
    """[capacity, head_dim / 2], computed in FP32 as in transformers: the FP32 rounding of the angles is part of the model."""
    exponents = torch.arange(0, base.language.head_dim, 2, dtype=torch.int64).float() / base.language.head_dim
    return torch.outer(torch.arange(capacity).float(), 1.0 / (base.language.rope_theta**exponents))


def _common_keys(base: BaseModel, capacity: int) -> list[OutputTensor]:
    """For each layer, the average over all positions of what k_proj's bias adds to a key: [kv_heads * head_dim]."""
    turn = _angles(base, capacity)
    cos, sin = turn.cos().mean(0), turn.sin().mean(0)

    def common(key: str) -> Iterator[torch.Tensor]:
        first, second = base.tensor(key).float().reshape(base.language.kv_heads, 2, -1).unbind(1)
        yield torch.stack([first * cos - second * sin, second * cos + first * sin], dim=1).reshape(-1)

    tensors = []
    for i in range(base.language.layers):
        key = f"language_model.model.layers.{i}.self_attn.k_proj.bias"
        name = f"layers.{i}.self_attn.k_proj.common"
        tensors.append(OutputTensor(name, base.shape(key), torch.float32, functools.partial(common, key)))
    return tensors


def _merged(ledger: _Ledger, base: BaseModel, module: str, name: str, alpha: float, dtype: torch.dtype) -> OutputTensor:
    """One LoRA target, [in, out]: (W + (B @ A) * alpha / r).T with W [out, in], A [r, in], B [out, r]."""
    key = f"language_model.{module}.weight"
    out_features, in_features = base.matrix_shape(key)
    rank = ledger.lora_rank
    a_name, b_name = lora_pair(module)
    a, b = ledger.take(a_name, (rank, in_features)), ledger.take(b_name, (out_features, rank))

    def pieces() -> Iterator[torch.Tensor]:
        weight, narrow, wide = base.tensor(key), a.float(), b.float()
        step = max(1, PIECE // out_features // ROWS) * ROWS
        for start in range(0, in_features, step):
            columns = slice(start, start + step)
            yield weight[:, columns].float().addmm_(wide, narrow[:, columns], alpha=alpha / rank).T
        del weight
        base.drop_from_cache(key)

    return OutputTensor(name, (in_features, out_features), dtype, pieces)


def _embedding(ledger: _Ledger, base: BaseModel, vocabulary: int, dtype: torch.dtype) -> list[OutputTensor]:
    shape = (vocabulary, base.language.hidden_size)
    return [_given("embed_tokens.weight", ledger.take(saved_module("model.embed_tokens"), shape), dtype)]


def _sam2_updates(ledger: _Ledger, sam2: Sam2) -> dict[str, torch.Tensor]:
    """The trained mask decoder under the names of SAM2's own state dict."""
    names = [name for name in sam2.state_dict if (SAM2_PREFIX + name).startswith(MASK_DECODER_PREFIX)]
    return {name: ledger.take(SAM2_PREFIX + name, tuple(sam2.state_dict[name].shape)) for name in names}


def _prompt_head(ledger: _Ledger, base: BaseModel, sam2: Sam2) -> dict[str, torch.Tensor]:
    """text_hidden_fcs: Linear, ReLU, Linear, from the language model's width to SAM2's."""
    hidden, narrow = base.language.hidden_size, sam2.width
    shapes: dict[str, tuple[int, ...]] = {
        "0.weight": (hidden, hidden),
        "0.bias": (hidden,),
        "2.weight": (narrow, hidden),
        "2.bias": (narrow,),
    }
    return {name: ledger.take(PROMPT_HEAD_PREFIX + name, shape) for name, shape in shapes.items()}

"""The reference's modules: each is built by the library it was trained with and loaded strictly, by name, from the original files.

They are transformers' Qwen2ForCausalLM under peft, transformers' InternVLVisionModel and sam2's SAM2Base. Their parameters are the tensors
of the files, memory-mapped and in the files' dtypes. Shares no code and no names with base_model and merge_lora, which it checks. Does not
know the computation: that is reference.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from vessel_export.errors import BaseModelError, CheckpointError
from vessel_export.sources.checkpoint import Checkpoint
from vessel_export.sources.sam2_files import build_sam2, find_sam2_yaml, read_sam2_config, read_sam2_state
from vessel_rt.errors import first_line

__all__ = [
    "InternVL3",
    "load_language_model",
    "load_projector",
    "load_sam2",
    "load_text_hidden_fcs",
    "load_tokenizer",
    "load_vision_model",
    "open_internvl3",
    "widen_in_use",
]

SPECIAL_TOKENS = ("[SEG]", "<p>", "</p>", "<vp>", "</vp>")  # in the order of Sa2VA's training configuration, which determines their ids

# InternVisionModel's names -> those of transformers' InternVLVisionModel, in this order; qkv is split separately.
_VISION_NAMES = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("encoder.layers.", "encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
# Prefix in a base model's files -> the module it belongs to, by layout. mlp1 is trained, so the base model's is not used.
_ORIGINAL_PREFIXES = {"vision_model.": "vision.", "language_model.": "language.", "mlp1.": "mlp1."}
_HF_PREFIXES = {  # the published models have transformers 4's names; later versions save with the prefix `model.`
    "language_model.": "language.",
    "vision_tower.": "vision.",
    "multi_modal_projector.": "mlp1.",
    "model.language_model.": "language.model.",
    "model.vision_tower.": "vision.",
    "model.multi_modal_projector.": "mlp1.",
    "lm_head.": "language.lm_head.",
}


@dataclasses.dataclass(frozen=True)
class InternVL3:
    """A base model's folder, read: transformers' configurations, and memory-mapped tensors under transformers' names."""

    folder: Path
    vision_config: Any
    text_config: Any
    downsample_ratio: float
    vision: Mapping[str, Tensor]
    language: Mapping[str, Tensor]


def open_internvl3(folder: Path) -> InternVL3:
    """Read InternVL3 in its original layout (`internvl_chat`) or in the transformers-native one (`internvl`).

    Raises:
        BaseModelError: no such folder, another architecture, or tensors of unknown names.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise BaseModelError(f"{folder}: no base model here (config.json: {first_line(e)}); give --base an InternVL3 folder") from e
    if not isinstance(config, dict):
        raise BaseModelError(f"{folder}: config.json is not a JSON object; give --base an InternVL3 folder")
    original = config.get("model_type") == "internvl_chat"
    modules: dict[str, dict[str, Tensor]] = {"vision": {}, "language": {}, "mlp1": {}}
    prefixes = _ORIGINAL_PREFIXES if original else _HF_PREFIXES
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in _tensors(file).items():
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if prefix is None:
                raise BaseModelError(f"{file}: unexpected tensor {name}; give --base an InternVL3 model")
            module, _, key = (prefixes[prefix] + name.removeprefix(prefix)).partition(".")
            modules[module][key] = tensor
    try:
        vision_config, text_config = (_original_configs if original else _hf_configs)(folder, config)
        ratio = float(config["downsample_ratio"])
    except (KeyError, TypeError, ValueError) as e:
        raise BaseModelError(
            f"{folder}: config.json lacks a field of InternVL3, or has another type for it ({e}); download the base model again"
        ) from e
    vision = _as_transformers_vision(modules["vision"]) if original else modules["vision"]
    return InternVL3(folder, vision_config, text_config, ratio, vision, modules["language"])


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as e:
        raise BaseModelError(f"{file}: cannot be read ({first_line(e)}); download the whole base model again") from e


def load_tokenizer(base: InternVL3) -> Any:
    """The base model's tokenizer with Sa2VA's special tokens added.

    The `-hf` layout of InternVL3 has a `<video>` token with an id beyond the embedding's rows. It is removed: it would shift [SEG]'s id.

    Raises:
        BaseModelError: no tokenizer in the folder.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = base.text_config.vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, config=base.text_config, local_files_only=True)
    except (OSError, ValueError) as e:
        raise BaseModelError(f"{base.folder}: no tokenizer here ({first_line(e)}); copy the whole model folder") from e
    if len(tokenizer) > vocabulary:
        document = json.loads(tokenizer.backend_tokenizer.to_str())
        document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < vocabulary]
        fast: Any = PreTrainedTokenizerFast  # untyped
        tokenizer = fast(tokenizer_object=Tokenizer.from_str(json.dumps(document)))
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return tokenizer


def load_vision_model(base: InternVL3) -> nn.Module:
    """transformers' InternVLVisionModel."""
    from transformers import InternVLVisionModel

    with torch.device("meta"):
        module: nn.Module = InternVLVisionModel(base.vision_config)
    return _load_strictly(module, base.vision, f"{base.folder}: vision_model")


def load_projector(base: InternVL3, trained: Checkpoint) -> nn.Module:
    """Sa2VA's mlp1: [..., vision hidden * 4] -> [..., hidden]."""
    width, hidden = base.vision_config.hidden_size * round(1 / base.downsample_ratio) ** 2, base.text_config.hidden_size
    with torch.device("meta"):
        module = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    return _load_strictly(module, _under(trained.tensors, "mllm.model.mlp1."), f"{trained.path}: mlp1")


def load_text_hidden_fcs(hidden: int, mask_hidden: int, trained: Checkpoint) -> nn.Module:
    """Sa2VA's text_hidden_fcs (whose Dropout(0.0) holds nothing): [..., hidden] -> [..., SAM2's hidden]."""
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, mask_hidden))
    return _load_strictly(module, _under(trained.tensors, "text_hidden_fcs."), f"{trained.path}: text_hidden_fcs")


def load_language_model(base: InternVL3, trained: Checkpoint, *, lora_alpha: float | None, vocabulary: int) -> Any:
    """Qwen2ForCausalLM wrapped by peft: unmerged LoRA, with embed_tokens and lm_head replaced by the trained ones.

    `vocabulary` is the tokenizer's length, which both tables must have. `lora_alpha` overrides the checkpoint's.

    Raises:
        CheckpointError: alpha is unknown, or a table is missing or of another vocabulary.
        BaseModelError: a tensor is missing or unexpected, of the base model or of the LoRA.
    """
    import peft
    from peft.tuners.lora import LoraLayer
    from transformers import Qwen2ForCausalLM

    alpha = lora_alpha if lora_alpha is not None else trained.lora_alpha
    if alpha is None:
        raise CheckpointError(f"{trained.path}: LoRA's alpha is not recorded; give it with --lora-alpha")
    adapter = _under(trained.tensors, "mllm.model.language_model.")
    tables = {f"{name}.weight": adapter.get(f"base_model.model.{name}.weight") for name in ("model.embed_tokens", "lm_head")}
    for name, table in tables.items():
        if table is None or len(table) != vocabulary:
            found = "is missing" if table is None else f"has {len(table)} rows"
            raise CheckpointError(f"{trained.path}: {name} {found}; the tokenizer has {vocabulary} tokens; check --base")
    # The base model's own tables have another vocabulary and are not used: training replaced both.
    config = base.text_config
    config.vocab_size, config.tie_word_embeddings = vocabulary, False
    qwen2: Any = Qwen2ForCausalLM
    with torch.device("meta"):  # without values
        model = qwen2._from_config(config, attn_implementation="sdpa")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is computed, not loaded
    layers = {name: tensor for name, tensor in base.language.items() if name not in tables}
    _load_strictly(model, layers, f"{base.folder}: language_model", without=tables)
    lora: Any = peft.LoraConfig(
        r=trained.lora_rank,
        target_modules=sorted({match[1] for name in adapter if (match := re.search(r"\.(\w+)\.lora_A\.weight$", name))}),
        modules_to_save=["embed_tokens", "lm_head"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    lora.lora_alpha = alpha
    wrapped = peft.get_peft_model(model, lora, low_cpu_mem_usage=True)
    loaded: Any = peft.set_peft_model_state_dict(wrapped, adapter, low_cpu_mem_usage=True)
    missing = [name for name in loaded.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    _refuse_gaps(f"{trained.path}: language_model", missing, loaded.unexpected_keys)
    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # it would round what comes in to the type of the matrices in the file
    for table in (model.model.embed_tokens, model.lm_head):  # peft's wrappers: each also holds the module that it replaces
        table.original_module = table.modules_to_save["default"]
    return wrapped


def load_sam2(weights: Path, trained: Checkpoint) -> Any:
    """sam2's SAM2Base, built from its .yaml, with the weights of a .pt `{"model": state_dict}` and of the trained mask decoder.

    Raises:
        BaseModelError: no .yaml, one that names other classes than sam2's, an unreadable .pt, or tensors that do not fit.
    """
    config, state = read_sam2_config(find_sam2_yaml(weights)), read_sam2_state(weights)
    try:
        built: Any = build_sam2(config)
    except ValueError as e:
        raise BaseModelError(f"{weights}: {e}; check --sam2 and its .yaml") from e
    model: Any = _load_strictly(built, state, str(weights))
    mask_decoder = _under(trained.tensors, "grounding_encoder.sam2_model.sam_mask_decoder.")
    _load_strictly(model.sam_mask_decoder, mask_decoder, f"{trained.path}: sam_mask_decoder")
    return model


def widen_in_use(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Leave the parameters of `module` as they are, in their files, and convert each to `dtype` only while its own module computes.

    At most one matrix is in memory, and the numbers are those of the module converted as a whole. Rows of an embedding are converted after
    they were looked up. Code that uses a parameter outside the `forward` of the module that holds it gets the parameter as it is.
    """
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.register_forward_hook(lambda _part, _inputs, rows: rows.to(dtype))
        elif own := {name: parameter for name, parameter in part.named_parameters(recurse=False) if parameter.dtype != dtype}:
            _widen_alone(part, own, dtype)
    return module


def _widen_alone(part: nn.Module, own: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
    def widen(*_: Any) -> None:
        for name, parameter in own.items():
            setattr(part, name, nn.Parameter(parameter.to(dtype), requires_grad=False))

    def restore(*_: Any) -> None:
        for name, parameter in own.items():
            setattr(part, name, parameter)

    part.register_forward_pre_hook(widen)
    part.register_forward_hook(restore, always_call=True)


def _original_configs(folder: Path, config: Mapping[str, Any]) -> tuple[Any, Any]:
    from transformers import InternVLVisionConfig, Qwen2Config

    if config.get("ps_version") != "v2" or config.get("select_layer") != -1:
        found = f"ps_version {config.get('ps_version')}, select_layer {config.get('select_layer')}"
        raise BaseModelError(f"{folder}: {found}; InternVL3 has v2 and -1, check --base")
    vision = config["vision_config"]
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "norm_type", "layer_norm_eps")
    vision_config = InternVLVisionConfig(
        **{name: vision[name] for name in (*same, "image_size", "patch_size")},
        attention_bias=vision["qkv_bias"],
        use_qk_norm=vision["qk_normalization"],
    )
    return vision_config, Qwen2Config.from_dict(config["llm_config"])


def _hf_configs(folder: Path, config: Mapping[str, Any]) -> tuple[Any, Any]:
    from transformers import InternVLVisionConfig, Qwen2Config

    if config.get("model_type") != "internvl" or config.get("vision_feature_layer", -1) != -1:
        raise BaseModelError(f"{folder}: model_type {config.get('model_type')}; InternVL3's are internvl_chat and internvl, check --base")
    return InternVLVisionConfig.from_dict(config["vision_config"]), Qwen2Config.from_dict(config["text_config"])


def _as_transformers_vision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """InternVisionModel's tensors under transformers' names, with qkv split in three."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in _VISION_NAMES:
            name = name.replace(old, new)
        if ".attention.qkv." in name:
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{letter}_proj.")] = rows
        else:
            renamed[name] = tensor
    return renamed


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], what: str, *, without: Collection[str] = ()) -> nn.Module:
    """`module` with `tensors` themselves, in their dtypes. Every name, except those in `without`, and every shape must match."""
    expected = {name: tensor for name, tensor in module.state_dict().items() if name not in without}
    _refuse_gaps(what, expected.keys() - tensors.keys(), tensors.keys() - expected.keys())
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise BaseModelError(
                f"{what}: {name} is {list(tensor.shape)}, not {list(expected[name].shape)}; check --base, --sam2 and --ckpt"
            )
    module.load_state_dict(dict(tensors), strict=False, assign=True)
    return module


def _refuse_gaps(what: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    faults = [f"lacks {name}" for name in sorted(missing)] + [f"has unexpected {name}" for name in sorted(unexpected)]
    if faults:
        raise BaseModelError(f"{what} {', '.join(faults)}; give the --base and --sam2 that the checkpoint was trained on")

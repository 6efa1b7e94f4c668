"""Files in the formats of the real thing: an InternVL3 folder, a SAM2 checkpoint, and what mmengine saves after a Sa2VA fine-tune."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from conversation import SPECIAL_TOKENS, corpus
from model import TinyConfig, VisionLanguageModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer

from vessel_export.sources.torch_file import read_torch_file

__all__ = [
    "load_base", "load_finetuned", "load_sam2", "load_tokenizer", "save_base", "save_finetuned", "save_sam2", "write_tokenizer",
]  # fmt: skip

_QWEN2_SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

_QWEN2_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
_PLAIN_TOKENS = frozenset(_QWEN2_TOKENS[14:])
"""Qwen2.5 adds these without marking them special."""
_INTERNVL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, merges: int) -> None:
    """A byte-level BPE in the five files that InternVL3-8B ships (and, as there, no tokenizer.json)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    bpe.train_from_iterator(corpus(), trainer)
    bpe.model.save(str(folder))

    special = [t for t in (*_QWEN2_TOKENS, *_INTERNVL_TOKENS) if t not in _PLAIN_TOKENS and t != "<|endoftext|>"]
    first = bpe.get_vocab_size()
    added = {token: first + i for i, token in enumerate((*_QWEN2_TOKENS, *_INTERNVL_TOKENS))}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write_json(folder / "added_tokens.json", added)
    _write_json(folder / "special_tokens_map.json", {
        "additional_special_tokens": special,
        "eos_token": {"content": "<|im_end|>", **flags},
        "pad_token": {"content": "<|endoftext|>", **flags},
    })  # fmt: skip
    _write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": t, **flags, "special": t not in _PLAIN_TOKENS} for t, i in added.items()},
        "additional_special_tokens": special,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    })  # fmt: skip


def load_tokenizer(base: Path, *, finetuned: bool) -> Any:
    """The folder's tokenizer; `finetuned` adds Sa2VA's five tokens."""
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    if finetuned:
        tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return tokenizer


def _internvl_config(config: TinyConfig, vocabulary: int, ids: dict[str, int]) -> dict[str, Any]:
    """config.json of the original InternVL3 layout."""
    llm = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"], "use_cache": False, "use_sliding_window": False, "sliding_window": None,
        "max_window_layers": config.layers, "rope_scaling": None, "torch_dtype": "bfloat16", "attn_implementation": "flash_attention_2",
        **config.qwen2(vocabulary),
    }  # fmt: skip
    vision = {
        "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "attention_dropout": 0.0, "drop_path_rate": 0.1,
        "dropout": 0.0, "hidden_act": "gelu", "hidden_size": config.vision_hidden, "image_size": config.image_size,
        "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": config.vision_intermediate, "layer_norm_eps": 1e-06,
        "norm_type": "layer_norm", "num_attention_heads": config.vision_heads, "num_channels": 3,
        "num_hidden_layers": config.vision_layers, "patch_size": config.patch_size, "qk_normalization": False, "qkv_bias": True,
        "torch_dtype": "bfloat16", "use_bfloat16": True, "use_flash_attn": True,
    }  # fmt: skip
    return {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5, "dynamic_image_size": True,
        "force_image_size": config.image_size, "hidden_size": config.hidden, "llm_config": llm, "max_dynamic_patch": 12,
        "min_dynamic_patch": 1, "output_attentions": False, "pad2square": False, "ps_version": "v2", "select_layer": -1,
        "template": "internvl2_5", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_backbone_lora": 0, "use_llm_lora": 0,
        "use_thumbnail": True, "vision_config": vision,
    }  # fmt: skip


def round_to_bfloat16(module: nn.Module) -> None:
    """Leave float32 parameters with values that bfloat16 holds exactly: what a file keeps is what training goes on with."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16().float())


def save_base(folder: Path, model: VisionLanguageModel, config: TinyConfig, tokenizer: Any) -> None:
    """`model` as an InternVL3 folder in bf16, beside the tokenizer's files that are there already; the model is rounded too."""
    round_to_bfloat16(model)
    ids = tokenizer.get_vocab()
    _write_json(folder / "config.json", _internvl_config(config, len(tokenizer), ids))
    _write_json(folder / "generation_config.json", {"_from_model_config": True, "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]})
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_base(folder: Path, config: TinyConfig) -> VisionLanguageModel:
    """The model of an InternVL3 folder, in float32."""
    vocabulary = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["llm_config"]["vocab_size"])
    model = VisionLanguageModel(config, vocabulary)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return model


def save_sam2(path: Path, sam2: nn.Module) -> None:
    """`{"model": ...}` as Meta publishes SAM2, in bf16 to keep the repository small; the model is rounded too."""
    round_to_bfloat16(sam2)
    torch.save({"model": OrderedDict((n, t.bfloat16() if t.is_floating_point() else t) for n, t in sam2.state_dict().items())}, path)


def load_sam2(path: Path, sam2: nn.Module) -> None:
    """Fill `sam2` from a SAM2 checkpoint."""
    state = torch.load(path, weights_only=True)["model"]
    sam2.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()})


def _training_config(config: TinyConfig, iterations: int, seed: int) -> Any:
    """The fine-tune as mmengine would describe it, in the manner of Sa2VA's projects/sa2va/configs/sa2va_finetune.py."""
    from mmengine.config import Config  # type: ignore[import-untyped]

    base, template = "base", "qwen_chat"
    tokenizer = {
        "type": "transformers.AutoTokenizer.from_pretrained", "pretrained_model_name_or_path": base, "trust_remote_code": True,
        "padding_side": "right",
    }  # fmt: skip
    lora = {
        "type": "peft.LoraConfig", "r": config.lora_rank, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout,
        "bias": "none", "task_type": "CAUSAL_LM", "modules_to_save": ["embed_tokens", "lm_head"],
    }  # fmt: skip
    return Config({
        "path": base,
        "template": template,
        "max_length": 8192,
        "special_tokens": list(SPECIAL_TOKENS),
        "tokenizer": tokenizer,
        "extra_image_processor": {"type": "projects.sa2va.models.DirectResize", "target_length": 512},
        "model": {
            "type": "projects.sa2va.models.Sa2VAModel",
            "special_tokens": list(SPECIAL_TOKENS),
            "frozen_sam2_decoder": False,
            "mllm": {
                "type": "projects.sa2va.models.InternVLMLLM", "model_path": base, "freeze_llm": True, "freeze_visual_encoder": True,
                "llm_lora": lora,
            },
            "tokenizer": tokenizer,
            "grounding_encoder": {
                "type": "projects.sa2va.models.SAM2TrainRunner", "cfg_path": "sam2_tiny.yaml", "ckpt_path": "sam2_tiny.pt",
            },
            "loss_mask": {
                "type": "third_parts.mmdet.models.losses.CrossEntropyLoss", "use_sigmoid": True, "reduction": "mean", "loss_weight": 3.0,
            },
            "loss_dice": {
                "type": "third_parts.mmdet.models.losses.DiceLoss", "use_sigmoid": True, "activate": True, "reduction": "mean",
                "naive_dice": True, "eps": 1.0, "loss_weight": 1.0,
            },
        },
        "optim_wrapper": {
            "type": "mmengine.optim.AmpOptimWrapper", "dtype": "bfloat16",
            "optimizer": {"type": "torch.optim.AdamW", "lr": 0.001, "betas": (0.9, 0.999), "weight_decay": 0.05},
            "clip_grad": {"max_norm": 1, "error_if_nonfinite": False},
        },
        "train_cfg": {"type": "xtuner.engine.runner.TrainLoop", "max_iters": iterations},
        "default_hooks": {
            "checkpoint": {
                "type": "mmengine.hooks.CheckpointHook", "save_optimizer": False, "by_epoch": False, "interval": iterations,
                "max_keep_ckpts": 2,
            },
        },
        "randomness": {"seed": seed, "deterministic": False},
    })  # fmt: skip


def save_finetuned(
    path: Path, model: VisionLanguageModel, fcs: nn.Module, sam2: Any, config: TinyConfig, losses: list[dict[str, float]], seed: int
) -> None:
    """What training changed, as mmengine saves it after a Sa2VA fine-tune: bf16 `state_dict`, `meta` and `message_hub`, no optimizer."""
    import mmengine  # type: ignore[import-untyped]
    from mmengine.logging import MessageHub  # type: ignore[import-untyped]
    from mmengine.runner import save_checkpoint  # type: ignore[import-untyped]

    state = {f"mllm.model.language_model.{n}": t for n, t in get_peft_model_state_dict(model.language_model).items()}
    state |= {f"mllm.model.mlp1.{n}": t for n, t in model.mlp1.state_dict().items()}
    state |= {f"grounding_encoder.sam2_model.sam_mask_decoder.{n}": t for n, t in sam2.sam_mask_decoder.state_dict().items()}
    state |= {f"text_hidden_fcs.{n}": t for n, t in fcs.state_dict().items()}

    hub = MessageHub.get_instance("sa2va_tiny")
    for step in losses:
        for name, value in step.items():
            hub.update_scalar(f"train/{name}", value)
    hub.update_info("epoch", 0)
    hub.update_info("iter", len(losses))
    hub.update_info("max_iters", len(losses))
    meta = {
        "epoch": 0,
        "iter": len(losses),
        "cfg": _training_config(config, len(losses), seed).pretty_text,
        "seed": seed,
        "experiment_name": "sa2va_tiny",
        "time": time.strftime("%Y%m%d_%H%M%S"),
        "mmengine_version": mmengine.__version__,
        "dataset_meta": {},
    }
    checkpoint = {
        "meta": meta,
        "state_dict": OrderedDict((n, t.detach().bfloat16().contiguous().clone()) for n, t in state.items()),
        "message_hub": hub.state_dict(),
    }
    save_checkpoint(checkpoint, str(path))


def load_finetuned(path: Path, model: VisionLanguageModel, fcs: nn.Module, sam2: Any) -> None:
    """Put a checkpoint written by `save_finetuned` into a model that carries LoRA."""
    file = read_torch_file(path, check_values=True)
    state = {n: file.tensor(t).float() for n, t in file.document["state_dict"].items()}

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    problems: Any = set_peft_model_state_dict(model.language_model, under("mllm.model.language_model."))
    if problems.unexpected_keys:
        raise ValueError(f"{path}: unexpected {problems.unexpected_keys}")
    model.mlp1.load_state_dict(under("mllm.model.mlp1."))
    fcs.load_state_dict(under("text_hidden_fcs."))
    sam2.sam_mask_decoder.load_state_dict(under("grounding_encoder.sam2_model.sam_mask_decoder."))

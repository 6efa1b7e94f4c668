"""The files of a random model in the real formats: config.json and tokenizer.json of InternVL3, SAM2's .pt, mmengine's .pth.

The .pt and the .pth are written from tensors that are mapped from a file, so that none is in memory. Does not know how values are drawn.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.overrides import TorchFunctionMode

from vessel_export.io.safetensors_writer import OutputTensor, write_safetensors
from vessel_export.sources.base_config import LanguageConfig, VisionConfig
from vessel_export.sources.sam2_files import build_sam2, parse_sam2_config

__all__ = [
    "ADDED_TOKENS", "ANSWER_END", "FIRST_TOKEN", "PROMPT_END", "base_config", "mapped", "sam2_shapes", "save_checkpoint", "save_sam2",
    "token_id", "write_tokenizer",
]  # fmt: skip

# Qwen2.5's tokens, then InternVL's. They have the last ids of the vocabulary, as in InternVL3-8B.
ADDED_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip
FIRST_TOKEN, PROMPT_END, ANSWER_END = (
    "<|im_start|>",
    "\u010a",
    "<|im_end|>",
)  # a prompt ends with a line feed, here as byte-level BPE writes it

_QWEN2_SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

# The LoRA part of Sa2VA's training configuration, as mmengine stores it in `meta`.
_TRAINING_CONFIG = """model = dict(
    mllm=dict(
        freeze_llm=True,
        freeze_visual_encoder=True,
        llm_lora=dict(
            bias='none',
            lora_alpha={alpha},
            lora_dropout=0.05,
            modules_to_save=[
                'embed_tokens',
                'lm_head',
            ],
            r={rank},
            task_type='CAUSAL_LM',
            type='peft.LoraConfig'),
        type='projects.sa2va.models.InternVLMLLM'),
    type='projects.sa2va.models.Sa2VAModel')
"""
_ITERATION = 12192


def base_config(v: VisionConfig, c: LanguageConfig) -> dict[str, Any]:
    """InternVL3's config.json without the fields that name code or describe training."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 1 / v.downsample,
        "dynamic_image_size": True,
        "force_image_size": v.image_size,
        "hidden_size": c.hidden_size,
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": token_id("<|endoftext|>", c.vocabulary),
            "eos_token_id": token_id("<|endoftext|>", c.vocabulary),
            "head_dim": c.head_dim,
            "hidden_act": "silu",
            "hidden_size": c.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": c.intermediate_size,
            "max_position_embeddings": c.max_positions,
            "max_window_layers": 70,
            "model_type": "qwen2",
            "num_attention_heads": c.heads,
            "num_hidden_layers": c.layers,
            "num_key_value_heads": c.kv_heads,
            "rms_norm_eps": c.norm_eps,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "rope_theta": c.rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "use_sliding_window": False,
            "vocab_size": c.vocabulary,
        },
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": v.hidden_size,
            "image_size": v.image_size,
            "intermediate_size": v.intermediate_size,
            "layer_norm_eps": v.norm_eps,
            "model_type": "intern_vit_6b",
            "norm_type": "layer_norm",
            "num_attention_heads": v.heads,
            "num_channels": 3,
            "num_hidden_layers": v.layers,
            "patch_size": v.patch_size,
            "qk_normalization": False,
            "qkv_bias": True,
            "torch_dtype": "bfloat16",
            "use_bfloat16": True,
        },
    }


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """tokenizer.json and tokenizer_config.json of a Qwen2 tokenizer with exactly `vocabulary` tokens.

    Byte-level BPE with Qwen2's rules. Its merges are all pairs of bytes, then pairs with a third byte, up to `vocabulary` tokens.
    """
    letters = _letters()
    pairs = list(itertools.product(letters, letters))
    triples = ((first + second, third) for (first, second), third in itertools.product(pairs, letters))
    merges = list(itertools.islice(itertools.chain(pairs, triples), _first_added(vocabulary) - len(letters)))
    tokens = [*letters, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(ADDED_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 12288,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def token_id(token: str, vocabulary: int) -> int:
    """The id of an added token or of a byte in the tokenizer of `write_tokenizer` for `vocabulary`."""
    return _first_added(vocabulary) + ADDED_TOKENS.index(token) if token in ADDED_TOKENS else _letters().index(token)


def _first_added(vocabulary: int) -> int:
    return vocabulary - len(ADDED_TOKENS)


def _letters() -> list[str]:
    """The 256 bytes as byte-level BPE writes them, in Qwen2's order."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


@functools.cache
def sam2_shapes(config: str) -> Mapping[str, tuple[int, ...]]:
    """The shapes of the state dict of the SAM2 that a sam2 .yaml describes."""
    with _WithoutWeights():
        module = build_sam2(parse_sam2_config(config))
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


class _WithoutWeights(TorchFunctionMode):
    """Creates weights, which all start as torch.empty, on the meta device. sam2 reads the values of other tensors while it builds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        extra = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **(kwargs or {}) | extra)


@contextlib.contextmanager
def mapped(folder: Path, tensors: Sequence[OutputTensor], progress: Callable[[int], object]) -> Iterator[dict[str, torch.Tensor]]:
    """`tensors`, each with its own storage, mapped from a scratch file in `folder`."""
    scratch = folder / ".scratch.safetensors"
    try:
        written = write_safetensors(folder, scratch.name, tensors, progress=progress)
        state = {}
        for tensor in tensors:
            location = written.locations[tensor.name]
            data = np.memmap(scratch, np.uint8, "c", location.offset, (location.length,))
            state[tensor.name] = torch.from_numpy(data).view(tensor.dtype).reshape(tensor.shape)
        yield state
    finally:
        scratch.unlink(missing_ok=True)


def save_sam2(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a .pt in Meta's format."""
    torch.save({"model": OrderedDict(state)}, path)


def save_checkpoint(path: Path | BinaryIO, state: Mapping[str, torch.Tensor], *, rank: int, alpha: float | None) -> None:
    """Write what mmengine's CheckpointHook saves of a Sa2VA fine-tune, without an optimizer. `alpha` None leaves out the configuration."""
    meta = {
        "epoch": 0,
        "iter": _ITERATION,
        "cfg": "" if alpha is None else _TRAINING_CONFIG.format(rank=rank, alpha=alpha),
        "seed": 0,
        "experiment_name": "sa2va_finetune",
        "time": "20250101_000000",
        "mmengine_version": "0.10.7",
        "dataset_meta": {},
    }
    with _mmengine_by_name():
        names = ("train/llm_loss", "train/loss_mask", "train/loss_dice")
        losses = OrderedDict((name, _HistoryBuffer(1 / np.arange(1.0, 101.0))) for name in names)
        info = OrderedDict(epoch=0, iter=_ITERATION, max_iters=_ITERATION)
        message_hub = {"log_scalars": losses, "runtime_info": info, "resumed_keys": OrderedDict.fromkeys((*losses, *info), True)}
        torch.save({"meta": meta, "state_dict": OrderedDict(state), "message_hub": message_hub}, path)


class _HistoryBuffer:
    """mmengine's log of one scalar in pickled form: two arrays, and its methods by name."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.max_length = 1_000_000
        self._log_history = values
        self._count_history = np.ones_like(values)
        self.statistics_methods = {name: _Method(name) for name in ("min", "max", "current", "mean")}


class _Method:
    """Pickles as a method of `_HistoryBuffer`, with a call of getattr, as Python does."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> tuple[Any, tuple[type, str]]:
        return getattr, (_HistoryBuffer, self._name)


@contextlib.contextmanager
def _mmengine_by_name() -> Iterator[None]:
    """Provide modules with mmengine's names while something is pickled: a pickle names a class by its module."""
    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    installed = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules.update({name: types.ModuleType(name) for name in names})
    vars(sys.modules[names[-1]])["HistoryBuffer"] = _HistoryBuffer
    _HistoryBuffer.__module__, _HistoryBuffer.__qualname__ = names[-1], "HistoryBuffer"
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(installed)

"""The names of a checkpoint's tensors, in the spelling of `checkpoint.canonical_name`. Does not know files, shapes or values."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = [
    "LORA_PREFIX",
    "LORA_TARGETS",
    "MASK_DECODER_PREFIX",
    "NEW_TOKENS",
    "PROJECTOR_PREFIX",
    "PROMPT_HEAD_PREFIX",
    "SAM2_PREFIX",
    "TRAINED_GROUPS",
    "expected_tensors",
    "group_of",
    "lora_layer",
    "lora_pair",
    "saved_module",
]

NEW_TOKENS = ("[SEG]", "<p>", "</p>", "<vp>", "</vp>")  # Sa2VA's fine-tuning appends them to the vocabulary, in this order

LORA_PREFIX = "mllm.model.language_model.base_model.model."  # peft and Sa2VA put it before a language-model module's own name
PROJECTOR_PREFIX = "mllm.model.mlp1."
PROMPT_HEAD_PREFIX = "text_hidden_fcs."
SAM2_PREFIX = "grounding_encoder.sam2_model."
MASK_DECODER_PREFIX = SAM2_PREFIX + "sam_mask_decoder."

# The modules of a language-model layer that LoRA adapts.
LORA_TARGETS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
_SAVED_MODULES = ("model.embed_tokens", "lm_head")  # peft's modules_to_save
_LORA = re.compile(re.escape(LORA_PREFIX) + r"model\.layers\.(\d+)\.((?:self_attn|mlp)\.\w+)\.lora_[AB]\.weight")

# Group of trained tensors -> the part of the model that it belongs to.
TRAINED_GROUPS = {
    "LoRA": "the language model's adapter",
    "modules_to_save": "embed_tokens and lm_head, whole",
    "projector": "mlp1, from image tokens to the language model",
    "prompt head": "text_hidden_fcs, from [SEG] to SAM2",
    "SAM2 mask decoder": "sam_mask_decoder",
}


def lora_pair(module: str) -> tuple[str, str]:
    """LoRA's A and B of a module of the language model, such as `model.layers.0.mlp.up_proj`."""
    return f"{LORA_PREFIX}{module}.lora_A.weight", f"{LORA_PREFIX}{module}.lora_B.weight"


def saved_module(module: str) -> str:
    """The weight of a module that training saved whole: `model.embed_tokens` or `lm_head`."""
    return f"{LORA_PREFIX}{module}.weight"


def lora_layer(name: str) -> tuple[int, str] | None:
    """The layer and the module (`self_attn.q_proj`) that the LoRA tensor `name` belongs to; None for other tensors."""
    match = _LORA.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def group_of(name: str) -> str | None:
    """The group of TRAINED_GROUPS that the tensor `name` belongs to; None if it belongs to none."""
    if lora_layer(name):
        return "LoRA"
    if name.startswith(MASK_DECODER_PREFIX):
        return "SAM2 mask decoder"
    return next((group for group, names in expected_tensors(layers=0).items() if name in names), None)


def expected_tensors(layers: int) -> dict[str, tuple[str, ...]]:
    """The tensors that a checkpoint of a model with `layers` language-model layers must have, by group.

    SAM2's mask decoder is left out: its tensors are those of the SAM2 checkpoint.
    """
    return {
        "LoRA": tuple(_lora_names(layers)),
        "modules_to_save": tuple(map(saved_module, _SAVED_MODULES)),
        "projector": tuple(f"{PROJECTOR_PREFIX}{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")),
        "prompt head": tuple(f"{PROMPT_HEAD_PREFIX}{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    }


def _lora_names(layers: int) -> Iterator[str]:
    for layer in range(layers):
        for target in LORA_TARGETS:
            yield from lora_pair(f"model.layers.{layer}.{target}")

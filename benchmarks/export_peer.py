"""The peer of `benchmarks.export`: the language model merged by peft and traced by torch, as without this project.

    python -m benchmarks.export_peer MODEL LAYERS OUT

Loads the first LAYERS layers of the synthetic model in bf16, applies its LoRA with peft, merges, converts to FP16, and exports the language
model from embeddings to logits and KV cache with torch.onnx. Leaves out vision, SAM2, the tokenizer and all checks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import AutoConfig, DynamicCache, Qwen2ForCausalLM

from vessel_export.sources.base_model import open_base
from vessel_export.sources.checkpoint import open_checkpoint
from vessel_export.sources.names import LORA_PREFIX, LORA_TARGETS, saved_module


class _Prefill(torch.nn.Module):
    """inputs_embeds [batch, sequence, hidden] -> logits, and each layer's keys and values."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        logits = self.model(inputs_embeds=inputs_embeds, past_key_values=cache, use_cache=True).logits
        caches: list[Any] = list(cache.layers)
        return (logits, *(tensor for layer in caches for tensor in (layer.keys, layer.values)))


def main() -> None:
    folder, layers, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    [file] = folder.glob("iter_*.pth")
    base, state = open_base(str(folder / "base")), open_checkpoint(file).tensors
    config: Any = AutoConfig.for_model("qwen2", **_sizes(base.language, layers))
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    weights = {name: base.tensor(f"language_model.{name}") for name, _ in model.named_parameters()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is a buffer, not in any checkpoint
    model.resize_token_embeddings(state[saved_module("lm_head")].shape[0], mean_resizing=False)
    targets = [module.rpartition(".")[2] for module in LORA_TARGETS]
    lora = LoraConfig(r=64, lora_alpha=128, target_modules=targets, modules_to_save=["embed_tokens", "lm_head"])
    adapted = get_peft_model(model, lora)
    prefix = LORA_PREFIX.removesuffix("base_model.model.")
    ours = {
        name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(LORA_PREFIX) and _is_loaded(name, layers)
    }
    set_peft_model_state_dict(adapted, ours)
    merged = adapted.merge_and_unload().half().eval()
    out.mkdir(parents=True)
    torch.onnx.export(
        _Prefill(merged),
        (torch.zeros(1, 64, config.hidden_size, dtype=torch.float16),),
        out / "language_model.onnx",
        dynamo=True,
        external_data=True,
        input_names=["inputs_embeds"],
        dynamic_shapes=({1: torch.export.Dim("sequence", min=2, max=4096)},),
    )


def _is_loaded(name: str, layers: int) -> bool:
    """Whether the tensor belongs to the first `layers` layers, or to none."""
    _, _, layer = name.partition(".layers.")
    return not layer or int(layer.partition(".")[0]) < layers


def _sizes(language: Any, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": language.hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "intermediate_size": language.intermediate_size,
        "vocab_size": language.vocabulary,
        "rope_theta": language.rope_theta,
        "rms_norm_eps": language.norm_eps,
        "max_position_embeddings": language.max_positions,
        "tie_word_embeddings": False,
    }


if __name__ == "__main__":
    main()

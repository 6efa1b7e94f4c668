"""Random models of any size in the real formats: an InternVL3 folder, a SAM 2.0 file, a fine-tuned checkpoint."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from vessel_export.base_model import LanguageConfig, VisionConfig
from vessel_export.checkpoint import LORA_PREFIX
from vessel_export.merge import NEW_TOKENS

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
VOCABULARY = 256 + len(_SPECIAL)

VISION = VisionConfig(
    layers=2, hidden_size=32, heads=2, intermediate_size=64, image_size=112, patch_size=14, norm_eps=1e-6, downsample=2
)  # fmt: skip
LANGUAGE = LanguageConfig(
    layers=2, hidden_size=48, heads=6, kv_heads=2, head_dim=16, intermediate_size=80, vocabulary=VOCABULARY, rope_theta=1e6, norm_eps=1e-6,
    max_positions=32768,
)  # fmt: skip
SAM2_CHANNELS = 32


def _random(*shape: int, scale: float | None = None) -> torch.Tensor:
    scale = (shape[-1] ** -0.5 if len(shape) > 1 else 0.1) if scale is None else scale
    return (torch.randn(*shape) * scale).to(torch.bfloat16)


def write_base(folder: Path, vision: VisionConfig = VISION, language: LanguageConfig = LANGUAGE, seed: int = 0) -> Path:
    """An InternVL3 folder in the original layout, bf16."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    v, c = vision, language
    wide = v.hidden_size * v.downsample**2
    tensors = {
        "vision_model.embeddings.class_embedding": _random(1, 1, v.hidden_size),
        "vision_model.embeddings.position_embedding": _random(1, 1 + (v.image_size // v.patch_size) ** 2, v.hidden_size),
        "vision_model.embeddings.patch_embedding.weight": _random(v.hidden_size, 3, v.patch_size, v.patch_size, scale=0.05),
        "vision_model.embeddings.patch_embedding.bias": _random(v.hidden_size),
        "language_model.model.embed_tokens.weight": _random(c.vocabulary, c.hidden_size, scale=1.0),
        "language_model.lm_head.weight": _random(c.vocabulary, c.hidden_size),
        "language_model.model.norm.weight": 1 + _random(c.hidden_size),
        "mlp1.0.weight": 1 + _random(wide),
        "mlp1.0.bias": _random(wide),
        "mlp1.1.weight": _random(c.hidden_size, wide),
        "mlp1.1.bias": _random(c.hidden_size),
        "mlp1.3.weight": _random(c.hidden_size, c.hidden_size),
        "mlp1.3.bias": _random(c.hidden_size),
    }
    for i in range(v.layers):
        root = f"vision_model.encoder.layers.{i}."
        for norm in ("norm1", "norm2"):
            tensors |= {f"{root}{norm}.weight": 1 + _random(v.hidden_size), f"{root}{norm}.bias": _random(v.hidden_size)}
        tensors |= {f"{root}ls1": _random(v.hidden_size), f"{root}ls2": _random(v.hidden_size)}
        shapes = {"attn.qkv": (3, 1), "attn.proj": (1, 1)}
        for name, (rows, columns) in shapes.items():
            tensors[f"{root}{name}.weight"] = _random(rows * v.hidden_size, columns * v.hidden_size)
            tensors[f"{root}{name}.bias"] = _random(rows * v.hidden_size)
        tensors |= {
            f"{root}mlp.fc1.weight": _random(v.intermediate_size, v.hidden_size),
            f"{root}mlp.fc1.bias": _random(v.intermediate_size),
        }
        tensors |= {f"{root}mlp.fc2.weight": _random(v.hidden_size, v.intermediate_size), f"{root}mlp.fc2.bias": _random(v.hidden_size)}
    for i in range(c.layers):
        root = f"language_model.model.layers.{i}."
        for name, (rows, columns) in lora_targets(c).items():
            tensors[f"{root}{name}.weight"] = _random(rows, columns)
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                tensors[f"{root}{name}.bias"] = _random(rows)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{root}{name}.weight"] = 1 + _random(c.hidden_size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(v, c)))
    _write_tokenizer(folder)
    return folder


def lora_targets(c: LanguageConfig) -> dict[str, tuple[int, int]]:
    """The seven matrices of a layer that LoRA adapts: name -> (out, in)."""
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return {
        "self_attn.q_proj": (queries, c.hidden_size),
        "self_attn.k_proj": (keys, c.hidden_size),
        "self_attn.v_proj": (keys, c.hidden_size),
        "self_attn.o_proj": (c.hidden_size, queries),
        "mlp.gate_proj": (c.intermediate_size, c.hidden_size),
        "mlp.up_proj": (c.intermediate_size, c.hidden_size),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size),
    }


def _config(v: VisionConfig, c: LanguageConfig) -> dict[str, Any]:
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 1 / v.downsample,
        "force_image_size": v.image_size,
        "ps_version": "v2",
        "select_layer": -1,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "intern_vit_6b",
            "num_hidden_layers": v.layers,
            "hidden_size": v.hidden_size,
            "num_attention_heads": v.heads,
            "intermediate_size": v.intermediate_size,
            "image_size": v.image_size,
            "patch_size": v.patch_size,
            "layer_norm_eps": v.norm_eps,
            "qkv_bias": True,
            "qk_normalization": False,
            "norm_type": "layer_norm",
            "hidden_act": "gelu",
        },
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "num_hidden_layers": c.layers,
            "hidden_size": c.hidden_size,
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "intermediate_size": c.intermediate_size,
            "vocab_size": c.vocabulary,
            "rope_theta": c.rope_theta,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},  # as InternVL3 ships it
            "rms_norm_eps": c.norm_eps,
            "max_position_embeddings": c.max_positions,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        },
    }


def _write_tokenizer(folder: Path) -> None:
    """Bytes only, no merges: enough for ids, and quick."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}))


def sam2_config(image_size: int = 256, channels: int = SAM2_CHANNELS) -> Any:
    """sam2_hiera_l's configuration, sized down."""
    text = importlib.resources.files("sam2").joinpath("configs", "sam2", "sam2_hiera_l.yaml").read_text()
    config = OmegaConf.create(text)
    m = config.model
    m.image_size = image_size
    m.image_encoder.trunk.update(
        {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 2, 1], "global_att_blocks": [3], "window_spec": [8, 4, 4, 2]}
    )
    m.image_encoder.neck.update({"d_model": channels, "backbone_channel_list": [128, 64, 32, 16]})
    m.image_encoder.neck.position_encoding.num_pos_feats = channels
    m.memory_attention.update({"d_model": channels, "num_layers": 1})
    m.memory_attention.layer.update({"d_model": channels, "dim_feedforward": 32})
    for part in ("self_attention", "cross_attention"):
        m.memory_attention.layer[part].update({"embedding_dim": channels, "feat_sizes": [image_size // 16] * 2})
    m.memory_attention.layer.cross_attention.kv_in_dim = 16
    m.memory_encoder.update({"out_dim": 16, "in_dim": channels})
    m.memory_encoder.position_encoding.num_pos_feats = 16
    m.memory_encoder.mask_downsampler.embed_dim = channels
    m.memory_encoder.fuser.layer.dim = channels
    return config


def write_sam2(path: Path, config: Any = None, seed: int = 1) -> Path:
    """A SAM 2.0 checkpoint and, beside it, its configuration."""
    from hydra.utils import instantiate

    torch.manual_seed(seed)
    config = sam2_config() if config is None else config
    model = instantiate(config.model, _recursive_=True)
    torch.save({"model": model.state_dict()}, path)
    path.with_suffix(".yaml").write_text(OmegaConf.to_yaml(config))
    return path


def fine_tuned_state(
    sam2: Path, language: LanguageConfig = LANGUAGE, vision: VisionConfig = VISION, rank: int = 4
) -> dict[str, torch.Tensor]:
    """The state dict that Sa2VA's fine-tuning saves, random, bf16."""
    torch.manual_seed(2)
    c, wide = language, vision.hidden_size * vision.downsample**2
    rows = c.vocabulary + len(NEW_TOKENS)
    state = {
        LORA_PREFIX + "model.embed_tokens.weight": _random(rows, c.hidden_size, scale=1.0),
        LORA_PREFIX + "lm_head.weight": _random(rows, c.hidden_size),
    }
    for i in range(c.layers):
        for name, (out, in_) in lora_targets(c).items():
            state[f"{LORA_PREFIX}model.layers.{i}.{name}.lora_A.weight"] = _random(rank, in_)
            state[f"{LORA_PREFIX}model.layers.{i}.{name}.lora_B.weight"] = _random(out, rank)
    sizes = {"0.weight": (wide,), "0.bias": (wide,), "1.weight": (c.hidden_size, wide), "1.bias": (c.hidden_size,)}
    sizes |= {"3.weight": (c.hidden_size, c.hidden_size), "3.bias": (c.hidden_size,)}
    state |= {f"mllm.model.mlp1.{name}": _random(*shape) for name, shape in sizes.items()}
    loaded = torch.load(sam2, weights_only=True)["model"]
    decoder = {name: tensor for name, tensor in loaded.items() if name.startswith("sam_mask_decoder.")}
    narrow = loaded["sam_mask_decoder.iou_token.weight"].shape[1]
    sizes = {
        "0.weight": (c.hidden_size, c.hidden_size),
        "0.bias": (c.hidden_size,),
        "2.weight": (narrow, c.hidden_size),
        "2.bias": (narrow,),
    }
    state |= {f"text_hidden_fcs.{name}": _random(*shape) for name, shape in sizes.items()}
    state |= {f"grounding_encoder.sam2_model.{name}": tensor.to(torch.bfloat16) for name, tensor in decoder.items()}
    return state


def write_checkpoint(path: Path, state: dict[str, torch.Tensor], alpha: float | None = 8) -> Path:
    """A checkpoint with mmengine's `meta`, without its log buffers."""
    meta = {"iter": 12192, "cfg": "" if alpha is None else f"model = dict(llm_lora=dict(r=4, lora_alpha={alpha}))"}
    torch.save({"meta": meta, "state_dict": state}, path)
    return path

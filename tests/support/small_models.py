"""A small random model in the real formats: an InternVL3 folder, a SAM 2.0 file and a fine-tuned checkpoint."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import OmegaConf

from benchmarks.synth import random_model as synth
from benchmarks.synth.file_formats import ADDED_TOKENS, save_checkpoint
from benchmarks.synth.random_model import SynthModel, checkpoint_tensors
from vessel_export.sources.base_config import LanguageConfig, VisionConfig

VOCABULARY = 256 + len(ADDED_TOKENS)

VISION = VisionConfig(
    layers=2, hidden_size=32, heads=2, intermediate_size=64, image_size=112, patch_size=14, norm_eps=1e-6, downsample=2
)  # fmt: skip
LANGUAGE = LanguageConfig(
    layers=2, hidden_size=48, heads=6, kv_heads=2, head_dim=16, intermediate_size=80, vocabulary=VOCABULARY, rope_theta=1e6, norm_eps=1e-6,
    max_positions=32768,
)  # fmt: skip

_SMALL_TRUNK = {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 2, 1], "global_att_blocks": [3], "window_spec": [8, 4, 4, 2]}
_SMALL_CHANNELS = [128, 64, 32, 16]


def _sam2_config(image_size: int = 256, channels: int = 32) -> str:
    """sam2_hiera_l's configuration, sized down."""
    text = importlib.resources.files("sam2").joinpath("configs", "sam2", "sam2_hiera_l.yaml").read_text(encoding="utf-8")
    config = OmegaConf.create(text)
    m = config.model
    m.image_size = image_size
    m.image_encoder.trunk.update(_SMALL_TRUNK)
    m.image_encoder.neck.update({"d_model": channels, "backbone_channel_list": _SMALL_CHANNELS})
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
    return OmegaConf.to_yaml(config)


MODEL = SynthModel(
    vision=VISION, language=LANGUAGE, sam2_config=_sam2_config(), lora_rank=4, lora_alpha=8, shards=1, seed=0, outliers=False
)  # fmt: skip


def full_width_memory() -> SynthModel:
    """The same, with SAM2's neck, memory and mask decoder as wide as in SAM2 Hiera-L, behind a small trunk."""
    text = importlib.resources.files("sam2").joinpath("configs", "sam2", "sam2_hiera_l.yaml").read_text(encoding="utf-8")
    config = OmegaConf.create(text)
    config.model.image_encoder.trunk.update(_SMALL_TRUNK)
    config.model.image_encoder.neck.backbone_channel_list = _SMALL_CHANNELS
    return dataclasses.replace(MODEL, sam2_config=OmegaConf.to_yaml(config))


def write_base(folder: Path, model: SynthModel = MODEL) -> Path:
    """An InternVL3 folder in the original layout, bf16."""
    synth.write_base(folder, model)
    return folder


def write_sam2(path: Path, model: SynthModel = MODEL) -> Path:
    """A SAM 2.0 checkpoint and, beside it, its configuration."""
    synth.write_sam2(path, model)
    return path


def fine_tuned_state(model: SynthModel = MODEL) -> dict[str, torch.Tensor]:
    """The state dict that Sa2VA's fine-tuning saves, bf16."""
    return {tensor.name: torch.cat(list(tensor.pieces())) for tensor in checkpoint_tensors(model)}


def write_checkpoint(path: Path, state: Mapping[str, torch.Tensor], alpha: float | None = MODEL.lora_alpha) -> Path:
    """A checkpoint as mmengine saves it."""
    save_checkpoint(path, state, rank=MODEL.lora_rank, alpha=alpha)
    return path

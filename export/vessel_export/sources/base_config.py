"""InternVL3's config.json in either layout: the sizes of its two models, checked before they are used. Does not know tensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vessel_export.errors import BaseModelError
from vessel_rt.errors import first_line

__all__ = ["LanguageConfig", "VisionConfig", "read_config_json", "read_json"]

_LARGEST_SIZE = 1 << 24  # far above the width, vocabulary and number of positions of any model
_WIDEST_HEAD = 1024


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of InternViT. `downsample` is the pixel shuffle's factor per side: with 2, four patches become one image token."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    norm_eps: float
    downsample: int

    @property
    def tokens_per_tile(self) -> int:
        return (self.image_size // self.patch_size // self.downsample) ** 2


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Sizes of the Qwen2 language model; `vocabulary` is the base model's, before the fine-tune's tokens."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocabulary: int
    rope_theta: float
    norm_eps: float
    max_positions: int


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file at `path`; BaseModelError if there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise BaseModelError(f"{path}: cannot be read ({first_line(e)}); download the whole base model again") from e
    if not isinstance(document, dict):
        raise BaseModelError(f"{path}: not a JSON object; download the whole base model again")
    return document


def read_config_json(path: Path) -> tuple[VisionConfig, LanguageConfig]:
    """The sizes in the config.json at `path`.

    Raises:
        BaseModelError: not JSON, an architecture other than InternVL3 with Qwen2, or an impossible value.
    """
    config = read_json(path)
    try:
        return _vision_config(config), _language_config(config)
    except ValueError as e:
        raise BaseModelError(f"{path}: not an InternVL3 with Qwen2 that can be exported: {e}; give --base another") from e


def _vision_config(config: dict[str, Any]) -> VisionConfig:
    c = _table(config, "vision_config")
    native = "text_config" in config
    _require(c.get("norm_type", "layer_norm") == "layer_norm", "norm_type is not layer_norm")
    _require(c.get("hidden_act", "gelu") == "gelu", "the vision model's activation is not gelu")
    _require(not c.get("use_qk_norm" if native else "qk_normalization", False), "the vision model normalises Q and K")
    _require(c.get("attention_bias" if native else "qkv_bias", True), "the vision model has no QKV bias")
    _require(config.get("select_layer", config.get("vision_feature_layer", -1)) == -1, "the vision feature is not the last layer's")
    _require(config.get("ps_version", "v2") == "v2", "pixel shuffle is not v2")
    ratio = _positive({"downsample_ratio": 0.5, **config}, "downsample_ratio")
    downsample = round(1 / ratio)
    _require(0 < ratio <= 1 and 1 / ratio == downsample, f"downsample_ratio is {ratio}, not 1/n")
    image_size = _size(config, "force_image_size") if config.get("force_image_size") is not None else _side(c, "image_size")
    patch_size = _side(c, "patch_size")
    _require(image_size % (patch_size * downsample) == 0, f"{image_size} pixels cannot be divided into patches of {patch_size}")
    vision = VisionConfig(
        layers=_size(c, "num_hidden_layers"),
        hidden_size=_size(c, "hidden_size"),
        heads=_size(c, "num_attention_heads"),
        intermediate_size=_size(c, "intermediate_size"),
        image_size=image_size,
        patch_size=patch_size,
        norm_eps=_positive(c, "layer_norm_eps"),
        downsample=downsample,
    )
    _require(
        vision.hidden_size % vision.heads == 0,
        f"the vision model's width {vision.hidden_size} is not a multiple of its {vision.heads} heads",
    )
    return vision


def _language_config(config: dict[str, Any]) -> LanguageConfig:
    c = _table(config, "text_config" if config.get("text_config") else "llm_config")
    _require(c.get("model_type", "qwen2") == "qwen2", f"the language model is {c.get('model_type')}, not qwen2")
    _require(c.get("hidden_act", "silu") == "silu", "the language model's activation is not silu")
    _require(not c.get("use_sliding_window", False), "the language model uses a sliding window")
    _require(not c.get("tie_word_embeddings", config.get("tie_word_embeddings", False)), "embedding and head are tied")
    scaling = _table(c, "rope_scaling") if c.get("rope_scaling") else {}
    rope = _table(c, "rope_parameters") if c.get("rope_parameters") else {**scaling, "rope_theta": c.get("rope_theta")}
    # "dynamic" changes only positions beyond max_position_embeddings, and the export refuses those.
    _require(
        rope.get("rope_type", rope.get("type", "default")) in ("default", "dynamic"), "the language model's rope scaling is not supported"
    )
    hidden_size, heads = _size(c, "hidden_size"), _size(c, "num_attention_heads")
    language = LanguageConfig(
        layers=_size(c, "num_hidden_layers"),
        hidden_size=hidden_size,
        heads=heads,
        kv_heads=_size(c, "num_key_value_heads"),
        head_dim=_size(c, "head_dim") if c.get("head_dim") is not None else hidden_size // heads,
        intermediate_size=_size(c, "intermediate_size"),
        vocabulary=_size(c, "vocab_size"),
        rope_theta=_positive(rope, "rope_theta"),
        norm_eps=_positive(c, "rms_norm_eps"),
        max_positions=_size(c, "max_position_embeddings"),
    )
    _require(heads % language.kv_heads == 0, f"{heads} heads are not a multiple of {language.kv_heads} key-value heads")
    _require(
        0 < language.head_dim <= _WIDEST_HEAD and language.head_dim % 2 == 0,
        f"head_dim is {language.head_dim}, not an even number up to {_WIDEST_HEAD}",
    )
    return language


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    _require(isinstance(value, dict), f"{key} is {_shown(value)}, not an object")
    return value  # type: ignore[return-value]


def _size(config: Mapping[str, Any], key: str) -> int:
    """A positive count. One far beyond any model's is refused before memory is allocated for it."""
    value = config.get(key)
    _require(type(value) is int and 0 < value < _LARGEST_SIZE, f"{key} is {_shown(value)}, not a positive integer below {_LARGEST_SIZE}")
    return value  # type: ignore[return-value]


def _positive(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    _require(type(value) in (int, float) and 0 < value < 1e30, f"{key} is {_shown(value)}, not a positive number")  # type: ignore[operator]
    return float(value)  # type: ignore[arg-type]


def _side(config: Mapping[str, Any], key: str) -> int:
    """The side of a square: the transformers-native configuration has [448, 448]."""
    value = config.get(key)
    if isinstance(value, list):
        _require(len(value) == 2 and value[0] == value[1], f"{key} is not square")
        return _size({key: value[0]}, key)
    return _size(config, key)


def _shown(value: object) -> str:
    """A file's value for a message."""
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:50]!r}"

"""The frozen weights that a fine-tune starts from: InternVL3 in either of its layouts, and SAM2. Nothing is held in memory.

Tensor names here are those of InternVL's original layout (`vision_model.*`, `language_model.*`, `mlp1.*`), whatever the folder's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vessel_export.errors import BaseModelError
from vessel_export.page_cache import let_go
from vessel_rt.errors import first_line

__all__ = [
    "DEFAULT_BASE",
    "DEFAULT_SAM2",
    "BaseModel",
    "LanguageConfig",
    "Sam2",
    "VisionConfig",
    "open_base",
    "open_sam2",
]

DEFAULT_BASE = "OpenGVLab/InternVL3-8B"
DEFAULT_SAM2 = "facebook/sam2-hiera-large"

_SAM2_FILES = {  # Hugging Face id: (checkpoint in it, configuration inside the sam2 package); the SAM 2.0 family
    "facebook/sam2-hiera-tiny": ("sam2_hiera_tiny.pt", "sam2_hiera_t.yaml"),
    "facebook/sam2-hiera-small": ("sam2_hiera_small.pt", "sam2_hiera_s.yaml"),
    "facebook/sam2-hiera-base-plus": ("sam2_hiera_base_plus.pt", "sam2_hiera_b+.yaml"),
    "facebook/sam2-hiera-large": ("sam2_hiera_large.pt", "sam2_hiera_l.yaml"),
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of InternViT. `downsample` is the pixel shuffle's factor per side (2: four patches become one image token)."""

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


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """An InternVL3 folder, opened: its sizes, and its tensors by their original names, read one at a time."""

    folder: Path
    vision: VisionConfig
    language: LanguageConfig
    _sources: Mapping[str, tuple[tuple[Path, str], ...]]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`.

        Raises:
            BaseModelError: no such tensor.
        """
        shapes = []
        for file, key in self._pieces(name):
            with safe_open(file, "pt") as opened:
                shapes.append(tuple(opened.get_slice(key).get_shape()))
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` in the file's dtype, memory-mapped where it is stored whole; BaseModelError if there is none."""
        pieces = []
        for file, key in self._pieces(name):
            with safe_open(file, "pt") as opened:
                pieces.append(opened.get_tensor(key))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def let_go(self, name: str) -> None:
        """Tell the system that tensor `name`, of which nobody holds a view, was read and is not needed again."""
        for file, _ in self._pieces(name):
            with file.open("rb") as opened:
                let_go(opened)

    def _pieces(self, name: str) -> tuple[tuple[Path, str], ...]:
        try:
            return self._sources[name]
        except KeyError:
            raise BaseModelError(f"{self.folder}: lacks {name}; it is not a whole InternVL3 model, download it again") from None


@dataclasses.dataclass(frozen=True)
class Sam2:
    """A SAM 2.0 checkpoint and the configuration of sam2's own modules for it."""

    path: Path
    model_config: Any  # omegaconf's DictConfig under `model`
    state_dict: Mapping[str, torch.Tensor]

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return int(self.model_config.image_size)

    def build(self, state_dict: Mapping[str, torch.Tensor] | None = None) -> torch.nn.Module:
        """sam2's SAM2Base in FP32 and eval mode, with these weights, or `state_dict`'s where a name is in it.

        Raises:
            BaseModelError: a tensor is missing, unexpected or of another shape.
        """
        from hydra.utils import instantiate

        model: torch.nn.Module = instantiate(self.model_config, _recursive_=True)
        weights = {**self.state_dict, **(state_dict or {})}
        try:
            model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
        except RuntimeError as e:
            raise BaseModelError(f"{self.path}: does not fit its configuration: {' '.join(str(e).split())}") from e
        return model.eval()


def open_base(spec: str) -> BaseModel:
    """The base model in a local folder, or of a Hugging Face id (downloaded, or from the cache).

    Raises:
        BaseModelError: not found and not downloadable, a file missing, or an architecture other than InternVL3 with Qwen2.
    """
    folder = _local_or_hub(spec, "--base")
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"{folder}: no config.json; --base takes an InternVL3 folder (OpenGVLab/InternVL3-8B, downloaded whole)")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise BaseModelError(f"{folder}: no tokenizer (vocab.json or tokenizer.json); download the base model whole")
    config = _read_json(folder / "config.json")
    try:
        vision, language = _vision_config(config), _language_config(config)
    except (KeyError, TypeError, ValueError) as e:
        raise BaseModelError(f"{folder / 'config.json'}: not an InternVL3 with Qwen2 that can be exported ({e})") from e
    return BaseModel(folder, vision, language, _index(folder))


def open_sam2(spec: str) -> Sam2:
    """SAM 2.0 from a local .pt file, or of a Hugging Face id.

    The configuration is the .yaml of the same stem beside the .pt, else the one the sam2 package has for a file of that name.

    Raises:
        BaseModelError: not found and not downloadable, no configuration, or not a SAM2 checkpoint.
    """
    from omegaconf import OmegaConf

    path = _sam2_file(spec)
    beside = path.with_suffix(".yaml")
    packaged = dict(_SAM2_FILES.values())
    if beside.is_file():
        text = beside.read_text(encoding="utf-8")
    elif path.name in packaged:
        text = importlib.resources.files("sam2").joinpath("configs", "sam2", packaged[path.name]).read_text(encoding="utf-8")
    else:
        raise BaseModelError(f"{path}: no configuration for it; put its .yaml beside it as {beside.name}")
    targets = set(re.findall(r"_target_:\s*(\S+)", text))
    if not targets or not all(target.startswith("sam2.modeling.") for target in targets):
        raise BaseModelError(f"{beside}: may only name modules of sam2.modeling; it names {', '.join(sorted(targets)) or 'none'}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError, ValueError) as e:
        raise BaseModelError(f"{path}: not a SAM2 checkpoint ({first_line(e)}); download it again") from e
    return Sam2(path, OmegaConf.create(text).model, state)


def _local_or_hub(spec: str, flag: str) -> Path:
    path = Path(spec)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", spec) or path.exists():
        raise BaseModelError(f"{spec}: no such folder; {flag} takes a local folder or a Hugging Face id")
    from huggingface_hub import snapshot_download

    with _offline_is_one_line(spec, flag):
        return Path(snapshot_download(spec, allow_patterns=["*.json", "*.txt", "*.safetensors"]))


def _sam2_file(spec: str) -> Path:
    path = Path(spec)
    if path.is_file():
        return path
    if spec not in _SAM2_FILES:
        raise BaseModelError(f"{spec}: no such file; --sam2 takes a local .pt of SAM 2.0 or one of {', '.join(_SAM2_FILES)}")
    from huggingface_hub import hf_hub_download

    with _offline_is_one_line(spec, "--sam2"):
        return Path(hf_hub_download(spec, _SAM2_FILES[spec][0]))


@contextlib.contextmanager
def _offline_is_one_line(spec: str, flag: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # huggingface_hub raises a dozen kinds, network stacks more; all mean: not to be had from here
        raise BaseModelError(
            f"{spec}: not in the cache and not downloadable here ({type(e).__name__}); give a local path with {flag}"
        ) from e


def _vision_config(config: dict[str, Any]) -> VisionConfig:
    c = config["vision_config"]
    native = "text_config" in config
    _require(c.get("norm_type", "layer_norm") == "layer_norm", "norm_type is not layer_norm")
    _require(c.get("hidden_act", "gelu") == "gelu", "the vision model's activation is not gelu")
    _require(not c.get("use_qk_norm" if native else "qk_normalization", False), "the vision model normalises Q and K")
    _require(c.get("attention_bias" if native else "qkv_bias", True), "the vision model has no QKV bias")
    _require(config.get("select_layer", config.get("vision_feature_layer", -1)) == -1, "the vision feature is not the last layer's")
    _require(config.get("ps_version", "v2") == "v2", "pixel shuffle is not v2")
    downsample = 1 / float(config.get("downsample_ratio", 0.5))
    _require(downsample == int(downsample), "downsample_ratio is not 1/n")
    return VisionConfig(
        layers=c["num_hidden_layers"],
        hidden_size=c["hidden_size"],
        heads=c["num_attention_heads"],
        intermediate_size=c["intermediate_size"],
        image_size=config.get("force_image_size") or _side(c["image_size"]),
        patch_size=_side(c["patch_size"]),
        norm_eps=c["layer_norm_eps"],
        downsample=int(downsample),
    )


def _language_config(config: dict[str, Any]) -> LanguageConfig:
    c = config.get("text_config") or config["llm_config"]
    _require(c.get("model_type", "qwen2") == "qwen2", f"the language model is {c.get('model_type')}, not qwen2")
    _require(c.get("hidden_act", "silu") == "silu", "the language model's activation is not silu")
    _require(not c.get("use_sliding_window", False), "the language model uses a sliding window")
    _require(not c.get("tie_word_embeddings", config.get("tie_word_embeddings", False)), "embedding and head are tied")
    rope = c.get("rope_parameters") or {**(c.get("rope_scaling") or {}), "rope_theta": c.get("rope_theta")}
    # "dynamic" only changes positions beyond max_position_embeddings, which the export refuses.
    _require(rope.get("rope_type", rope.get("type", "default")) in ("default", "dynamic"), f"rope scaling {rope} is not supported")
    return LanguageConfig(
        layers=c["num_hidden_layers"],
        hidden_size=c["hidden_size"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        intermediate_size=c["intermediate_size"],
        vocabulary=c["vocab_size"],
        rope_theta=float(rope["rope_theta"]),
        norm_eps=c["rms_norm_eps"],
        max_positions=c["max_position_embeddings"],
    )


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _side(value: int | list[int]) -> int:
    """A square's side: the transformers-native configuration writes [448, 448]."""
    if isinstance(value, list):
        _require(len(set(value)) == 1, f"{value} is not square")
        return value[0]
    return value


def _index(folder: Path) -> dict[str, tuple[tuple[Path, str], ...]]:
    """Original name -> the (file, key) pieces it is made of; in the native layout Q, K and V are apart and concatenate to qkv."""
    sources: dict[str, list[tuple[int, Path, str]]] = {}
    for file, key in _keys(folder):
        name = _original_name(key)
        part = re.search(r"\.attn\.([qkv])_proj\.", name)
        if part:
            name = name.replace(part.group(0), ".attn.qkv.")
        sources.setdefault(name, []).append(("qkv".index(part.group(1)) if part else 0, file, key))
    return {name: tuple((file, key) for _, file, key in sorted(pieces)) for name, pieces in sources.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BaseModelError(f"{path}: cannot be read ({first_line(e)}); download the base model whole") from e
    if not isinstance(document, dict):
        raise BaseModelError(f"{path}: not a JSON object; download the base model whole")
    return document


def _keys(folder: Path) -> Iterator[tuple[Path, str]]:
    index = folder / "model.safetensors.index.json"
    files = set(_read_json(index).get("weight_map", {}).values()) if index.is_file() else {"model.safetensors"}
    for name in sorted(files):
        path = folder / name
        if path.resolve().parent != folder.resolve() and not path.is_symlink():  # the hub's cache links to its blobs
            raise BaseModelError(f"{index}: names a file outside its folder: {name}")
        try:
            with safe_open(path, "pt") as opened:
                keys = list(opened.keys())
        except (OSError, SafetensorError) as e:
            raise BaseModelError(f"{path}: cannot be read ({e}); download the base model whole") from e
        yield from ((path, key) for key in keys)


# From the transformers-native layout to the original one, in this order (transformers' own conversion script, reversed).
_NATIVE_TO_ORIGINAL = (
    (r"^model\.", ""),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_tower\.embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding"),
    (r"^vision_tower\.embeddings\.patch_embeddings\.projection\.", "vision_model.embeddings.patch_embedding."),
    (r"^vision_tower\.encoder\.layer\.(\d+)\.", r"vision_model.encoder.layers.\1."),
    (r"^(vision_model\..*)\.lambda_([12])$", r"\1.ls\2"),
    (r"^(vision_model\..*)\.attention\.projection_layer\.", r"\1.attn.proj."),
    (r"^(vision_model\..*)\.attention\.", r"\1.attn."),
    (r"^(vision_model\..*)\.layernorm_before\.", r"\1.norm1."),
    (r"^(vision_model\..*)\.layernorm_after\.", r"\1.norm2."),
)


def _original_name(key: str) -> str:
    for pattern, replacement in _NATIVE_TO_ORIGINAL:
        key = re.sub(pattern, replacement, key)
    return key

"""The weights that a fine-tune starts from: InternVL3 in either of its layouts, and SAM 2.0. They are opened, not loaded into memory.

Tensor names are those of InternVL's original layout (`vision_model.*`, `language_model.*`, `mlp1.*`) for both layouts. Does not know the
checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vessel_export.errors import BaseModelError
from vessel_export.io.files import drop_from_cache
from vessel_export.sources.base_config import LanguageConfig, VisionConfig, read_config_json, read_json
from vessel_export.sources.sam2_files import build_sam2, find_sam2_yaml, read_sam2_config, read_sam2_state
from vessel_rt.errors import first_line

__all__ = [
    "DEFAULT_BASE",
    "DEFAULT_SAM2",
    "BaseModel",
    "Sam2",
    "open_base",
    "open_sam2",
]

DEFAULT_BASE = "OpenGVLab/InternVL3-8B"
DEFAULT_SAM2 = "facebook/sam2-hiera-large"

_FLOATS = ("F64", "F32", "F16", "BF16")  # in safetensors' names

_SAM2_FILES = {  # SAM 2.0 models: Hugging Face id -> its checkpoint
    "facebook/sam2-hiera-tiny": "sam2_hiera_tiny.pt",
    "facebook/sam2-hiera-small": "sam2_hiera_small.pt",
    "facebook/sam2-hiera-base-plus": "sam2_hiera_base_plus.pt",
    "facebook/sam2-hiera-large": "sam2_hiera_large.pt",
}


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A tensor in a safetensors file: its place, shape and dtype ("BF16")."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """An opened InternVL3 folder: its sizes, and its tensors by original name, read one at a time."""

    folder: Path
    vision: VisionConfig
    language: LanguageConfig
    _sources: Mapping[str, tuple[_Piece, ...]]  # one piece, or three of the same width: Q, K and V

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the tensors."""
        return tuple(sorted({piece.file for pieces in self._sources.values() for piece in pieces}))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`.

        Raises:
            BaseModelError: no such tensor, or not of a floating-point dtype.
        """
        pieces = self._pieces(name)
        return pieces[0].shape if len(pieces) == 1 else (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """The shape of matrix `name`, [out, in]; BaseModelError if there is no such matrix."""
        match self.shape(name):
            case (rows, columns):
                return rows, columns
            case shape:
                raise BaseModelError(f"{self.folder}: {name} has shape {list(shape)}, not a matrix's; download the whole base model again")

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` in the file's dtype, memory-mapped if it is one piece; BaseModelError if there is none."""
        pieces = []
        for piece in self._pieces(name):
            with safe_open(piece.file, "pt") as opened:
                pieces.append(opened.get_tensor(piece.key))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def drop_from_cache(self, name: str) -> None:
        """Drop the files of tensor `name` from the page cache. Call it when no view of the tensor is left."""
        for piece in self._pieces(name):
            with piece.file.open("rb") as opened:
                drop_from_cache(opened)

    def _pieces(self, name: str) -> tuple[_Piece, ...]:
        pieces = self._sources.get(name)
        if pieces is None:
            raise BaseModelError(
                f"{self.folder}: lacks {name}, so it is not a complete InternVL3 model; download the whole base model again"
            )
        for piece in pieces:
            if piece.dtype not in _FLOATS:
                raise BaseModelError(f"{piece.file}: {piece.key} is {piece.dtype}; give --base the model in {', '.join(_FLOATS)}")
        return pieces


@dataclasses.dataclass(frozen=True)
class Sam2:
    """A SAM 2.0 checkpoint and the configuration of sam2's modules for it."""

    path: Path
    config: Mapping[str, Any]  # as `read_sam2_config` returns it
    state_dict: Mapping[str, torch.Tensor]

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return int(self.config["image_size"])

    @property
    def width(self) -> int:
        """Channels of the image features and of the prompt tokens."""
        return int(self.config["image_encoder"]["neck"]["d_model"])

    def build(self, state_dict: Mapping[str, torch.Tensor] | None = None) -> torch.nn.Module:
        """sam2's SAM2Base in FP32 and eval mode. Weights in `state_dict` replace the checkpoint's.

        Raises:
            BaseModelError: the configuration does not give a model, or a tensor is missing, unexpected or of another shape.
        """
        weights = {**self.state_dict, **(state_dict or {})}
        try:
            model = build_sam2(self.config)
            model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
        except (RuntimeError, ValueError) as e:
            raise BaseModelError(f"{self.path}: does not fit its configuration: {' '.join(str(e).split())}; give --sam2 another") from e
        return model.eval()


def open_base(spec: str) -> BaseModel:
    """Open the base model in a local folder or with a Hugging Face id (from the cache, or downloaded).

    Raises:
        BaseModelError: not found and not downloadable, a missing file, or an architecture other than InternVL3 with Qwen2.
    """
    folder = _local_or_hub(spec, "--base")
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"{folder}: no config.json; give --base an InternVL3 folder (the whole of OpenGVLab/InternVL3-8B)")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise BaseModelError(f"{folder}: no tokenizer (vocab.json or tokenizer.json); download the whole base model again")
    vision, language = read_config_json(folder / "config.json")
    return BaseModel(folder, vision, language, _index(folder))


def open_sam2(spec: str) -> Sam2:
    """Open SAM 2.0 from a local .pt file or with a Hugging Face id.

    The configuration is the .yaml of the same stem next to the .pt, or the one in the sam2 package for a file of that name.

    Raises:
        BaseModelError: not found and not downloadable, no configuration, or not a SAM2 checkpoint.
    """
    path = _sam2_file(spec)
    config = read_sam2_config(find_sam2_yaml(path))
    return Sam2(path, config, read_sam2_state(path))


def _local_or_hub(spec: str, flag: str) -> Path:
    path = Path(spec)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", spec) or path.exists():
        raise BaseModelError(f"{spec}: no such folder; give {flag} a local folder or a Hugging Face id")
    from huggingface_hub import snapshot_download

    with _download_errors(spec, flag):
        return Path(snapshot_download(spec, allow_patterns=["*.json", "*.txt", "*.safetensors"]))


def _sam2_file(spec: str) -> Path:
    path = Path(spec)
    if path.is_file():
        return path
    if spec not in _SAM2_FILES:
        raise BaseModelError(f"{spec}: no such file; give --sam2 a local .pt of SAM 2.0 or one of {', '.join(_SAM2_FILES)}")
    from huggingface_hub import hf_hub_download

    with _download_errors(spec, "--sam2"):
        return Path(hf_hub_download(spec, _SAM2_FILES[spec]))


@contextlib.contextmanager
def _download_errors(spec: str, flag: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # huggingface_hub and the network stack raise dozens of classes, all of which mean this
        raise BaseModelError(
            f"{spec}: not in the cache and cannot be downloaded ({type(e).__name__}); give a local path with {flag}"
        ) from e


def _index(folder: Path) -> dict[str, tuple[_Piece, ...]]:
    """Original name -> its pieces. The native layout stores Q, K and V separately; concatenated they are qkv."""
    sources: dict[str, dict[str, _Piece]] = {}
    for piece in _read_pieces(folder):
        name, letter = _original_name(piece.key), ""
        if match := re.search(r"\.attn\.([qkv])_proj\.", name):
            name, letter = name.replace(match[0], ".attn.qkv."), match[1]
        if letter in sources.setdefault(name, {}):
            raise BaseModelError(f"{piece.file}: {piece.key} appears twice; download the whole base model again")
        sources[name][letter] = piece
    for name, pieces in sources.items():
        joined = "".join(sorted(pieces))
        widths = {piece.shape[1:] for piece in pieces.values()}
        if joined and (joined != "kqv" or len(widths) != 1 or not all(piece.shape for piece in pieces.values())):
            raise BaseModelError(f"{folder}: the pieces of {name} do not fit together; download the whole base model again")
    return {name: tuple(pieces[letter] for letter in sorted(pieces, key="qkv".find)) for name, pieces in sources.items()}


def _weights_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise BaseModelError(f"{index}: has no weight_map of file names; download the whole base model again")
    for name in names.values():
        if name != re.split(r"[/\\]", name)[-1] or name in ("", ".", ".."):
            raise BaseModelError(f"{index}: names a file outside its folder: {name[:200]!r}; download the whole base model again")
    return [folder / name for name in sorted(set(names.values()))]


def _read_pieces(folder: Path) -> Iterator[_Piece]:
    """Every tensor of the folder. The library checks that a file's header matches its size."""
    for path in _weights_files(folder):
        try:
            if not path.is_file():
                raise FileNotFoundError("no such file")
            with safe_open(path, "pt") as opened:
                slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
                pieces = [_Piece(path, key, tuple(view.get_shape()), view.get_dtype()) for key, view in slices.items()]
        except (OSError, SafetensorError) as e:
            raise BaseModelError(f"{path}: cannot be read ({first_line(e)}); download the whole base model again") from e
        yield from pieces


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

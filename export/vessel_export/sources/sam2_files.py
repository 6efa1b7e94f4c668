"""Reads SAM2's two files: the .pt with its tensors, and the .yaml, which names classes and their arguments.

sam2 reads its .yaml with hydra, which calls whatever the file names. Here the document is checked as data before anything is built from it:
it may name only classes of SAM 2.0, each with the arguments of its own configurations. The exporter and its reference share this module.
"""

from __future__ import annotations

import importlib
import importlib.resources
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vessel_export.errors import BaseModelError, UnreadableFile
from vessel_export.sources.pickle_reader import PickleRefused, StoredTensor
from vessel_export.sources.torch_file import FLOATS, DamagedFile, read_torch_file
from vessel_rt.errors import first_line

__all__ = ["build_sam2", "find_sam2_yaml", "parse_sam2_config", "read_sam2_config", "read_sam2_state"]

_LONGEST = 1 << 16  # characters; sam2's have 4,000
_DEEPEST = 12  # nested mappings and lists; sam2's have 6
_LARGEST = 1 << 14  # far above any size in sam2's; a layer of that width still fits into memory
_PACKAGED = {  # Meta's name of a checkpoint -> its configuration in the sam2 package
    "sam2_hiera_tiny.pt": "sam2_hiera_t.yaml",
    "sam2_hiera_small.pt": "sam2_hiera_s.yaml",
    "sam2_hiera_base_plus.pt": "sam2_hiera_b+.yaml",
    "sam2_hiera_large.pt": "sam2_hiera_l.yaml",
}

# Class in sam2.modeling -> its arguments in sam2's own four configurations, and the sizes that differ in a smaller model.
_CLASSES = {
    "sam2_base.SAM2Base": """
        image_encoder memory_attention memory_encoder num_maskmem image_size sigmoid_scale_for_mem_enc sigmoid_bias_for_mem_enc
        use_mask_input_as_output_without_sam directly_add_no_mem_embed use_high_res_features_in_sam multimask_output_in_sam
        iou_prediction_use_sigmoid use_obj_ptrs_in_encoder add_tpos_enc_to_obj_ptrs only_obj_ptrs_in_the_past_for_eval pred_obj_scores
        pred_obj_scores_mlp fixed_no_obj_ptr multimask_output_for_tracking use_multimask_token_for_obj_ptr multimask_min_pt_num
        multimask_max_pt_num use_mlp_for_obj_ptr_proj compile_image_encoder""",
    "backbones.image_encoder.ImageEncoder": "scalp trunk neck",
    "backbones.hieradet.Hiera": "embed_dim num_heads stages global_att_blocks window_pos_embed_bkg_spatial_size window_spec",
    "backbones.image_encoder.FpnNeck": "position_encoding d_model backbone_channel_list fpn_top_down_levels fpn_interp_model",
    "position_encoding.PositionEmbeddingSine": "num_pos_feats normalize scale temperature",
    "memory_attention.MemoryAttention": "d_model pos_enc_at_input layer num_layers",
    "memory_attention.MemoryAttentionLayer": """
        activation dim_feedforward dropout pos_enc_at_attn self_attention d_model pos_enc_at_cross_attn_keys
        pos_enc_at_cross_attn_queries cross_attention""",
    "sam.transformer.RoPEAttention": """
        rope_theta feat_sizes rope_k_repeat embedding_dim num_heads downsample_rate dropout kv_in_dim""",
    "memory_encoder.MemoryEncoder": "in_dim out_dim position_encoding mask_downsampler fuser",
    "memory_encoder.MaskDownSampler": "embed_dim kernel_size stride padding",
    "memory_encoder.Fuser": "layer num_layers",
    "memory_encoder.CXBlock": "dim kernel_size padding layer_scale_init_value use_dwconv",
}
_ARGUMENTS = {f"sam2.modeling.{name}": frozenset(arguments.split()) for name, arguments in _CLASSES.items()}
_ROOT = "sam2.modeling.sam2_base.SAM2Base"


def find_sam2_yaml(weights: Path) -> Path:
    """The .yaml next to the .pt `weights`, or the one in the sam2 package for Meta's file name.

    Raises:
        BaseModelError: there is neither.
    """
    path = weights.with_suffix(".yaml")
    if path.is_file():
        return path
    if weights.name in _PACKAGED:
        return Path(str(importlib.resources.files("sam2").joinpath("configs", "sam2", _PACKAGED[weights.name])))
    raise BaseModelError(f"{weights}: no configuration for it; put its .yaml next to it as {path.name}")


def read_sam2_config(path: Path) -> dict[str, Any]:
    """The checked `model` of the .yaml at `path`: plain values, and classes of SAM 2.0 at `_target_`.

    Raises:
        BaseModelError: the file cannot be read, is not YAML, or has something that SAM 2.0's own configurations do not have.
    """
    try:
        return parse_sam2_config(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as e:
        reason = UnreadableFile(first_line(e))
        raise BaseModelError(f"{path}: not a configuration of SAM 2.0: {reason}; use the .yaml that sam2 has for the model") from e


def parse_sam2_config(text: str) -> dict[str, Any]:
    """As `read_sam2_config`, from the .yaml's text. Raises ValueError."""
    _check_syntax(text)
    try:
        document = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ArithmeticError, TypeError) as e:
        raise ValueError(first_line(e)) from e
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict):
        raise ValueError("it has no model")
    _check(model, "model")
    if model["_target_"] != _ROOT:
        raise ValueError(f"its model is not {_ROOT}")
    try:
        size, width = model["image_size"], model["image_encoder"]["neck"]["d_model"]
    except (KeyError, TypeError) as e:
        raise ValueError("it lacks model.image_size or model.image_encoder.neck.d_model") from e
    if type(size) is not int or type(width) is not int or size < 1 or width < 1:
        raise ValueError("model.image_size and model.image_encoder.neck.d_model must be positive integers")
    return model


def read_sam2_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of SAM2's .pt, `{"model": state_dict}`, by name and memory-mapped. Values are checked against the file's CRC-32.

    Raises:
        BaseModelError: damaged, not SAM2's, or with something other than dense floating-point tensors.
    """
    try:
        file = read_torch_file(path, check_values=True)
        state = file.document["model"] if isinstance(file.document, dict) else None
        if not isinstance(state, dict) or not state:
            raise DamagedFile("has no tensors under 'model'")
        if not all(isinstance(tensor, StoredTensor) and tensor.dtype in FLOATS for tensor in state.values()):
            raise DamagedFile("has something other than dense floating-point tensors under 'model'")
        return {str(name): file.tensor(stored) for name, stored in state.items()}
    except (PickleRefused, DamagedFile, KeyError, OSError) as e:
        raise BaseModelError(f"{path}: not a SAM2 checkpoint: {first_line(e)}; download it again") from e


def build_sam2(config: Mapping[str, Any]) -> torch.nn.Module:
    """sam2's SAM2Base with random weights, for a configuration from `read_sam2_config`.

    Raises:
        ValueError: the classes do not accept this combination of values.
    """
    try:
        model: torch.nn.Module = _built(config)
    except Exception as e:  # sam2 fails in many ways: AssertionError, KeyError, torch's RuntimeError
        raise ValueError(f"sam2 does not accept its values ({type(e).__name__}: {first_line(e)})") from e
    return model


def _built(value: Any) -> Any:
    if isinstance(value, Mapping):
        module, _, name = value["_target_"].rpartition(".")
        arguments = {key: _built(argument) for key, argument in value.items() if key != "_target_"}
        return getattr(importlib.import_module(module), name)(**arguments)
    return value


def _check_syntax(text: str) -> None:
    """Refuse anchors, tags, interpolations and deep nesting, which can expand to more than they seem."""
    if len(text) > _LONGEST:
        raise ValueError(f"it has {len(text)} characters; sam2's have fewer than {_LONGEST}")
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ValueError(f"line {line} has an anchor or an alias")
            if getattr(event, "tag", None):
                raise ValueError(f"line {line} has a tag, {event.tag}")
            if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
                raise ValueError(f"line {line} has an interpolation")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"line {line} is {depth} levels deep")
    except yaml.YAMLError as e:
        raise ValueError(f"it is not YAML ({first_line(e)})") from e


def _check(value: Any, where: str) -> None:
    if isinstance(value, dict):
        target = value.get("_target_")
        if not isinstance(target, str) or target not in _ARGUMENTS:
            raise ValueError(f"{where} is {str(target)[:100]!r}, not a class of SAM 2.0's configurations")
        unknown = sorted(str(key)[:100] for key in value if key != "_target_" and key not in _ARGUMENTS[target])
        if unknown:
            raise ValueError(f"{where} has {', '.join(unknown)}, which {target} does not accept")
        if value.get("compile_image_encoder"):
            raise ValueError(f"{where}.compile_image_encoder must be false")
        for key, inner in value.items():
            if key != "_target_":
                _check(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            if type(inner) is not int:
                raise ValueError(f"{where} is not a list of integers")
            _check(inner, where)
    elif isinstance(value, int | float):
        if not math.isfinite(value) or abs(value) > _LARGEST:
            raise ValueError(f"{where} is {value:g}, beyond sam2's largest value, {_LARGEST}")
    elif value is not None and not (isinstance(value, str) and value in ("relu", "gelu", "glu", "nearest", "bilinear")):
        raise ValueError(f"{where} is not a value of SAM 2.0's configurations")

"""The least work of one run of a stage, from bundle.json alone: floating-point operations and bytes moved.

vessel_export.graphs.costs defines what is counted, and counts it in a graph. Knows the dynamic axes of docs/architecture.md. Does not know
about machines.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from vessel_rt.formats.bundle import Bundle, TensorSpec

__all__ = ["Cost", "stage_cost"]

# Bytes of a value of a TensorSpec's dtype.
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
# The axis that counts a stage's units of work.
_UNITS = {"vision_encoder": "tiles", "sam2_image_encoder": "images", "sam2_mask_decoder": "masks"}
_OF_ONE_FRAME = ("sam2_memory_encoder", "sam2_tracking_decoder")


@dataclasses.dataclass(frozen=True)
class Cost:
    """The floating-point operations of one run, and the minimum of bytes that it reads and writes."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def stage_cost(bundle: Bundle, stage: str, sizes: Mapping[str, int]) -> Cost | None:
    """The cost of one run of a stage; `sizes` has the size of each dynamic axis. None if an older version exported the bundle.

    Bytes are those of the weights' files, and of the inputs and outputs. Of the KV cache only the live slots are read, and those of this
    call are written.
    """
    spec = bundle.all_stages[stage]
    if not spec.flops or not spec.weights or (stage == "sam2_memory_attention" and not bundle.require_cine().memory_flops):
        return None
    edges = sum(_edge_bytes(value, sizes) for value in (*spec.inputs, *spec.outputs))
    return Cost(_flops(bundle, stage, sizes), _weight_bytes(bundle, stage) + edges)


def _flops(bundle: Bundle, stage: str, sizes: Mapping[str, int]) -> int:
    one, model = bundle.all_stages[stage].flops, bundle.language_model
    if stage in _OF_ONE_FRAME:
        return one
    if stage == "sam2_memory_attention":
        return one + _more_keys(bundle, sizes)
    if stage != "language_model":
        return one * sizes[_UNITS[stage]]
    # `one` is that of a token that attends to one slot and whose next token is asked for. Queries are as wide as the residual stream.
    head, attention = 2 * model.hidden_size * model.vocabulary, 4 * model.layers * model.hidden_size
    batch, tokens = sizes["batch"], sizes["sequence"]
    return batch * (tokens * (one - head - attention) + attention * tokens * sizes["live"] + sizes["kept"] * head)


def _weight_bytes(bundle: Bundle, stage: str) -> int:
    """The bytes of the weights' files, without the two linear layers of text_hidden_fcs that a tracking decoder's file has for prompts."""
    files = bundle.weight_bytes(stage)
    if stage != "sam2_tracking_decoder":
        return files
    features, hidden = bundle.all_stages[stage].input("conditioned_features"), bundle.language_model.hidden_size
    _, channels, *_ = features.fixed
    return files - (hidden + 1) * (hidden + channels) * _BYTES[features.dtype]


def _more_keys(bundle: Bundle, sizes: Mapping[str, int]) -> int:
    """The operations for the keys of sam2_memory_attention after those of one memory and one object pointer.

    A memory [M, H, W] has H * W keys, and a pointer [C] has C / M. The operations for each key are the same.
    """
    cine = bundle.require_cine()
    attention = cine.stages["sam2_memory_attention"]
    (channels, height, width), (pointer,) = attention.input("memories").fixed, attention.input("object_pointers").fixed
    of_pointers = cine.memory_flops * (pointer // channels) * (sizes["pointers"] - 1) // (height * width)
    return cine.memory_flops * (sizes["memories"] - 1) + of_pointers


def _edge_bytes(value: TensorSpec, sizes: Mapping[str, int]) -> int:
    shape = [axis if isinstance(axis, int) else sizes[axis] for axis in value.shape]
    if value.name.startswith(("past_", "present_")):  # [batch, kv_heads, capacity, head_dim]
        shape[2] = sizes["sequence"] if value.name.startswith("present_") else max(sizes["live"] - sizes["sequence"], 0)
    return math.prod(shape) * _BYTES[value.dtype]

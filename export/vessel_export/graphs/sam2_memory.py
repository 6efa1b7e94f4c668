"""The graphs of SAM2's memory: sam2_memory_encoder and sam2_memory_attention. They hold only weights that training freezes.

Both are of one object and one frame, as Sa2VA tracks: each [SEG] by itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vessel_export.graphs.activations import memory_attention_bytes, memory_encoder_bytes
from vessel_export.graphs.assemble import Graph
from vessel_export.graphs.torch_export import trace
from vessel_export.io.safetensors_writer import OutputTensor

__all__ = ["Sam2MemoryAttention", "Sam2MemoryEncoder", "trace_sam2_memory_attention", "trace_sam2_memory_encoder", "tracking_fault"]

# What the graphs, the runtime's memory bank and Sa2VA's inference take for granted of SAM2's configuration.
_SETTINGS = {
    "directly_add_no_mem_embed": True,
    "use_obj_ptrs_in_encoder": True,
    "add_tpos_enc_to_obj_ptrs": False,
    "only_obj_ptrs_in_the_past_for_eval": True,
    "max_cond_frames_in_attn": -1,
    "memory_temporal_stride_for_eval": 1,
    "non_overlap_masks_for_mem_enc": False,
    "binarize_mask_from_pts_for_mem_enc": False,
    "no_obj_embed_spatial": None,
    "pred_obj_scores": True,
    "fixed_no_obj_ptr": True,
    "soft_no_obj_ptr": False,
    "multimask_output_in_sam": True,
    "multimask_output_for_tracking": True,
    "use_multimask_token_for_obj_ptr": True,
    "multimask_min_pt_num": 0,
}


def tracking_fault(sam2_model: Any) -> str | None:
    """The setting of SAM2's configuration that is not SAM 2.0's, in words; None if cines can be tracked with it."""
    for name, value in _SETTINGS.items():
        if (found := getattr(sam2_model, name)) != value:
            return f"{name} is {found}, not {value}"
    attention = sam2_model.memory_attention
    rotations = [part.compute_cis.keywords for layer in attention.layers for part in (layer.self_attn, layer.cross_attn_image)]
    if any(rotation != rotations[0] for rotation in rotations):
        return "the layers of memory_attention differ in rope_theta or in the width of heads"
    for layer in attention.layers:
        if (layer.self_attn.num_heads, layer.cross_attn_image.num_heads) != (1, 1):
            return "memory_attention has several heads"
        if (layer.pos_enc_at_attn, layer.pos_enc_at_cross_attn_queries, layer.pos_enc_at_cross_attn_keys) != (False, False, True):
            return "memory_attention adds positions elsewhere than to the keys"
    if not (attention.pos_enc_at_input and attention.batch_first):
        return "memory_attention adds no positions to its input"
    return None


_PARTS = 16  # of the queries, on a CPU: as many threads can work; with 4 and 64, two threads took 6 % and 28 % more time


class Sam2MemoryEncoder(nn.Module):
    """A frame's features and mask -> its memory (SAM2Base._encode_new_memory), in FP32 in every precision.

    The frame's features are those without `no_mem_embed`, which sam2_image_encoder adds.
    """

    def __init__(self, sam2_model: Any) -> None:
        super().__init__()
        self.memory_encoder = sam2_model.memory_encoder
        self.no_mem_embed = sam2_model.no_mem_embed
        self.side = sam2_model.image_size
        self.scale, self.bias = sam2_model.sigmoid_scale_for_mem_enc, sam2_model.sigmoid_bias_for_mem_enc

    def forward(self, image_features: Tensor, low_res_logits: Tensor) -> Tensor:
        """image_features F [1, C, H, W], low_res_logits float32 [1, 4H, 4W] -> memory float32 [1, M, H, W]."""
        features = image_features.float() - self.no_mem_embed.reshape(1, -1, 1, 1)
        logits = nn.functional.interpolate(low_res_logits[:, None], size=(self.side, self.side), mode="bilinear", align_corners=False)
        mask = logits.sigmoid() * self.scale + self.bias
        memory: Tensor = self.memory_encoder(features, mask, skip_mask_sigmoid=True)["vision_features"]
        return memory


class Sam2MemoryAttention(nn.Module):
    """A frame's features and the memory bank -> the features conditioned on it (sam2's MemoryAttention, its layers spelled out).

    Rotations are real: pairs of neighbouring channels of queries and keys are moved to the two halves of a head, in the matrices. Object
    pointers are keys that are not rotated: their angles are 0.
    """

    spatial: Tensor  # [H * W, M]
    temporal: Tensor  # float32 [memories, 1, M]
    position: Tensor  # [1, H * W, C]
    cos: Tensor  # float32 [H * W, head_dim / 2]
    sin: Tensor

    def __init__(self, sam2_model: Any, *, for_cpu: bool) -> None:
        super().__init__()
        attention, side = sam2_model.memory_attention, sam2_model.sam_image_embedding_size
        self.layers, self.norm = attention.layers, attention.norm
        self.no_mem_embed = sam2_model.no_mem_embed
        self.memory_channels = sam2_model.mem_dim
        with torch.no_grad():
            positions = (sam2_model.image_encoder.neck.position_encoding, sam2_model.memory_encoder.position_encoding)
            own, spatial = (encoding(torch.zeros(1, 1, side, side)).flatten(2).transpose(1, 2) for encoding in positions)
        self.register_buffer("position", 0.1 * own)  # as in MemoryAttention.forward
        self.register_buffer("spatial", spatial[0])
        self.register_buffer("temporal", sam2_model.maskmem_tpos_enc.detach().flatten(1)[:, None])
        self.self_attentions = nn.ModuleList(_RotaryAttention(layer.self_attn, for_cpu=for_cpu) for layer in self.layers)
        self.cross_attentions = nn.ModuleList(_RotaryAttention(layer.cross_attn_image, for_cpu=for_cpu) for layer in self.layers)
        angles = self.layers[0].self_attn.compute_cis(end_x=side, end_y=side).angle()
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, image_features: Tensor, memories: Tensor, temporal_positions: Tensor, object_pointers: Tensor) -> Tensor:
        """image_features [1, C, H, W], memories [memories, M, H, W], temporal_positions int64 [memories], object_pointers [pointers, C]
        -> conditioned_features [1, C, H, W]."""
        features = (image_features - self.no_mem_embed.reshape(1, -1, 1, 1)).flatten(2).transpose(1, 2)  # [1, H * W, C]
        values = memories.flatten(2).transpose(1, 2)  # [memories, H * W, M]
        keys = values + (self.spatial + self.temporal.index_select(0, temporal_positions).to(values.dtype))
        pointers = object_pointers.reshape(1, -1, self.memory_channels)  # C / M tokens each
        keys, values = (torch.cat([part.reshape(1, -1, self.memory_channels), pointers], dim=1) for part in (keys, values))
        x = features + self.position
        for layer, own, cross in zip(self.layers, self.self_attentions, self.cross_attentions, strict=True):
            normed = layer.norm1(x)
            x = x + own(normed, normed, normed, self.cos, self.sin)
            x = x + cross(layer.norm2(x), keys, values, self.cos, self.sin, pointers.shape[1])
            x = x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))
        return self.norm(x).transpose(1, 2).reshape(image_features.shape)


class _RotaryAttention(nn.Module):
    """sam2's RoPEAttention, which has one head, in real arithmetic, with FP32 rotations.

    The weights of a query's values add up to 1, so values may be weighted before they are projected. A CPU does so, since those of memories
    are a fourth as wide as a head; TensorRT takes only values as wide as keys. ONNX Runtime's CPU kernel gives each head of queries to one
    thread, so there, parts of the queries are heads that share the keys. Both are the same attention.
    """

    def __init__(self, source: Any, *, for_cpu: bool) -> None:
        super().__init__()
        order = torch.arange(source.internal_dim).reshape(-1, 2).T.flatten()  # the even channels, then the odd
        self.q_proj, self.k_proj = (_reordered(linear, order) for linear in (source.q_proj, source.k_proj))
        self.v_proj, self.out_proj = source.v_proj, source.out_proj
        self.for_cpu = for_cpu

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, fixed: int | None = None) -> Tensor:
        """q [1, H * W, C], k and v [1, keys, width], of which the last `fixed` are not rotated (None: all are) -> [1, H * W, C]."""
        q, k = _rotated(self.q_proj(q), cos, sin), self.k_proj(k)
        end = k.shape[1] - (fixed or 0)
        turned = _rotated(k[:, :end].reshape(-1, *q.shape[1:]), cos, sin).reshape(1, -1, q.shape[-1])
        k = turned if fixed is None else torch.cat([turned, k[:, end:]], dim=1)
        heads = q.reshape(1, math.gcd(_PARTS, q.shape[1]) if self.for_cpu else 1, -1, q.shape[-1])
        values = v if self.for_cpu else self.v_proj(v)
        k, values = (part.reshape(1, 1, -1, part.shape[-1]) for part in (k, values))
        attended = nn.functional.scaled_dot_product_attention(heads, k, values, enable_gqa=self.for_cpu).reshape(*q.shape[:2], -1)
        return self.out_proj(self.v_proj(attended) if self.for_cpu else attended)


def _reordered(linear: nn.Linear, order: Tensor) -> nn.Linear:
    """`linear` with its outputs in another order. A product of queries and keys does not change if both are reordered."""
    result = nn.Linear(linear.in_features, linear.out_features)
    result.weight.data, result.bias.data = linear.weight.data[order], linear.bias.data[order]
    return result


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., H * W, head_dim], turned by the angle of each position and channel: (a + ib) (cos + i sin), a and b being its halves."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def trace_sam2_memory_encoder(sam2_model: Any, dtype: torch.dtype, *, opset: int) -> tuple[Graph, list[OutputTensor]]:
    """The stage's graph and FP32 weights; `dtype` is that of the image's features."""
    channels, side = sam2_model.sam_prompt_embed_dim, sam2_model.sam_image_embedding_size
    inputs = {"image_features": torch.zeros(1, channels, side, side, dtype=dtype), "low_res_logits": torch.zeros(1, 4 * side, 4 * side)}
    size = memory_encoder_bytes(side, channels)
    module = Sam2MemoryEncoder(sam2_model).float()
    return trace("sam2_memory_encoder", module, inputs, ("memory",), {}, opset=opset, activation_bytes=size)


def trace_sam2_memory_attention(sam2_model: Any, dtype: torch.dtype, *, opset: int) -> tuple[Graph, list[OutputTensor]]:
    """The stage's graph and weights in `dtype`, of which FP32 is for CPUs; the numbers of memories and of object pointers are dynamic."""
    channels, side = sam2_model.sam_prompt_embed_dim, sam2_model.sam_image_embedding_size
    module = Sam2MemoryAttention(sam2_model, for_cpu=dtype == torch.float32)
    tables = module.temporal, module.cos, module.sin
    module.to(dtype)
    module.temporal, module.cos, module.sin = tables
    inputs = {
        "image_features": torch.zeros(1, channels, side, side, dtype=dtype),
        "memories": torch.zeros(3, sam2_model.mem_dim, side, side, dtype=dtype),
        "temporal_positions": torch.zeros(3, dtype=torch.int64),
        "object_pointers": torch.zeros(5, channels, dtype=dtype),
    }
    dynamic = dict.fromkeys(("memories", "temporal_positions"), "memories") | {"object_pointers": "pointers"}
    size = memory_attention_bytes(side, channels, sam2_model.mem_dim, dtype.itemsize)
    outputs = ("conditioned_features",)
    return trace("sam2_memory_attention", module, inputs, outputs, dynamic, opset=opset, activation_bytes=size)

"""language_model: Qwen2 with a KV cache that is updated in place, in a form that ONNX Runtime and TensorRT both support completely.

TensorScatter writes keys and values to a cache of static length. The live part is sliced off by the *shape* of `kv_positions`. An explicit
mask `kv_position <= position_id` makes attention causal, whether the call takes a prompt, several tokens or one. (TensorRT's Attention has
one output and no past, and ignores `nonpad_kv_seqlen`; its `is_causal` is aligned to the upper left, which is wrong for decoding.)
Only the positions in `gather_positions` reach the final norm and the head, and only the arg-max of their logits leaves the graph.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vessel_export.graphs.activations import language_model_bytes
from vessel_export.graphs.assemble import Graph, assemble
from vessel_export.graphs.layers import FLOAT, Linear, ResidualLinear, merge_heads, split_heads
from vessel_export.sources.base_config import LanguageConfig

__all__ = ["build_language_model"]

_INT64 = ir.DataType.INT64


def build_language_model(config: LanguageConfig, vocabulary: int, capacity: int, dtype: ir.DataType) -> Graph:
    """The graph of docs/architecture.md, with a head of `vocabulary` rows and a cache of `capacity` tokens per batch row."""
    cache: list[int | str | None] = ["batch", config.kv_heads, capacity, config.head_dim]
    inputs = [
        ir.val("inputs_embeds", dtype, ["batch", "sequence", config.hidden_size]),
        ir.val("position_ids", _INT64, ["batch", "sequence"]),
        ir.val("write_indices", _INT64, ["batch"]),
        ir.val("kv_positions", _INT64, ["live"]),
        ir.val("gather_positions", _INT64, ["batch", "kept"]),
    ]
    inputs += [ir.val(f"past_{part}.{i}", dtype, cache) for i in range(config.layers) for part in ("key", "value")]
    outputs = [ir.val("hidden_states", dtype, ["batch", "kept", config.hidden_size]), ir.val("next_ids", _INT64, ["batch", "kept"])]
    outputs += [ir.val(f"present_{part}.{i}", dtype, cache) for i in range(config.layers) for part in ("key", "value")]
    size, model = language_model_bytes(config, int(dtype.itemsize)), _LanguageModel(config, vocabulary, capacity, dtype)
    return assemble("language_model", model, inputs, outputs, activation_bytes=size)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What all layers of one call share: the positions of the new tokens, the mask, and the rotary tables."""

    position_ids: ir.Value  # [batch, sequence]
    write_indices: ir.Value  # [batch]
    live: ir.Value  # [1]: how much of the cache is in use
    mask: ir.Value  # bool [batch, 1, sequence, live]
    cos: ir.Value  # FP32 [capacity, head_dim / 2]
    sin: ir.Value


class _LanguageModel(nn.Module):
    def __init__(self, config: LanguageConfig, vocabulary: int, capacity: int, dtype: ir.DataType) -> None:
        super().__init__("")
        self.rotary_cos = nn.Parameter([capacity, config.head_dim // 2], FLOAT)
        self.rotary_sin = nn.Parameter([capacity, config.head_dim // 2], FLOAT)
        self.layers = nn.ModuleList([_Layer(config, dtype) for _ in range(config.layers)])
        self.norm = _RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.lm_head = Linear(config.hidden_size, vocabulary, dtype, bias=False)
        self.dtype = dtype

    def forward(
        self,
        op: OpBuilder,
        inputs_embeds: ir.Value,
        position_ids: ir.Value,
        write_indices: ir.Value,
        kv_positions: ir.Value,
        gather_positions: ir.Value,
        *past: ir.Value,
    ) -> list[ir.Value]:
        live = op.Shape(kv_positions)
        mask = op.LessOrEqual(op.Unsqueeze(kv_positions, [0, 1, 2]), op.Unsqueeze(position_ids, [1, 3]))  # [batch, 1, sequence, live]
        step = _Step(position_ids, write_indices, live, mask, self.rotary_cos, self.rotary_sin)
        x = op.Cast(inputs_embeds, to=FLOAT)
        present: list[ir.Value] = []
        for i, layer in enumerate(self.layers):
            x, key, value = layer(op, x, step, past[2 * i], past[2 * i + 1])
            x.name = f"residual.{i}"  # engines/partition.py cuts the graph here
            present += [key, value]
        kept = op.GatherND(x, op.Unsqueeze(gather_positions, [2]), batch_dims=1)
        hidden_states = self.norm(op, kept)
        logits = self.lm_head(op, hidden_states)
        if self.dtype == ir.DataType.BFLOAT16:  # ONNX Runtime has no BF16 ArgMax
            logits = op.Cast(logits, to=FLOAT)
        next_ids = op.ArgMax(logits, axis=-1, keepdims=0)
        return [hidden_states, next_ids, *present]


class _RMSNorm(nn.Module):
    """FP32 in, FP32 arithmetic, F out."""

    def __init__(self, size: int, eps: float, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], FLOAT)
        self.eps, self.dtype = eps, dtype

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.Cast(op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.eps), to=self.dtype)


class _Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x is FP32. Returns x and the layer's whole cache."""

    def __init__(self, config: LanguageConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.input_layernorm = _RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.self_attn = _Attention(config, dtype)
        self.post_attention_layernorm = _RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.mlp = _Mlp(config, dtype)

    def forward(
        self, op: OpBuilder, x: ir.Value, step: _Step, past_key: ir.Value, past_value: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        normed = self.input_layernorm(op, x)
        mixed, key, value = self.self_attn(op, normed, step, past_key, past_value)
        x = op.Add(x, mixed)
        return op.Add(x, self.mlp(op, self.post_attention_layernorm(op, x))), key, value


class _Rotated(nn.Module):
    """`x @ weight + bias`, rotated: x F [batch, sequence, in] -> F [batch, heads, sequence, head_dim], with FP32 in between.

    `common`, for keys, is the average over all positions of what their bias adds. Subtracting it from all keys leaves the softmax unchanged
    and makes the logits smaller: Qwen2's biases make them so large that FP16 has no digits left for the differences between keys.
    """

    def __init__(self, in_features: int, heads: int, head_dim: int, dtype: ir.DataType, *, common: bool) -> None:
        super().__init__()
        out_features = heads * head_dim
        self.weight = nn.Parameter([in_features, out_features], dtype)
        self.bias = nn.Parameter([out_features], FLOAT)
        self.common = nn.Parameter([out_features], FLOAT) if common else None
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype

    def forward(self, op: OpBuilder, x: ir.Value, step: _Step) -> ir.Value:
        y = op.Add(op.Cast(op.MatMul(x, self.weight), to=FLOAT), self.bias)
        y = op.RotaryEmbedding(y, step.cos, step.sin, step.position_ids, num_heads=self.heads)
        y = y if self.common is None else op.Sub(y, self.common)
        return split_heads(op, op.Cast(y, to=self.dtype), self.heads, self.head_dim)


class _Attention(nn.Module):
    """Grouped-query attention over the live part of the cache. Returns the FP32 output and the cache."""

    def __init__(self, config: LanguageConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = _Rotated(config.hidden_size, config.heads, config.head_dim, dtype, common=False)
        self.k_proj = _Rotated(config.hidden_size, config.kv_heads, config.head_dim, dtype, common=True)
        self.v_proj = Linear(config.hidden_size, keys, dtype, bias=True)
        self.o_proj = ResidualLinear(queries, config.hidden_size, dtype, bias=False)

    def forward(
        self, op: OpBuilder, x: ir.Value, step: _Step, past_key: ir.Value, past_value: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        c = self.config
        q, k = self.q_proj(op, x, step), self.k_proj(op, x, step)
        v = split_heads(op, self.v_proj(op, x), c.kv_heads, c.head_dim)
        key = op.TensorScatter(past_key, k, step.write_indices, axis=2)
        value = op.TensorScatter(past_value, v, step.write_indices, axis=2)
        # ONNX's Attention scales Q and K by sqrt(scale) each before their product, so that FP16 logits stay in range.
        mixed = op.Attention(q, op.Slice(key, [0], step.live, [2]), op.Slice(value, [0], step.live, [2]), step.mask, scale=c.head_dim**-0.5)
        mixed = self.o_proj.shrunk(op, merge_heads(op, mixed, c.heads * c.head_dim))
        return self.o_proj(op, mixed), key, value


class _Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), in FP32."""

    def __init__(self, config: LanguageConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, dtype, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, dtype, bias=False)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, dtype, bias=False)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        gate = self.gate_proj(op, x)
        activated = self.down_proj.shrunk(op, op.Mul(gate, op.Sigmoid(gate)))
        return self.down_proj(op, op.Mul(activated, self.up_proj(op, x)))

"""vision_encoder: tiles -> image tokens. InternViT, pixel shuffle (v2) and the projector mlp1, as InternVL3 computes them."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vessel_export.graphs.activations import vision_encoder_bytes
from vessel_export.graphs.assemble import Graph, assemble
from vessel_export.graphs.layers import FLOAT, Linear, ResidualLinear, merge_heads, split_heads
from vessel_export.sources.base_config import VisionConfig

__all__ = ["build_vision_encoder"]

_PROJECTOR_EPS = 1e-5  # torch.nn.LayerNorm's default, as in mlp1; InternViT's norms take theirs from the configuration


def build_vision_encoder(config: VisionConfig, hidden_size: int, dtype: ir.DataType) -> Graph:
    """The graph `pixel_values` F [tiles, 3, S, S] -> `image_embeds` F [tiles, tokens_per_tile, hidden_size]."""
    encoder = _VisionEncoder(config, hidden_size, dtype)
    side = config.image_size
    pixel_values = ir.val("pixel_values", dtype, ["tiles", 3, side, side])
    image_embeds = ir.val("image_embeds", dtype, ["tiles", config.tokens_per_tile, hidden_size])
    size = vision_encoder_bytes(config, int(dtype.itemsize))
    return assemble("vision_encoder", encoder, [pixel_values], [image_embeds], activation_bytes=size)


class _VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig, hidden_size: int, dtype: ir.DataType) -> None:
        super().__init__("")
        self.vision_model = _VisionModel(config, dtype)
        self.projector = _Projector(config, hidden_size, dtype)

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        return self.projector(op, self.vision_model(op, pixel_values))


class _VisionModel(nn.Module):
    """InternViT without a final norm: [tiles, 3, S, S] -> FP32 [tiles, 1 + patches, hidden]."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config, dtype)
        self.layers = nn.ModuleList([_Layer(config, dtype) for _ in range(config.layers)])

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        x = self.embeddings(op, pixel_values)
        for layer in self.layers:
            x = layer(op, x)
        return x


class _Embeddings(nn.Module):
    """One convolution per patch, preceded by the class token; absolute positions are added to all."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        side, patch, hidden = config.image_size // config.patch_size, config.patch_size, config.hidden_size
        self.patch_embedding = _PatchEmbedding(patch, hidden, dtype)
        self.class_embedding = nn.Parameter([1, 1, hidden], FLOAT)
        self.position_embedding = nn.Parameter([1, 1 + side * side, hidden], FLOAT)
        self.hidden = hidden

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        patches = op.Cast(self.patch_embedding(op, pixel_values), to=FLOAT)
        tiles = op.Shape(pixel_values, start=0, end=1)
        class_token = op.Expand(self.class_embedding, op.Concat(tiles, [1, self.hidden], axis=0))
        return op.Add(op.Concat(class_token, patches, axis=1), self.position_embedding)


class _PatchEmbedding(nn.Module):
    def __init__(self, patch: int, hidden: int, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([hidden, 3, patch, patch], dtype)
        self.bias = nn.Parameter([hidden], dtype)
        self.patch, self.hidden = patch, hidden

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        patch = [self.patch, self.patch]
        x = op.Conv(pixel_values, self.weight, self.bias, kernel_shape=patch, strides=patch)
        return op.Transpose(op.Reshape(x, [0, self.hidden, -1]), perm=[0, 2, 1])  # [tiles, patches, hidden]


class _Layer(nn.Module):
    """x + ls1 * attention(norm1(x)), then x + ls2 * mlp(norm2(x)); x is FP32."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm1 = _LayerNorm(hidden, config.norm_eps, dtype)
        self.attn = _Attention(config, dtype)
        self.ls1 = nn.Parameter([hidden], FLOAT)
        self.norm2 = _LayerNorm(hidden, config.norm_eps, dtype)
        self.mlp = _Mlp(hidden, config.intermediate_size, hidden, dtype)
        self.ls2 = nn.Parameter([hidden], FLOAT)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        x = op.Add(x, op.Mul(self.attn(op, self.norm1(op, x)), self.ls1))
        return op.Add(x, op.Mul(self.mlp(op, self.norm2(op, x)), self.ls2))


class _LayerNorm(nn.Module):
    """FP32 in, FP32 arithmetic, F out."""

    def __init__(self, size: int, eps: float, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], FLOAT)
        self.bias = nn.Parameter([size], FLOAT)
        self.eps, self.dtype = eps, dtype

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.Cast(op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.eps), to=self.dtype)


class _Attention(nn.Module):
    """Full attention within a tile; FP32 out."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.heads, self.width = config.heads, config.hidden_size
        self.head_dim = config.hidden_size // config.heads
        self.qkv = Linear(self.width, 3 * self.width, dtype, bias=True)
        self.proj = ResidualLinear(self.width, self.width, dtype, bias=True)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        parts = op.Split(self.qkv(op, x), axis=-1, num_outputs=3, _outputs=3)
        q, k, v = (split_heads(op, part, self.heads, self.head_dim) for part in parts)
        mixed = op.Attention(q, k, v, scale=self.head_dim**-0.5)
        return self.proj(op, self.proj.shrunk(op, merge_heads(op, mixed, self.width)))


class _Mlp(nn.Module):
    """Linear, GELU (exact), Linear; FP32 out."""

    def __init__(self, size: int, inner: int, out: int, dtype: ir.DataType) -> None:
        super().__init__()
        self.fc1 = Linear(size, inner, dtype, bias=True)
        self.fc2 = ResidualLinear(inner, out, dtype, bias=True)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self.fc2(op, self.fc2.shrunk(op, op.Gelu(self.fc1(op, x))))


class _Projector(nn.Module):
    """Drop the class token, shuffle d x d patches into one token, then mlp1: LayerNorm, Linear, GELU, Linear."""

    def __init__(self, config: VisionConfig, hidden_size: int, dtype: ir.DataType) -> None:
        super().__init__()
        self.config = config
        wide = config.hidden_size * config.downsample**2
        self.norm = _LayerNorm(wide, _PROJECTOR_EPS, dtype)
        self.linear_1 = Linear(wide, hidden_size, dtype, bias=True)
        self.linear_2 = Linear(hidden_size, hidden_size, dtype, bias=True)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        c = self.config
        d, side = c.downsample, c.image_size // c.patch_size // c.downsample
        patches = op.Slice(x, [1], [1 + (side * d) ** 2], [1])
        # rows and columns of d x d blocks: [tiles, row, a, column, b, hidden] -> [tiles, row, column, a, b, hidden]
        blocks = op.Transpose(op.Reshape(patches, [-1, side, d, side, d, c.hidden_size]), perm=[0, 1, 3, 2, 4, 5])
        tokens = op.Reshape(blocks, [-1, side * side, d * d * c.hidden_size])
        return self.linear_2(op, op.Gelu(self.linear_1(op, self.norm(op, tokens))))

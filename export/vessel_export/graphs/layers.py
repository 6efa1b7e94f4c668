"""Layers that the two built graphs share, in the manner of torch.nn: `forward(op, x)` appends nodes and returns the output value.

Activations between matrix products are of the graph's type F; residual streams, norms and layer scales are FP32 in every precision
(docs/numerics.md says why). Matrices are stored [in, out].
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

__all__ = ["FLOAT", "Linear", "merge_heads", "split_heads"]

FLOAT = ir.DataType.FLOAT


class Linear(nn.Module):
    """`x @ weight + bias`: x F [..., in] -> F [..., out]."""

    def __init__(self, in_features: int, out_features: int, dtype: ir.DataType, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter([in_features, out_features], dtype)
        self.bias = nn.Parameter([out_features], dtype) if bias else None

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        y = op.MatMul(x, self.weight)
        return op.Add(y, self.bias) if self.bias is not None else y


def split_heads(op: OpBuilder, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """[batch, sequence, heads * head_dim] -> [batch, heads, sequence, head_dim]."""
    return op.Transpose(op.Reshape(x, [0, 0, heads, head_dim]), perm=[0, 2, 1, 3])


def merge_heads(op: OpBuilder, x: ir.Value, width: int) -> ir.Value:
    """[batch, heads, sequence, head_dim] -> [batch, sequence, width = heads * head_dim]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, width])

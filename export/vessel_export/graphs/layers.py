"""Layers shared by the two built graphs, in the style of torch.nn: `forward(op, x)` appends nodes and returns the output value.

Activations between matrix products have the graph's type F. Residual streams, norms and layer scales are FP32 in every precision; see
docs/numerics.md for the reasons. Matrices are stored [in, out].
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

__all__ = ["DEFAULT_EXPONENT", "FLOAT", "Linear", "ResidualLinear", "merge_heads", "split_heads"]

FLOAT = ir.DataType.FLOAT
DEFAULT_EXPONENT = 6  # until `vessel-export ranges` has measured: products up to 65504 * 2^6 = 4.2e6 stay in FP16's range


class Linear(nn.Module):
    """`x @ weight + bias`: x F [..., in] -> F [..., out]."""

    def __init__(self, in_features: int, out_features: int, dtype: ir.DataType, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter([in_features, out_features], dtype)
        self.bias = nn.Parameter([out_features], dtype) if bias else None

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        y = op.MatMul(x, self.weight)
        return op.Add(y, self.bias) if self.bias is not None else y


class ResidualLinear(nn.Module):
    """A product that is added to a residual stream: x F [..., in] -> FP32 [..., out].

    These products and their inputs are where large language models overflow FP16. In FP16 they are therefore computed from x / 2^s: the
    caller applies `shrunk` to one factor of x before it is multiplied, and the result is multiplied by 2^s in FP32. A power of two changes
    no digit. It only extends the range from 65504 to 65504 * 2^s (docs/numerics.md).
    """

    def __init__(self, in_features: int, out_features: int, dtype: ir.DataType, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter([in_features, out_features], dtype)
        self.bias = nn.Parameter([out_features], FLOAT) if bias else None
        self.shrink = self.grow = None
        if dtype == ir.DataType.FLOAT16:
            self.shrink = nn.Parameter([], data=ir.tensor(np.array(2.0**-DEFAULT_EXPONENT, np.float16)))
            self.grow = nn.Parameter([], data=ir.tensor(np.array(2.0**DEFAULT_EXPONENT, np.float32)))

    def shrunk(self, op: OpBuilder, factor: ir.Value) -> ir.Value:
        """`factor` / 2^s. `forward` expects one factor of its input in this form."""
        return factor if self.shrink is None else op.Mul(factor, self.shrink)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        y = op.Cast(op.MatMul(x, self.weight), to=FLOAT)
        y = y if self.grow is None else op.Mul(y, self.grow)
        return op.Add(y, self.bias) if self.bias is not None else y


def split_heads(op: OpBuilder, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """[batch, sequence, heads * head_dim] -> [batch, heads, sequence, head_dim]."""
    return op.Transpose(op.Reshape(x, [0, 0, heads, head_dim]), perm=[0, 2, 1, 3])


def merge_heads(op: OpBuilder, x: ir.Value, width: int) -> ir.Value:
    """[batch, heads, sequence, head_dim] -> [batch, sequence, width = heads * head_dim]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, width])

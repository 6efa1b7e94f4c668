"""Counts the minimum work of one run of a stage from its ONNX graph: floating-point operations and bytes moved.

Reads no weights, since the graph's own file has their sizes. Does not know about machines.

Operations are those of matrix products, with a multiplication and an addition for each term: MatMul, Gemm, Conv, ConvTranspose, Attention.
Norms, activations, softmax, biases and resizing are not counted. Attention counts every query with every key,
4 * batch * heads * queries * keys * head_dim, including pairs that a mask excludes.

Bytes are the weights, each read once, and the graph's inputs and outputs. Values in between need not leave the chip and are not counted.
For the KV cache, the `live - sequence` slots that earlier calls wrote are read, and the `sequence` slots of this call are written; the rest
of its capacity is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.stage_cost import Cost

__all__ = ["counted_cost", "graph_cost", "unit_flops"]

_Shape = tuple[int, ...]
# Other matrix products. No graph of this project has them, and they must not be ignored.
_UNCOUNTED = ("Einsum", "MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv", "DeformConv", "GRU", "LSTM", "RNN")

_LARGE = 1 << 14  # bytes


def unit_flops(model: ir.Model) -> int:
    """The operations of one run in which every dynamic axis is 1: of a tile, a token, an image or a mask. `model` is not changed.

    Raises:
        ValueError: see `graph_cost`.
    """
    axes = [axis.value for value in model.graph.inputs for axis in value.shape or () if isinstance(axis, ir.SymbolicDim)]
    return graph_cost(model.clone(), {axis: 1 for axis in axes if axis}).flops


def counted_cost(bundle: Bundle, stage: str, sizes: Mapping[str, int]) -> Cost:
    """The cost of one run of a stage of `bundle`, counted in its graph.

    `sizes` has the sizes of its inputs' dynamic axes (docs/architecture.md).

    Raises:
        ValueError: see `graph_cost`.
    """
    return graph_cost(ir.load(bundle.folder / bundle.all_stages[stage].file), sizes)


def graph_cost(model: ir.Model, sizes: Mapping[str, int]) -> Cost:
    """The cost of one run of `model`. Changes the shapes in `model` to those of the run.

    Raises:
        ValueError: an input's axis has no size, a required shape cannot be inferred, or a node cannot be counted.
    """
    weights = sum(_bytes(value, _static(value)) for value in model.graph.initializers.values())
    for value in model.graph.initializers.values():
        constant = value.const_value  # values of weights decide no shape; and onnx_ir refuses to read files that bundles share
        if isinstance(constant, ir.ExternalTensor) or (constant is not None and constant.nbytes > _LARGE):
            value.const_value = None
    for value in model.graph.inputs:
        value.shape = ir.Shape([_size(value, axis, sizes) for axis in value.shape or ()])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None  # the exporter's shape, with symbolic sizes
    fold_constants(model, onnx_shape_inference=True)  # a Reshape's target can depend on Shape, so shapes follow only from constant folding
    flops = sum(_flops(node) for node in model.graph)
    return Cost(flops, weights + sum(_edge_bytes(value, sizes) for value in (*model.graph.inputs, *model.graph.outputs)))


def _size(value: ir.Value, axis: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    if axis.value is None or axis.value not in sizes:
        raise ValueError(f"input {value.name}: its axis {axis.value} has no size")
    return sizes[axis.value]


def _static(value: ir.Value) -> _Shape:
    """The shape of `value`; ValueError if it is unknown."""
    shape = tuple(axis for axis in value.shape or () if isinstance(axis, int))
    if value.shape is None or len(shape) != len(value.shape):
        raise ValueError(f"the shape of {value.name} is unknown")
    return shape


def _bytes(value: ir.Value, shape: _Shape) -> int:
    if value.dtype is None:
        raise ValueError(f"the type of {value.name} is unknown")
    return math.ceil(math.prod(shape) * value.dtype.itemsize)  # itemsize is a fraction for types below 8 bits


def _edge_bytes(value: ir.Value, sizes: Mapping[str, int]) -> int:
    """Bytes of an input or output. For the KV cache, [batch, kv_heads, capacity, head_dim], only slots that are read or written."""
    shape, name = _static(value), value.name or ""
    if name.startswith(("past_", "present_")):
        slots = sizes["sequence"] if name.startswith("present_") else max(sizes["live"] - sizes["sequence"], 0)
        shape = (*shape[:2], slots, shape[3])
    return _bytes(value, shape)


def _flops(node: ir.Node) -> int:
    if node.domain not in ("", "ai.onnx") or node.op_type in _UNCOUNTED or any(_has_graph(a) for a in node.attributes.values()):
        raise ValueError(f"{node.op_type} {node.name}: cannot be counted")
    return _COUNTED[node.op_type](node) if node.op_type in _COUNTED else 0


def _has_graph(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _shape(node: ir.Node, value: ir.Value | None) -> _Shape:
    if value is None:
        raise ValueError(f"{node.op_type} {node.name}: lacks an input")
    try:
        return _static(value)
    except ValueError as e:
        raise ValueError(f"{node.op_type} {node.name}: {e}") from None


def _matmul(node: ir.Node) -> int:
    return 2 * math.prod(_shape(node, node.outputs[0])) * _shape(node, node.inputs[0])[-1]


def _gemm(node: ir.Node) -> int:
    transposed = node.attributes.get_int("transA", 0)
    return 2 * math.prod(_shape(node, node.outputs[0])) * _shape(node, node.inputs[0])[0 if transposed else 1]


def _conv(node: ir.Node) -> int:
    """Weights [out, in / group, ...]: each output value is a sum over the other axes. Padding counts as pixels."""
    return 2 * math.prod(_shape(node, node.outputs[0])) * math.prod(_shape(node, node.inputs[1])[1:])


def _conv_transpose(node: ir.Node) -> int:
    """Weights [in, out / group, ...]: each input value contributes to as many outputs as the other axes have values."""
    return 2 * math.prod(_shape(node, node.inputs[0])) * math.prod(_shape(node, node.inputs[1])[1:])


def _attention(node: ir.Node) -> int:
    """Q [batch, heads, queries, head_dim], K [batch, kv_heads, keys, head_dim] -> [batch, heads, queries, V's head_dim]."""
    q, k, out = _shape(node, node.inputs[0]), _shape(node, node.inputs[1]), _shape(node, node.outputs[0])
    if len(q) != 4 or any(node.inputs[4:]):
        raise ValueError(f"Attention {node.name}: only 4-D inputs without a past can be counted")
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + out[3])


_COUNTED: dict[str, Callable[[ir.Node], int]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
}

"""Quantizes a graph's matrices to int8 or int4: some rows of a column share a scale, and there is no zero point.

There are three forms, named by their operators. In `DequantizeLinear`, the standard one, for GPUs, a matrix [in, out] becomes integers
[in, out] before `MatMul`. Int8 has a scale for each column, [out], and int4 one for each block of rows of it, [in / block, out]. These are
what TensorRT-RTX 1.7.1 multiplies by as they are; others it widens to FP16 before each product (docs/engines.md). The other two are ONNX
Runtime's own operators for CPUs, which also round the activations to 8 bits. `MatMulNBits` always has blocks, and is the fastest for a few
rows. `MatMulIntegerToFloat` is the fastest for thousands of rows: int8 only, with one scale for a whole column. Scales have the graph's
type F. Values are computed piece by piece from those that an unquantized bundle would round to F. Does not know what the graphs compute.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from vessel_export.graphs.assemble import Graph
from vessel_export.io.safetensors_writer import PIECE, OutputTensor

__all__ = ["BLOCKS", "Form", "MatrixType", "quantize_graph", "quantized", "with_quantized"]

Form: TypeAlias = Literal["DequantizeLinear", "MatMulNBits", "MatMulIntegerToFloat"]

BLOCKS = (128, 64, 32, 16)  # the first that divides a matrix's rows; smaller ones are not fused
_COLUMNS = 16  # TensorRT-RTX widens matrices whose columns are not a multiple of this
_SCALE = "_scale"  # after a matrix's name
_DOMAIN = "com.microsoft"
_ACCURACY = 4  # activations are rounded to 8 bits; other levels take 20 to 100 times longer for one row
_ZERO, _GELU_ZERO = 128, 32  # of activations in 8 bits
_CONSTANTS = {"quantized/last": np.array([-1]), "quantized/one": np.float32(1), "quantized/least": np.float32(1e-30)}


@dataclasses.dataclass(frozen=True)
class MatrixType:
    """Integers from -largest to largest, and their type in a graph. The range is symmetric, so the most negative integer is not used."""

    name: str
    largest: int
    dtype: ir.DataType

    @property
    def bits(self) -> int:
        """Of one integer."""
        return int(self.dtype.itemsize * 8)

    @classmethod
    def named(cls, name: str) -> MatrixType:
        """The type that a recipe calls `name`."""
        return cls(name, 127, ir.DataType.INT8) if name == "int8" else cls(name, 7, ir.DataType.INT4)


def quantize_graph(
    graph: Graph,
    kind: MatrixType,
    keep: Sequence[str] = (),
    form: Form = "DequantizeLinear",
    *,
    exempt: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, int], dict[str, str]]:
    """Make every weight that is the right operand of MatMul quantized, in place.

    Names that match a pattern of `keep`, and those in `exempt`, which has the reasons, are left as they are. In the standard form a matrix
    gets columns of zeros up to a multiple of 16, and the product is cut to those that it had.

    Returns the number of rows that share a scale for each such matrix, and for matrices that stay as they are the reason.
    """
    blocks: dict[str, int] = {}
    kept: dict[str, str] = {}
    for weight in graph.weights:
        uses = list(weight.uses())
        if not uses or any((node.op_type, index) != ("MatMul", 1) for node, index in uses):
            continue
        shape = [int(size) for size in weight.shape or () if isinstance(size, int)]
        in_blocks = form == "MatMulNBits" or (form == "DequantizeLinear" and kind.bits == 4)
        name, block = str(weight.name), next((block for block in (BLOCKS if in_blocks else shape[:1]) if shape[0] % block == 0), None)
        if name in exempt:
            kept[name] = exempt[name]
            continue
        if pattern := next((pattern for pattern in keep if fnmatchcase(name, pattern)), None):
            kept[name] = f"the recipe keeps {pattern}"
            continue
        if block is None:
            kept[name] = f"its {shape[0]} rows are not a multiple of {BLOCKS[-1]}"
            continue
        blocks[name] = block
        _REWRITES[form](graph.model.graph, weight, shape, block, kind)
    return blocks, kept


def _scale_of(graph: ir.Graph, weight: ir.Value, shape: Sequence[int]) -> ir.Value:
    scale = ir.Value(name=f"{weight.name}{_SCALE}", shape=ir.Shape(shape), type=weight.type)
    graph.initializers[str(scale.name)] = scale
    return scale


def _fuse(graph: ir.Graph, weight: ir.Value, shape: Sequence[int], block: int, kind: MatrixType) -> None:
    rows, columns = shape
    scale = _scale_of(graph, weight, [columns * rows // block])
    weight.shape, weight.type = ir.Shape([columns, rows // block, block * kind.bits // 8]), ir.TensorType(ir.DataType.UINT8)
    attributes = {"K": rows, "N": columns, "bits": kind.bits, "block_size": block, "accuracy_level": _ACCURACY}
    for user, _ in list(weight.uses()):
        node = ir.node("MatMulNBits", [user.inputs[0], weight, scale], attributes, domain=_DOMAIN, name=user.name)
        ir.convenience.replace_nodes_and_values(graph, user, [user], [node], user.outputs, node.outputs)
    graph.opset_imports[_DOMAIN] = 1


def _dequantize(graph: ir.Graph, weight: ir.Value, shape: Sequence[int], block: int, kind: MatrixType) -> None:
    uses = list(weight.uses())
    (rows, columns), stored = shape, _padded(shape[1])
    scale = _scale_of(graph, weight, [stored] if kind.bits == 8 else [rows // block, stored])
    attributes = {"axis": 1} if kind.bits == 8 else {"axis": 0, "block_size": block}
    node = ir.node("DequantizeLinear", [weight, scale], attributes, name=f"{weight.name}/DequantizeLinear")
    wide = node.outputs[0]
    wide.name, wide.shape, wide.type = f"{weight.name}/dequantized", ir.Shape([rows, stored]), weight.type
    weight.shape, weight.type = wide.shape, ir.TensorType(kind.dtype)
    graph.insert_before(uses[0][0], node)
    for user, index in uses:
        user.replace_input_with(index, wide)
        if stored > columns:
            _cut(graph, user, columns, stored)


def _padded(columns: int) -> int:
    return -(-columns // _COLUMNS) * _COLUMNS


def _cut(graph: ir.Graph, product: ir.Node, columns: int, stored: int) -> None:
    """Take the first `columns` of a product's `stored`; they have its name."""
    whole = product.outputs[0]
    bounds = [ir.node("Constant", [], {"value": ir.tensor([bound], ir.DataType.INT64)}) for bound in (0, columns, -1)]
    for node, bound in zip(bounds, ("start", "end", "axis"), strict=True):
        node.outputs[0].name = f"{whole.name}/{bound}"
    cut = ir.node("Slice", [whole, *(node.outputs[0] for node in bounds)], name=f"{product.name}/Slice")
    part = cut.outputs[0]
    part.type, part.shape = whole.type, whole.shape
    ir.convenience.replace_all_uses_with(whole, part, replace_graph_outputs=True)
    cut.replace_input_with(0, whole)
    part.name, whole.name = whole.name, f"{whole.name}/padded"
    whole.shape = None if whole.shape is None else ir.Shape([*whole.shape[:-1], stored])
    graph.insert_after(product, [*bounds, cut])


def _multiply_integers(graph: ir.Graph, weight: ir.Value, shape: Sequence[int], _block: int, _kind: MatrixType) -> None:
    """Each row of the activations x gets its own scale, the least with which it fits into 8 bits, and is rounded to integers around a zero
    point. Results of Gelu are above -0.17: a low zero point leaves most integers to the positive ones.
    """
    scale = _scale_of(graph, weight, shape[1:])
    weight.type = ir.TensorType(ir.DataType.INT8)
    last, one, least = (_constant(graph, name, value) for name, value in _CONSTANTS.items())
    zero = _constant(graph, f"{weight.name}/zero", np.int8(0))  # one for each matrix: ONNX Runtime converts them together
    for user, _ in list(weight.uses()):
        tape, x = Tape(), user.inputs[0]
        producer = x.producer() if x else None
        middle = _GELU_ZERO if producer and producer.op_type == "Gelu" else _ZERO
        above, below = (_constant(graph, f"quantized/{size}", np.float32(1 / size)) for size in (255 - middle, -middle))
        point = _constant(graph, f"quantized/zero{middle}", np.uint8(middle))
        highest = tape.op("Mul", [tape.op("ReduceMax", [x, last], {"keepdims": 1}), above])
        lowest = tape.op("Mul", [tape.op("ReduceMin", [x, last], {"keepdims": 1}), below])
        of_row = tape.op("Max", [highest, lowest, least])  # above zero also for a row of zeros
        points = tape.op("Expand", [point, tape.op("Shape", [of_row])])
        rounded = tape.op("QuantizeLinear", [x, of_row, points], {"axis": -1, "block_size": shape[0]})
        product = tape.op("MatMulIntegerToFloat", [rounded, weight, one, scale, point, zero], domain=_DOMAIN, name=user.name)
        product.type, product.shape = user.outputs[0].type, user.outputs[0].shape
        result = tape.op("Mul", [product, of_row])
        ir.convenience.replace_nodes_and_values(graph, user, [user], tape.nodes, user.outputs, [result])
    graph.opset_imports[_DOMAIN] = 1


def _constant(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    """An initializer of the graph, made when it is first needed."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.asarray(value), name=name)
        shape = ir.Shape(np.shape(value))
        graph.initializers[name] = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    return graph.initializers[name]


_REWRITES = {"DequantizeLinear": _dequantize, "MatMulNBits": _fuse, "MatMulIntegerToFloat": _multiply_integers}


def quantized(tensor: OutputTensor, block: int, kind: MatrixType, form: Form = "DequantizeLinear") -> tuple[OutputTensor, OutputTensor]:
    """The integers and the scales of `tensor` [in, out], as tensors of the names that the graph has.

    A scale is the block's largest magnitude / `kind.largest`, rounded to the tensor's dtype. A value is divided by its rounded scale, and
    rounded to the nearest integer, half to even: it is at most half a scale away from what is stored. Int4 values are stored two in a
    byte, the first in the lower half, as ONNX packs them. Columns that fill up a matrix are zeros with a scale of 1. A block of all rows
    takes the tensor's values twice: all of a column's decide its scale.

    `MatMulNBits` has [out, in / block, block] unsigned integers around 128 (8 for int4), and scales [out * in / block]. Its rows are the
    matrix's columns, so the integers of one matrix are in memory: 0.54 GB for the head of the 8B model.
    """
    rows, columns = tensor.shape
    if form == "DequantizeLinear" and _padded(columns) > columns:
        tensor, columns = _fill_up(tensor), _padded(columns)
    work = _Quantizer(tensor, block, kind)
    if form == "MatMulNBits":
        stored = columns, rows // block, block * kind.bits // 8

        def by_columns() -> Iterator[torch.Tensor]:
            whole = torch.cat(list(work.integers()))
            for strip in torch.split(whole.mT, max(1, PIECE // rows)):
                yield _unsigned(strip, kind).reshape(len(strip), *stored[1:])

        return (
            OutputTensor(tensor.name, stored, torch.uint8, by_columns),
            OutputTensor(
                f"{tensor.name}{_SCALE}", (columns * rows // block,), tensor.dtype, lambda: [torch.cat([*work.scales()]).mT.flatten()]
            ),
        )
    if kind.dtype == ir.DataType.INT4:  # .safetensors files have no such type
        integers = OutputTensor(tensor.name, (math.prod(tensor.shape) // 2,), torch.uint8, lambda: map(_packed, work.integers()))
    else:
        integers = OutputTensor(tensor.name, tensor.shape, torch.int8, work.integers)
    if kind.bits == 8:
        return integers, OutputTensor(f"{tensor.name}{_SCALE}", (columns,), tensor.dtype, lambda: (scale[0] for scale in work.scales()))
    return integers, OutputTensor(f"{tensor.name}{_SCALE}", (rows // block, columns), tensor.dtype, work.scales)


def _fill_up(tensor: OutputTensor) -> OutputTensor:
    rows, columns = tensor.shape
    stored = _padded(columns)

    def pieces() -> Iterator[torch.Tensor]:
        for piece in tensor.pieces():
            yield torch.nn.functional.pad(piece.mT, (0, 0, 0, stored - columns)).mT  # in the layout of a transposed view

    return OutputTensor(tensor.name, (rows, stored), tensor.dtype, pieces)


def with_quantized(
    tensors: Sequence[OutputTensor], blocks: Mapping[str, int], kind: MatrixType, form: Form = "DequantizeLinear"
) -> list[OutputTensor]:
    """The tensors of a file, with integers and scales in place of those in `blocks`, as `quantize_graph` returns them."""
    return [made for one in tensors for made in (quantized(one, blocks[one.name], kind, form) if one.name in blocks else (one,))]


class _Quantizer:
    """Integers and scales come from the same values. The scales wait in memory: they are less than a thirtieth of the values.

    `block` is the number of rows that share a scale: part of a piece, or all of them.
    """

    def __init__(self, tensor: OutputTensor, block: int, kind: MatrixType) -> None:
        self._tensor, self._block, self._largest = tensor, block, kind.largest
        self._scales: list[torch.Tensor] = []

    def integers(self) -> Iterator[torch.Tensor]:
        self._scales = []
        common = self._of_columns() if self._block == self._tensor.shape[0] else None
        for piece in self._tensor.pieces():
            block = self._block if common is None else len(piece)
            if len(piece) % block:
                raise ValueError(f"{self._tensor.name}: a piece of {len(piece)} rows is not whole blocks of {block}")
            # A wide piece in strips of columns: memory of this size is used again and again.
            width = max(1, PIECE // len(piece))
            given = [None] * -(-piece.shape[1] // width) if common is None else torch.split(common, width)
            strips = [self._rounded(strip, block, scale) for strip, scale in zip(torch.split(piece.mT, width), given, strict=True)]
            if common is None:
                self._scales.append(torch.cat([scale for _, scale in strips]).mT)
            yield torch.cat([integers for integers, _ in strips]).mT
        if common is not None:
            self._scales = [common.mT]

    def _of_columns(self) -> torch.Tensor:
        """The scales [out, 1] of whole columns."""
        found = torch.zeros(self._tensor.shape[1])
        for piece in self._tensor.pieces():
            for strip, magnitude in zip(*(torch.split(part, max(1, PIECE // len(piece))) for part in (piece.mT, found)), strict=True):
                torch.maximum(magnitude, torch.maximum(strip.amax(-1), -strip.amin(-1)).float(), out=magnitude)
        return self._scale(found[:, None])

    def _rounded(self, columns: torch.Tensor, block: int, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Some columns of a piece, [out, rows], as integers of this shape, and their scales [out, rows / block], which may be known."""
        blocks = columns.float().reshape(len(columns), -1, block)
        if scale is None:
            scale = self._scale(torch.maximum(blocks.amax(-1), blocks.amin(-1).neg_()))
        integers = (blocks / scale.float()[..., None]).round_().clamp_(-self._largest, self._largest)
        return integers.to(torch.int8).flatten(1), scale

    def _scale(self, magnitude: torch.Tensor) -> torch.Tensor:
        """The scales of blocks by their largest magnitudes. TensorRT requires scales above zero, so that of zeros is 1."""
        scale = (magnitude / self._largest).to(self._tensor.dtype)
        # Very small scales have few digits in FP16. The next larger one keeps the largest value within half a step.
        larger = scale.nextafter(torch.full_like(scale, math.inf))
        scale = torch.where(magnitude > (self._largest + 0.5) * scale.float(), larger, scale)
        return scale.masked_fill_(magnitude == 0, 1.0)

    def scales(self) -> Iterator[torch.Tensor]:
        if not self._scales:  # they come after the integers, which are larger, in a file
            deque(self.integers(), maxlen=0)
        yield from self._scales
        self._scales = []


def _unsigned(integers: torch.Tensor, kind: MatrixType) -> torch.Tensor:
    """Bytes of integers, which are shifted to be positive."""
    shifted = integers.to(torch.int16).add_(kind.largest + 1).to(torch.uint8)
    return shifted if kind.bits == 8 else _packed(shifted)


def _packed(integers: torch.Tensor) -> torch.Tensor:
    """Two int4 values in a byte."""
    pairs = integers.contiguous().view(torch.uint8).reshape(-1, 2)
    return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)

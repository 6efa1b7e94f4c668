"""Quantizes a graph's matrices to int8 or int4: every block of rows of a column shares a scale, and there is no zero point.

A matrix [in, out] becomes integers [in, out] and scales [in / block, out] of the graph's type F, and `DequantizeLinear` before `MatMul`.
This is standard ONNX: ONNX Runtime's CPU provider fuses the two (MatMulNBits), TensorRT compiles them. Values are computed piece by piece
from those that an unquantized bundle would round to F. Does not know what the graphs compute.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import onnx_ir as ir
import torch

from vessel_export.graphs.assemble import Graph
from vessel_export.io.safetensors_writer import PIECE, OutputTensor

__all__ = ["BLOCKS", "MatrixType", "add_dequantization", "quantized"]

BLOCKS = (128, 64, 32, 16)  # the first that divides a matrix's rows; smaller ones are not fused
_SCALE = "_scale"  # after a matrix's name


@dataclasses.dataclass(frozen=True)
class MatrixType:
    """Integers from -largest to largest, and their type in a graph. The range is symmetric, so the most negative integer is not used."""

    name: str
    largest: int
    dtype: ir.DataType

    @classmethod
    def named(cls, name: str) -> MatrixType:
        """The type that a recipe calls `name`."""
        return cls(name, 127, ir.DataType.INT8) if name == "int8" else cls(name, 7, ir.DataType.INT4)


def add_dequantization(graph: Graph, kind: MatrixType, keep: Sequence[str] = ()) -> tuple[dict[str, int], dict[str, str]]:
    """Make every weight that is the right operand of MatMul quantized, in place, and dequantize it before its use.

    Names that match a pattern of `keep` are left as they are.

    Returns the number of rows that share a scale for each such matrix, and for matrices that stay as they are the reason.
    """
    blocks: dict[str, int] = {}
    kept: dict[str, str] = {}
    for weight in graph.weights:
        uses = list(weight.uses())
        if not uses or any((node.op_type, index) != ("MatMul", 1) for node, index in uses):
            continue
        shape = [int(size) for size in weight.shape or () if isinstance(size, int)]
        name, block = str(weight.name), next((block for block in BLOCKS if shape[0] % block == 0), None)
        if pattern := next((pattern for pattern in keep if fnmatchcase(name, pattern)), None):
            kept[name] = f"the recipe keeps {pattern}"
            continue
        if block is None:
            kept[name] = f"its {shape[0]} rows are not a multiple of {BLOCKS[-1]}"
            continue
        blocks[name] = block
        _dequantize(graph.model.graph, weight, ir.Shape([shape[0] // block, shape[1]]), block, kind)
    return blocks, kept


def _dequantize(graph: ir.Graph, weight: ir.Value, scale_shape: ir.Shape, block: int, kind: MatrixType) -> None:
    uses = list(weight.uses())
    scale = ir.Value(name=f"{weight.name}{_SCALE}", shape=scale_shape, type=weight.type)
    graph.initializers[str(scale.name)] = scale
    node = ir.node("DequantizeLinear", [weight, scale], {"axis": 0, "block_size": block}, name=f"{weight.name}/DequantizeLinear")
    wide = node.outputs[0]
    wide.name, wide.shape, wide.type = f"{weight.name}/dequantized", weight.shape, weight.type
    weight.type = ir.TensorType(kind.dtype)
    graph.insert_before(uses[0][0], node)
    for user, index in uses:
        user.replace_input_with(index, wide)


def quantized(tensor: OutputTensor, block: int, kind: MatrixType) -> tuple[OutputTensor, OutputTensor]:
    """The integers and the scales of `tensor` [in, out], as tensors of the names that the graph has.

    A scale is the block's largest magnitude / `kind.largest`, rounded to the tensor's dtype. A value is divided by its rounded scale, and
    rounded to the nearest integer, half to even: it is at most half a scale away from what is stored. Int4 values are stored two in a
    byte, the first in the lower half, as ONNX packs them.
    """
    rows, columns = tensor.shape
    work = _Quantizer(tensor, block, kind)
    if kind.dtype == ir.DataType.INT4:  # .safetensors files have no such type
        integers = OutputTensor(tensor.name, (math.prod(tensor.shape) // 2,), torch.uint8, lambda: map(_packed, work.integers()))
    else:
        integers = OutputTensor(tensor.name, tensor.shape, torch.int8, work.integers)
    return integers, OutputTensor(f"{tensor.name}{_SCALE}", (rows // block, columns), tensor.dtype, work.scales)


class _Quantizer:
    """Integers and scales come from the same values. The scales wait in memory: they are less than a thirtieth of the values."""

    def __init__(self, tensor: OutputTensor, block: int, kind: MatrixType) -> None:
        self._tensor, self._block, self._largest = tensor, block, kind.largest
        self._scales: list[torch.Tensor] = []

    def integers(self) -> Iterator[torch.Tensor]:
        self._scales = []
        for piece in self._tensor.pieces():
            if len(piece) % self._block:
                raise ValueError(f"{self._tensor.name}: a piece of {len(piece)} rows is not whole blocks of {self._block}")
            # A wide piece in strips of columns: memory of this size is used again and again.
            strips = [self._rounded(strip) for strip in torch.split(piece.mT, max(1, PIECE // len(piece)))]
            self._scales.append(torch.cat([scale for _, scale in strips]).mT)
            yield torch.cat([integers for integers, _ in strips]).mT

    def _rounded(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Some columns of a piece, [out, rows], as integers of this shape, and their scales [out, rows / block]."""
        blocks = columns.float().reshape(len(columns), -1, self._block)
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


def _packed(integers: torch.Tensor) -> torch.Tensor:
    """Two int4 values in a byte."""
    pairs = integers.contiguous().view(torch.uint8).reshape(-1, 2)
    return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)

"""The quantized matrices that a bundle stores, against the reference's: every value within half a step, as rounding to nearest gives.

Parity alone would not notice a few changed scales among many. Does not know how the exporter quantizes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle import Bundle

if TYPE_CHECKING:
    from vessel_export.parity.reference import Reference

__all__ = ["Matrix", "check_graphs", "rounding_errors", "stored_matrices"]

_AT_ONCE = 1 << 24  # values compared at a time
_DTYPES = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4}
_BITS = {"int8": 8, "int4": 4}
# Of an operator: the number of its inputs, and the places of integers and scales.
_OPERANDS = {"DequantizeLinear": (2, 0, 1), "MatMulNBits": (3, 1, 2), "MatMulIntegerToFloat": (6, 1, 3)}
_SAM2 = "sam2_image_encoder."  # before a parameter's name
_VISION = {"attn.qkv": ("q_proj", "k_proj", "v_proj"), "attn.proj": ("projection_layer",)}


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A quantized matrix [in, out] as a graph has it: its name, the rows of a block, and the initializers."""

    name: str
    block: int
    integers: ir.Value
    scales: ir.Value

    def modules(self, reference: Reference) -> list[Any]:
        """The reference's linear modules whose outputs, one after the other, are those of this matrix."""
        return _modules(reference, self.name)

    def values(self, folder: Path) -> torch.Tensor:
        """The matrix in FP32, [in, out]. `folder` is the bundle's."""
        integers, scales = self.open(folder)
        return integers(slice(0, len(scales) * self.block)).float() * scales.float().repeat_interleave(self.block, 0)

    def open(self, folder: Path) -> tuple[Callable[[slice], torch.Tensor], torch.Tensor]:
        """A function that reads rows of the integers, int8 [rows, out], and the scales [in / block, out]. A slice starts at an even row."""
        integers, scales = _read(folder, self.integers), _read(folder, self.scales)
        if integers.ndim == 3:  # MatMulNBits: [out, in / block, bytes of a block]
            columns, blocks, size = integers.shape
            bits = size * 8 // self.block
            flat = integers.reshape(columns, -1)
            return (lambda rows: _signed(flat, rows, bits)), scales.reshape(columns, blocks).mT
        scales = scales.reshape(-1, scales.shape[-1])  # without blocks, there is one for a column
        if integers.ndim == 1:
            return (lambda rows: _unpacked(integers, scales.shape[1], rows)), scales
        return integers.__getitem__, scales


def check_graphs(bundle: Bundle) -> None:
    """Compare the graphs' quantized matrices with those that bundle.json lists: names, type, blocks and shapes of the scales.

    Raises:
        BundleError: they differ.
    """
    listed = bundle.quantization.matrices if bundle.quantization else {}
    for stage, spec in bundle.stages.items():
        found = {stored.name: stored.block for stored in stored_matrices(bundle, stage)}
        if found != listed.get(stage, {}):
            odd = sorted(name for name, _ in found.items() ^ listed.get(stage, {}).items())
            raise BundleError(f"{bundle.folder / spec.file}: {odd[0]} is not quantized as bundle.json says; export the bundle again")


def stored_matrices(bundle: Bundle, stage: str) -> Iterator[Matrix]:
    """The quantized matrices of a stage's graph. Raises BundleError if they are not integers and scales as `check_graphs` expects."""
    path = bundle.folder / bundle.stages[stage].file
    for node in ir.load(path).graph:
        if node.op_type not in _OPERANDS:
            continue
        inputs, first, second = _OPERANDS[node.op_type]
        integers, scales = (node.inputs[first], node.inputs[second]) if len(node.inputs) == inputs else (None, None)
        if integers is None or scales is None or integers.shape is None or scales.shape is None:
            raise BundleError(f"{path}: {node.name} is not of {bundle.weights} in blocks of rows; export the bundle again")
        block = node.attributes.get_int("block_size", 0) or _shape(integers)[0]  # without blocks, a column has one scale
        _CHECKS[node.op_type](bundle, path, node, block)
        yield Matrix(str(integers.name), block, integers, scales)


def _check_standard(bundle: Bundle, path: Path, node: ir.Node, block: int) -> None:
    integers, scales = (_shape(value) for value in node.inputs)
    by_column = bundle.weights == "int8"
    axis, blocks = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    if getattr(node.inputs[0], "dtype", None) != _DTYPES.get(bundle.weights) or axis != int(by_column):
        raise BundleError(f"{path}: {node.name} is not of {bundle.weights} in blocks of rows; export the bundle again")
    if scales != (integers[1:] if by_column else [integers[0] / block, *integers[1:]]) or bool(blocks) == by_column:
        raise BundleError(f"{path}: {node.name} has scales for blocks of another size; export the bundle again")


def _check_columns(bundle: Bundle, path: Path, node: ir.Node, _block: int) -> None:
    """Of MatMulIntegerToFloat: also the scale of the activations, which is applied to each row later, and the zero points."""
    _, integers, scale, scales, *zero_points = node.inputs
    constants = [value.const_value.numpy().tolist() if value and value.const_value else None for value in (scale, *zero_points)]
    one, middle, zero = constants
    if (bundle.weights, getattr(integers, "dtype", None), one, zero) != ("int8", ir.DataType.INT8, 1, 0) or middle not in (32, 128):
        raise BundleError(f"{path}: {node.name} is not of {bundle.weights} in blocks of rows; export the bundle again")
    if _shape(integers)[1:] != _shape(scales):
        raise BundleError(f"{path}: {node.name} has scales for blocks of another size; export the bundle again")


def _check_fused(bundle: Bundle, path: Path, node: ir.Node, block: int) -> None:
    rows, columns, bits, accuracy = (node.attributes.get_int(name, 0) for name in ("K", "N", "bits", "accuracy_level"))
    if (bits, accuracy) != (_BITS.get(bundle.weights), 4) or getattr(node.inputs[1], "dtype", None) != ir.DataType.UINT8:
        raise BundleError(f"{path}: {node.name} is not of {bundle.weights} in blocks of rows; export the bundle again")
    blocks = rows // max(1, block)
    if blocks * block != rows or [_shape(value) for value in node.inputs[1:]] != [[columns, blocks, block * bits // 8], [columns * blocks]]:
        raise BundleError(f"{path}: {node.name} has scales for blocks of another size; export the bundle again")


_CHECKS = {"DequantizeLinear": _check_standard, "MatMulNBits": _check_fused, "MatMulIntegerToFloat": _check_columns}


def _shape(value: ir.Value | None) -> list[int]:
    return [*value.shape.numpy()] if value is not None and value.shape is not None else []


def rounding_errors(bundle: Bundle, reference: Reference) -> Iterator[tuple[str, str, float]]:
    """For each quantized matrix its stage, its name and the largest |stored - reference's| in steps, where a step is the block's scale.

    Integers and scales are read where the graph reads them. Raises BundleError as `check_graphs`.
    """
    check_graphs(bundle)
    for stage in bundle.quantization.matrices if bundle.quantization else ():
        for stored in stored_matrices(bundle, stage):
            yield stage, stored.name, _error(bundle.folder, stored, stored.modules(reference))


def _error(folder: Path, stored: Matrix, modules: list[Any]) -> float:
    """Some rows at a time: the matrix is [in, out], the reference's modules hold [out, in]."""
    integers, scales = stored.open(folder)
    (blocks, columns), worst = scales.shape, 0.0
    for start in range(0, blocks * stored.block, at_once := max(1, _AT_ONCE // columns // 2) * 2):  # an even number
        inside = slice(start, min(start + at_once, blocks * stored.block))
        scale = scales[torch.arange(inside.start, inside.stop) // stored.block].float()
        expected = torch.cat([_weight(module, inside) for module in modules]).mT  # [rows, out]
        expected = torch.nn.functional.pad(expected, (0, columns - expected.shape[1]))  # a matrix may be filled up with zeros
        difference = (integers(inside).float() * scale - expected).abs_()
        worst = max(worst, float((difference / scale.abs()).nan_to_num(math.inf).max()))  # 0 / 0: a scale of zero
    return worst


def _read(folder: Path, value: ir.Value) -> torch.Tensor:
    """An initializer's values, mapped; int4 as its bytes. (onnx_ir does not read files that are hard links.)"""
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        raise BundleError(f"{folder}: {value.name} is not in a file of weights; export the bundle again")
    packed = tensor.dtype == ir.DataType.INT4
    shape = (tensor.length or 0,) if packed else tuple(tensor.shape.numpy())
    dtype = np.dtype(np.uint8) if packed else tensor.dtype.numpy()
    return torch.from_numpy(np.memmap(folder / tensor.location, dtype, "c", offset=tensor.offset or 0, shape=shape))


def _unpacked(integers: torch.Tensor, columns: int, rows: slice) -> torch.Tensor:
    """Rows of an int4 matrix, two values to a byte, the first in the lower half."""
    packed = integers[rows.start * columns // 2 : rows.stop * columns // 2].view(torch.int8)
    return torch.stack([(packed << 4) >> 4, packed >> 4], dim=1).reshape(-1, columns)


def _signed(integers: torch.Tensor, rows: slice, bits: int) -> torch.Tensor:
    """Rows of a matrix of MatMulNBits, whose bytes [out, ...] are those of unsigned integers."""
    if bits == 8:
        return (integers[:, rows] ^ 128).view(torch.int8).mT
    packed = integers[:, rows.start // 2 : rows.stop // 2]
    return (torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).to(torch.int8) - 8).mT


def _modules(reference: Reference, name: str) -> list[Any]:
    """The reference's linear modules whose outputs, one after the other, are those of the bundle's matrix `name`."""
    language_model = reference.language_model.get_base_model()
    if name.startswith(_SAM2):
        return [reference.sam2.get_submodule(name.removeprefix(_SAM2).removesuffix(".weight"))]
    if found := re.fullmatch(r"projector\.linear_([12])\.weight", name):
        return [reference.projector[2 * int(found[1]) - 1]]  # type: ignore[index]
    if found := re.fullmatch(r"vision_model\.layers\.(\d+)\.(.+)\.weight", name):
        layer: Any = reference.vision_model.encoder.layer[int(found[1])]  # type: ignore[union-attr, index]
        return [getattr(layer.attention, part) for part in _VISION[found[2]]] if found[2] in _VISION else [layer.get_submodule(found[2])]
    if found := re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name):
        return [language_model.model.layers[int(found[1])].get_submodule(found[2])]
    return [language_model.lm_head.modules_to_save["default"]]


def _weight(module: Any, inputs: slice) -> torch.Tensor:
    """[out, inputs], LoRA included."""
    if not hasattr(module, "lora_A"):
        weight: torch.Tensor = module.weight[:, inputs].float()
        return weight
    a, b = module.lora_A["default"].weight.float(), module.lora_B["default"].weight.float()
    merged: torch.Tensor = module.base_layer.weight[:, inputs].float() + module.scaling["default"] * (b @ a[:, inputs])
    return merged

"""The quantized matrices that a bundle stores, against the reference's: every value within half a step, as rounding to nearest gives.

Parity alone would not notice a few changed scales among many. Does not know how the exporter quantizes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
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
        integers, scales = _read(folder, self.integers), _read(folder, self.scales)
        if integers.ndim == 1:
            integers = _unpacked(integers, scales.shape[1], slice(0, len(scales) * self.block))
        return integers.float() * scales.float().repeat_interleave(self.block, 0)


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
        if node.op_type != "DequantizeLinear":
            continue
        integers, scales, *more = node.inputs
        block, axis = node.attributes.get_int("block_size", 0), node.attributes.get_int("axis", 1)
        sound = integers is not None and integers.dtype == _DTYPES.get(bundle.weights) and scales is not None and not more and axis == 0
        if not (sound and integers and integers.shape and scales and scales.shape):
            raise BundleError(f"{path}: {node.name} is not of {bundle.weights} in blocks of rows; export the bundle again")
        if [*scales.shape.numpy()] != [integers.shape.numpy()[0] / max(1, block), *integers.shape.numpy()[1:]]:
            raise BundleError(f"{path}: {node.name} has scales for blocks of another size; export the bundle again")
        yield Matrix(str(integers.name), block, integers, scales)


def rounding_errors(bundle: Bundle, reference: Reference) -> Iterator[tuple[str, str, float]]:
    """For each quantized matrix its stage, its name and the largest |stored - reference's| in steps, where a step is the block's scale.

    Integers and scales are read where the graph reads them. Raises BundleError as `check_graphs`.
    """
    check_graphs(bundle)
    for stage in bundle.quantization.matrices if bundle.quantization else ():
        for stored in stored_matrices(bundle, stage):
            yield stage, stored.name, _error(bundle.folder, stored, stored.modules(reference))


def _error(folder: Path, stored: Matrix, modules: list[Any]) -> float:
    """Whole blocks of rows at a time: the matrix is [in, out], the reference's modules hold [out, in]."""
    integers, scales = _read(folder, stored.integers), _read(folder, stored.scales)
    (blocks, columns), block = scales.shape, stored.block
    rows, worst = max(1, _AT_ONCE // columns // block), 0.0
    for start in range(0, blocks, rows):
        scale = scales[start : start + rows].float()[:, None]  # [blocks, 1, out]
        inside = slice(start * block, (start + len(scale)) * block)
        values = integers[inside] if integers.ndim == 2 else _unpacked(integers, columns, inside)
        expected = torch.cat([_weight(module, inside) for module in modules]).mT  # [rows, out]
        difference = (values.float().reshape(-1, block, columns) * scale - expected.reshape(-1, block, columns)).abs_()
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


def _modules(reference: Reference, name: str) -> list[Any]:
    """The reference's linear modules whose outputs, one after the other, are those of the bundle's matrix `name`."""
    language_model = reference.language_model.get_base_model()
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

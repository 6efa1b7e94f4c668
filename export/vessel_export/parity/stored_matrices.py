"""The quantized matrices that a bundle stores, against the reference's: every value within half a step, as rounding to nearest gives.

Parity alone would not notice a few changed scales among many. Does not know how the exporter quantizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from safetensors import safe_open

from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle import Bundle

if TYPE_CHECKING:
    from vessel_export.parity.reference import Reference

__all__ = ["check_graphs", "rounding_errors"]

_AT_ONCE = 1 << 24  # values compared at a time
_LARGEST = {"int8": 127, "int4": 7}
_DTYPES = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4}
_SMALLEST_SCALE = {torch.float16: 2.0**-24, torch.float32: 2.0**-149}  # and the spacing of scales near zero
_VISION = {"attn.qkv": ("q_proj", "k_proj", "v_proj"), "attn.proj": ("projection_layer",)}


def check_graphs(bundle: Bundle) -> None:
    """Compare the graphs' quantized matrices with those that bundle.json lists: names, type, blocks and shapes of the scales.

    Raises:
        BundleError: they differ.
    """
    listed = bundle.quantization.matrices if bundle.quantization else {}
    for stage, spec in bundle.stages.items():
        found = {}
        for node in ir.load(bundle.folder / spec.file).graph:
            if node.op_type != "DequantizeLinear":
                continue
            matrix, block = node.inputs[0], node.attributes.get_int("block_size", 0)
            if matrix is None or not _sound(node, block, _DTYPES.get(bundle.weights)):
                raise BundleError(f"{bundle.folder / spec.file}: {node.name} is not of {bundle.weights} in blocks; export the bundle again")
            found[str(matrix.name)] = block
        if found != listed.get(stage, {}):
            odd = sorted(name for name, _ in found.items() ^ listed.get(stage, {}).items())
            raise BundleError(f"{bundle.folder / spec.file}: {odd[0]} is not quantized as bundle.json says; export the bundle again")


def _sound(node: ir.Node, block: int, dtype: ir.DataType | None) -> bool:
    """Whether a DequantizeLinear has integers of `dtype` [in, out] and scales [in / block, out], and no zero points."""
    matrix, scale = node.inputs[:2]
    if matrix is None or scale is None or not matrix.shape or not scale.shape or matrix.dtype != dtype:
        return False
    sizes, rows = [*matrix.shape.numpy()], [*scale.shape.numpy()]
    return len(node.inputs) == 2 and node.attributes.get_int("axis", 1) == 0 and [rows[0] * block, *rows[1:]] == sizes


def rounding_errors(bundle: Bundle, reference: Reference) -> Iterator[tuple[str, str, float]]:
    """For each quantized matrix its stage, its name and the largest |stored - reference's| in steps, where a step is the block's scale.

    Subtracts what the scale's own rounding costs where scales are so small that FP16 has few digits for them.
    """
    for stage, matrices in (bundle.quantization.matrices if bundle.quantization else {}).items():
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(bundle.folder / file, "pt")) for file in bundle.stages[stage].weights]
            places = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dictionary
            for name, block in matrices.items():
                integers, scales = (places[stored].get_tensor(stored) for stored in (name, f"{name}_scale"))
                yield stage, name, _error(integers, scales, block, _modules(reference, name), bundle.weights)


def _error(integers: torch.Tensor, scales: torch.Tensor, block: int, modules: list[Any], weights: str) -> float:
    """Whole blocks of rows at a time: the matrix is [in, out], the reference's modules hold [out, in]."""
    blocks, columns = scales.shape
    least = _SMALLEST_SCALE[scales.dtype]
    slack = _LARGEST[weights] * least / 2
    rows, worst = max(1, _AT_ONCE // columns // block), 0.0
    for start in range(0, blocks, rows):
        scale = scales[start : start + rows].float()[:, None]  # [blocks, 1, out]
        inside = slice(start * block, (start + len(scale)) * block)
        stored = _unpacked(integers, columns, inside) if weights == "int4" else integers[inside]
        expected = torch.cat([_weight(module, inside) for module in modules]).mT  # [rows, out]
        difference = (stored.float().reshape(-1, block, columns) * scale - expected.reshape(-1, block, columns)).abs_()
        worst = max(worst, float(((difference - slack) / scale.abs().clamp_min(least)).max()))
    return worst


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

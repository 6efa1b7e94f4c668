"""Turns a module into an ONNX model, and writes the model with external data that point into .safetensors files.

Does not know what the four graphs compute.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnxscript import GraphBuilder, nn

from vessel_export.graphs.costs import unit_flops
from vessel_export.io.safetensors_writer import TensorLocation
from vessel_rt.formats.bundle import StageSpec, TensorSpec

__all__ = ["DTYPES", "OPSET", "TO_IR", "Graph", "assemble", "save_graph"]

OPSET = 24  # the first with TensorScatter
_IR_VERSION = 11
_CACHE = ("past_", "present_")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of a bundle's precision

TO_IR = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
}


@dataclasses.dataclass(frozen=True)
class Graph:
    """A stage's model. Initializers without a value are weights, which `save_graph` binds by name.

    `activation_bytes` is the estimate of `activations.py`, `flops` the count of `costs.unit_flops`.
    """

    name: str
    model: ir.Model
    activation_bytes: int
    flops: int

    @property
    def weights(self) -> list[ir.Value]:
        """The initializers that have no value yet."""
        return [value for value in self.model.graph.initializers.values() if value.const_value is None]


def assemble(name: str, module: nn.Module, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], *, activation_bytes: int) -> Graph:
    """Run `module` on `inputs`. The results get the names, types and shapes of `outputs`."""
    graph = ir.Graph(list(inputs), [], nodes=[], name=name, opset_imports={"": OPSET})
    results = module(GraphBuilder(graph).op, *inputs)
    for result, declared in zip(results if isinstance(results, list) else [results], outputs, strict=True):
        result.name, result.type, result.shape = declared.name, declared.type, declared.shape
        graph.outputs.append(result)
    model = ir.Model(graph, ir_version=_IR_VERSION, producer_name="vessel-rt")
    return Graph(name, model, activation_bytes, unit_flops(model))


def save_graph(graph: Graph, folder: Path, locations: Mapping[str, TensorLocation]) -> StageSpec:
    """Write `folder/<name>.onnx` with its weights bound to `locations`, check it, and describe it.

    Raises:
        ValueError: a weight has no location, or one of another shape or dtype (a bug, not a fault of the input).
    """
    files = set()
    for value in graph.weights:
        place = locations.get(value.name or "")
        if place is None:
            raise ValueError(f"{graph.name}: {value.name} has no location")
        if value.dtype is None or value.shape is None or not _holds(place, value.dtype, value.shape):
            raise ValueError(f"{graph.name}: {value.name} is {value.dtype} {value.shape}, its weight is {place.dtype} {place.shape}")
        files.add(place.file)
        value.const_value = ir.ExternalTensor(
            place.file, place.offset, place.length, value.dtype, shape=value.shape, name=value.name or "", base_dir=folder
        )
    _widen_the_edge(graph.model.graph)
    file = f"{graph.name}.onnx"
    ir.save(graph.model, folder / file)
    _check(onnx.load(folder / file, load_external_data=False))
    inputs, outputs = (tuple(map(_describe, values)) for values in (graph.model.graph.inputs, graph.model.graph.outputs))
    return StageSpec(file, inputs, outputs, tuple(sorted(files)), graph.activation_bytes, graph.flops)


def _holds(place: TensorLocation, dtype: ir.DataType, shape: ir.Shape) -> bool:
    """Whether a stored tensor is one of `dtype` and `shape`. Int4 values are stored as bytes of two."""
    if dtype == ir.DataType.INT4:
        return place.dtype == torch.uint8 and place.length * 2 == math.prod(shape.numpy())
    return TO_IR.get(place.dtype) == dtype and list(place.shape) == list(shape)


def _widen_the_edge(graph: ir.Graph) -> None:
    """Make a BF16 graph's inputs and outputs FP32, since NumPy has no BF16. The cache stays BF16: it never leaves the device."""
    bf16, fp32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for value in graph.inputs:
        if value.dtype == bf16 and not str(value.name).startswith(_CACHE):
            narrow = ir.node("Cast", [value], {"to": bf16})
            narrow.outputs[0].name, narrow.outputs[0].dtype, narrow.outputs[0].shape = f"{value.name}/bf16", bf16, value.shape
            value.replace_all_uses_with(narrow.outputs[0])
            narrow.replace_input_with(0, value)
            value.dtype = fp32
            graph.insert_before(graph[0], narrow)
    for i, value in enumerate(graph.outputs):
        if value.dtype == bf16 and not str(value.name).startswith(_CACHE):
            wide = ir.node("Cast", [value], {"to": fp32})
            wide.outputs[0].name, wide.outputs[0].dtype, wide.outputs[0].shape = value.name, fp32, value.shape
            value.name = f"{value.name}/bf16"
            graph.append(wide)
            graph.outputs[i] = wide.outputs[0]


def _check(model: onnx.ModelProto) -> None:
    """Run onnx's checker with the weights as inputs: it refuses external data that are hard links, as between two bundles."""
    weights = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in weights:
        model.graph.initializer.remove(tensor)
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(model, full_check=True)


def _describe(value: ir.Value) -> TensorSpec:
    if value.name is None or value.dtype is None or value.shape is None:
        raise ValueError(f"{value} lacks a name, type or shape")
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, shape)

"""Partitions a graph: cuts it where a single value crosses, and chains the compiled partitions into one model again.

A compiler needs several times the memory of what it compiles, so a graph that is too large is compiled in partitions. Small computations
that several partitions need are repeated in each of them. Reads no weights. Does not know about compilers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import helper

__all__ = ["EP_CONTEXT", "Context", "chain", "layer_cuts", "partition", "weight_files"]

EP_CONTEXT = "EPContext"  # ONNX Runtime's operator for a compiled graph, in the domain com.microsoft


@dataclasses.dataclass(frozen=True)
class Context:
    """One compiled partition: the inputs, outputs and attributes of its EPContext node."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, str | int]


def layer_cuts(layers: int, partitions: int) -> list[str]:
    """The values that cut `layers` layers into at most `partitions` partitions of nearly equal depth. `residual.6` follows the seventh."""
    partitions = min(layers, partitions)
    return [f"residual.{layers * number // partitions - 1}" for number in range(1, partitions)]


def partition(model: onnx.ModelProto, cuts: Sequence[str]) -> list[onnx.ModelProto]:
    """`model` as len(cuts) + 1 models, cut at the values `cuts`, in the order of the graph. Each has only the inputs that it uses.

    Raises:
        ValueError: the model has no such value, or its type is not in the model.
    """
    extractor = onnx.utils.Extractor(model)
    inputs = [value.name for value in model.graph.input]
    pieces = []
    for i, names in enumerate(_outputs(model, cuts)):
        piece = extractor.extract_model([*inputs, *cuts[max(i - 1, 0) : i]], names)
        used = {name for node in piece.graph.node for name in node.input}
        for value in [value for value in piece.graph.input if value.name not in used]:
            piece.graph.input.remove(value)
        pieces.append(piece)
    return pieces


def _outputs(model: onnx.ModelProto, cuts: Sequence[str]) -> list[list[str]]:
    """The outputs of each partition: the value it is cut at, and the model's outputs that no earlier partition computes."""
    first: dict[str, int] = {}  # the first partition that can compute a value; 0 for inputs and initializers
    for node in model.graph.node:
        number = max((first.get(name, 0) for name in node.input), default=0)
        first |= {name: cuts.index(name) + 1 if name in cuts else number for name in node.output}
    missing = [value for value in cuts if value not in first]
    if missing:
        raise ValueError(f"{model.graph.name} has no value {missing[0]} to cut at")
    outputs: list[list[str]] = [[value] for value in cuts] + [[]]
    for output in model.graph.output:
        outputs[first[output.name]].append(output.name)
    return outputs


def chain(model: onnx.ModelProto, compiled: Sequence[Context], metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The compiled partitions of `model` as one model with the same inputs and outputs, an EPContext node for each partition."""
    nodes = []
    for i, context in enumerate(compiled):
        name = f"{model.graph.name}.{i}"  # the compiler gives all partitions the same name
        node = helper.make_node(EP_CONTEXT, context.inputs, context.outputs, name, domain="com.microsoft")
        node.attribute.extend(helper.make_attribute(key, value) for key, value in {**context.attributes, "partition_name": name}.items())
        nodes.append(node)
    computed = {name for context in compiled for name in context.outputs}
    between = [value for value in model.graph.value_info if value.name in computed]
    graph = helper.make_graph(nodes, model.graph.name, model.graph.input, model.graph.output, value_info=between)
    opsets = [*model.opset_import, helper.make_opsetid("com.microsoft", 1)]
    chained = helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version, producer_name="vessel-rt")
    helper.set_model_props(chained, dict(metadata))
    return chained


def weight_files(model: onnx.ModelProto) -> list[str]:
    """The files of `model`'s external data, relative to its folder."""
    tensors = (tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)
    return sorted({str(Path(entry.value)) for tensor in tensors for entry in tensor.external_data if entry.key == "location"})

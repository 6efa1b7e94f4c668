"""A graph in parts: cut where one value is all that goes on, compiled one by one, and chained again as one model.

A compiler's memory is some multiple of what it compiles, so a graph that is too large is given to it in parts. Small computations that
several parts need are repeated in each of them. Knows nothing of compilers; no weight is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import helper

__all__ = ["EP_CONTEXT", "Context", "chain", "cut", "layer_cuts", "weight_files"]

EP_CONTEXT = "EPContext"  # ONNX Runtime's operator for a graph that is compiled already, in the domain com.microsoft


@dataclasses.dataclass(frozen=True)
class Context:
    """One compiled part: what its EPContext node takes, gives and says."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, str | int]


def layer_cuts(layers: int, parts: int) -> list[str]:
    """The values that cut `layers` layers into at most `parts` parts of nearly equal depth: `residual.6` comes after the seventh layer."""
    parts = min(layers, parts)
    return [f"residual.{layers * part // parts - 1}" for part in range(1, parts)]


def cut(model: onnx.ModelProto, values: Sequence[str]) -> list[onnx.ModelProto]:
    """`model` in len(values) + 1 parts, cut at `values`, which follow from one another; each part's inputs are those that it uses.

    Raises:
        ValueError: the model has no such value, or its type is not in the model.
    """
    extractor = onnx.utils.Extractor(model)
    inputs = [value.name for value in model.graph.input]
    outputs = _outputs_of_parts(model, values)
    parts = []
    for i, names in enumerate(outputs):
        part = extractor.extract_model([*inputs, *values[max(i - 1, 0) : i]], names)
        used = {name for node in part.graph.node for name in node.input}
        for value in [value for value in part.graph.input if value.name not in used]:
            part.graph.input.remove(value)
        parts.append(part)
    return parts


def _outputs_of_parts(model: onnx.ModelProto, values: Sequence[str]) -> list[list[str]]:
    """What each part is to give: the outputs of the model that nothing before it gives, and the value it is cut at."""
    part_of: dict[str, int] = {}  # the first part in which a value can be computed; 0 for inputs and initializers
    for node in model.graph.node:
        part = max((part_of.get(name, 0) for name in node.input), default=0)
        part_of |= {name: values.index(name) + 1 if name in values else part for name in node.output}
    missing = [value for value in values if value not in part_of]
    if missing:
        raise ValueError(f"{model.graph.name} has no value {missing[0]} to be cut at")
    outputs: list[list[str]] = [[value] for value in values] + [[]]
    for output in model.graph.output:
        outputs[part_of[output.name]].append(output.name)
    return outputs


def chain(model: onnx.ModelProto, parts: Sequence[Context], metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The compiled parts of `model` as one model with the same inputs and outputs, an EPContext node for each part."""
    nodes = []
    for i, part in enumerate(parts):
        name = f"{model.graph.name}.{i}"  # the compiler's own names for its partitions are alike
        node = helper.make_node(EP_CONTEXT, part.inputs, part.outputs, name, domain="com.microsoft")
        node.attribute.extend(helper.make_attribute(key, value) for key, value in {**part.attributes, "partition_name": name}.items())
        nodes.append(node)
    given = {name for part in parts for name in part.outputs}
    between = [value for value in model.graph.value_info if value.name in given]
    graph = helper.make_graph(nodes, model.graph.name, model.graph.input, model.graph.output, value_info=between)
    opsets = [*model.opset_import, helper.make_opsetid("com.microsoft", 1)]
    chained = helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version, producer_name="vessel-rt")
    helper.set_model_props(chained, dict(metadata))
    return chained


def weight_files(model: onnx.ModelProto) -> list[str]:
    """The files that `model`'s external data lie in, relative to its own folder."""
    tensors = (tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)
    return sorted({str(Path(entry.value)) for tensor in tensors for entry in tensor.external_data if entry.key == "location"})

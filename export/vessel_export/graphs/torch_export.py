"""Traces sam2's own modules into a graph with torch.onnx's exporter, and moves the weights out of it. Does not know the modules."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript.optimizer import fold_constants

from vessel_export.graphs.assemble import TO_IR, Graph
from vessel_export.graphs.costs import unit_flops
from vessel_export.io.safetensors_writer import OutputTensor, in_pieces

__all__ = ["trace"]

_FROM_IR = {kind: dtype for dtype, kind in TO_IR.items()}
_INLINE_BYTES = 1024  # smaller constants (shapes, scalars) stay in the graph


def trace(
    name: str,
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    dynamic_axes: Mapping[str, str],
    *,
    opset: int,
    activation_bytes: int,
    weights_of: str | None = None,
) -> tuple[Graph, list[OutputTensor]]:
    """Trace `module` called with `inputs`, in order. Also returns the weights to write to the graph's file.

    `dynamic_axes` maps an input's name to the name of its first axis; all other axes are those of `inputs`.
    A weight's name is `name` followed by its parameter's name, so that graphs can share one table of locations. With
    `weights_of`, a parameter has the name that it has in that graph, and only other weights are returned.
    """
    shapes = tuple({0: torch.export.Dim(dynamic_axes[key], min=1, max=4096)} if key in dynamic_axes else None for key in inputs)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            opset_version=opset,
            optimize=False,
            verbose=False,
        )
        if program is None:
            raise RuntimeError(f"{name}: the exporter returned no program")
        model = program.model
        parameters = {key for key, _ in (*module.named_parameters(), *module.named_buffers())}
        _simplify(model, parameters)
        flops = unit_flops(model)
    model.graph.name, model.producer_name, model.producer_version = name, "vessel-rt", None
    model.metadata_props.clear()
    return Graph(name, model, activation_bytes, flops), _move_weights_out(name, model, parameters, weights_of)


def _move_weights_out(name: str, model: ir.Model, parameters: Collection[str], weights_of: str | None) -> list[OutputTensor]:
    """Remove the values of parameters and large constants, so that `save_graph` binds them like the weights of built graphs."""
    weights = []
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or (value.name not in parameters and tensor.nbytes < _INLINE_BYTES):
            continue
        shared = weights_of is not None and value.name in parameters
        weight = f"{weights_of if shared else name}.{value.name}"
        model.graph.initializers.pop(str(value.name))
        value.name, value.const_value = weight, None
        model.graph.initializers[weight] = value
        if not shared:
            pieces = functools.partial(_pieces, tensor)
            weights.append(OutputTensor(weight, tuple(tensor.shape.numpy()), _FROM_IR[tensor.dtype], pieces))
    return weights


def _pieces(tensor: ir.TensorProtocol) -> Iterator[torch.Tensor]:
    if tensor.dtype == ir.DataType.BFLOAT16:  # NumPy has no BF16
        return in_pieces(torch.from_numpy(tensor.numpy().view(np.int16)).view(torch.bfloat16))
    return in_pieces(torch.from_numpy(tensor.numpy()))


def _simplify(model: ir.Model, parameters: Collection[str]) -> None:
    """torch's `optimize=True` without its pattern rules, which take the most time and which inference engines do better.

    Also removes the exporter's stack traces from every node: they contain local paths and make up most of the file.
    """
    passes.InlinePass()(model)
    _name_matrices(model.graph, parameters)
    fold_constants(model, onnx_shape_inference=True)
    for simplify in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.ClearMetadataAndDocStringPass(),
        passes.NameFixPass(),
    ):
        simplify(model)


def _name_matrices(graph: ir.Graph, parameters: Collection[str]) -> None:
    """A parameter that the graph only transposes gives its name to the result, which is what is stored: [in, out] of a linear layer."""
    for name, value in list(graph.initializers.items()):
        uses = [node for node, _ in value.uses()]
        if name in parameters and len(uses) == 1 and uses[0].op_type == "Transpose":
            graph.initializers.pop(name)
            value.name = f"{name}/transposed"
            graph.initializers[value.name] = value
            uses[0].outputs[0].name = name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's progress and its notes on version conversion and folding, which are not for users."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnxscript.optimizer"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)

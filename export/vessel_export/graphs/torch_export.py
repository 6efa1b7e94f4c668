"""Tracing sam2's own modules into a graph: torch.onnx's exporter, its weights moved out into a .safetensors file."""

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
) -> tuple[Graph, list[OutputTensor]]:
    """Trace `module` called with `inputs`, in their order; also returns the weights that its file must hold.

    `dynamic_axes` maps an input's name to the name of its first axis; all other axes are as in `inputs`.
    Every weight's name is `name` and its parameter's, so that graphs may share one table of locations.
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
    _simplify(model)
    model.graph.name, model.producer_name, model.producer_version = name, "vessel-rt", None
    model.metadata_props.clear()
    parameters = {key for key, _ in (*module.named_parameters(), *module.named_buffers())}
    return Graph(name, model), _move_weights_out(name, model, parameters)


def _move_weights_out(name: str, model: ir.Model, parameters: Collection[str]) -> list[OutputTensor]:
    """Take the values of parameters and of large constants away, to be bound by name like any graph's weights."""
    weights = []
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or (value.name not in parameters and tensor.nbytes < _INLINE_BYTES):
            continue
        weight = f"{name}.{value.name}"
        model.graph.initializers.pop(str(value.name))
        value.name, value.const_value = weight, None
        model.graph.initializers[weight] = value
        pieces = functools.partial(_pieces, tensor)
        weights.append(OutputTensor(weight, tuple(tensor.shape.numpy()), _FROM_IR[tensor.dtype], pieces))
    return weights


def _pieces(tensor: ir.TensorProtocol) -> Iterator[torch.Tensor]:
    if tensor.dtype == ir.DataType.BFLOAT16:  # which NumPy has not
        return in_pieces(torch.from_numpy(tensor.numpy().view(np.int16)).view(torch.bfloat16))
    return in_pieces(torch.from_numpy(tensor.numpy()))


def _simplify(model: ir.Model) -> None:
    """What torch's own `optimize=True` does, but for its pattern rules: those take longest, and inference engines have better ones.

    The exporter also notes stack traces on every node: paths of this machine, and most of the file's size.
    """
    passes.InlinePass()(model)
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and logs version-conversion notes; neither is for the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)

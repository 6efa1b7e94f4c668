"""Emulates a GPU's FP16 or BF16 on the CPU: every operator computes in FP32, and its result is rounded to the graph's type F.

ONNX Runtime's CPU provider runs most FP16 operators in FP32, several at a time, and has no BF16 operators, so an overflow between two
operators on a GPU does not show there. A strongly typed engine keeps sums inside an operator in FP32 and stores every result in F. The
emulation does the same. `Attention` counts as one operator, as in a fused kernel; spelled out, each of its steps is stored in F.

Knows graphs and their types. Does not know what the graphs compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from msgspec.structs import replace

from vessel_rt.device.deployment import Deployment
from vessel_rt.device.providers import Device, onnxruntime
from vessel_rt.device.session import Session
from vessel_rt.formats.bundle import Bundle, StageSpec, TensorSpec

__all__ = [
    "MOVES",
    "EmulatedDeployment",
    "emulate",
    "low_type",
    "scaled_logits",
    "serialized",
    "spell_out_attention",
    "wide_options",
    "widen",
]

FLOAT = ir.DataType.FLOAT
_INT64 = ir.DataType.INT64
_LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# They move or select values, which were rounded before.
MOVES = frozenset(
    (
        "Concat", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Max", "Reshape", "Slice", "Split", "Squeeze",
        "TensorScatter", "Tile", "Transpose", "Unsqueeze",
    )
)  # fmt: skip


def low_type(model: ir.Model) -> ir.DataType | None:
    """The graph's type F, FLOAT16 or BFLOAT16; None if it has neither."""
    found = {value.dtype for values in (model.graph.inputs, *(node.outputs for node in model.graph)) for value in values} & set(_LOW)
    return next(iter(found), None)


def widen(model: ir.Model, *, rounding: bool) -> None:
    """Change every F to FP32, inputs and outputs included. With `rounding`, results and inputs that were F are rounded to F.

    Weights stay F in their files; each is widened when it is used.
    """
    graph, low = model.graph, low_type(model)
    if low is None:
        return
    for value in list(graph.initializers.values()):
        if value.dtype == low:
            _widen_at_each_use(graph, value)
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == low:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT)
        for value in node.outputs:
            if value.dtype == low:
                value.dtype = FLOAT
                if rounding and node.op_type not in MOVES:
                    _round(graph, value, low)
    for value in graph.inputs:
        if value.dtype == low:
            value.dtype = FLOAT
            if rounding:
                _round(graph, value, low)


def _widen_at_each_use(graph: ir.Graph, value: ir.Value) -> None:
    """Insert a cast before each use, so that at most one widened weight is in memory."""
    for node, index in list(value.uses()):
        wide = ir.node("Cast", [value], {"to": FLOAT})
        wide.outputs[0].name, wide.outputs[0].dtype = f"{value.name}/wide.{node.name}.{index}", FLOAT
        graph.insert_before(node, wide)
        node.replace_input_with(index, wide.outputs[0])


def _round(graph: ir.Graph, value: ir.Value, low: ir.DataType) -> None:
    """Insert two casts between `value` and its users. If it is an output of the graph, the rounded value takes its name."""
    there = ir.node("Cast", [value], {"to": low})
    back = ir.node("Cast", [there.outputs[0]], {"to": FLOAT})
    rounded = back.outputs[0]
    there.outputs[0].dtype, rounded.dtype, rounded.shape = low, FLOAT, value.shape
    there.outputs[0].name, rounded.name = f"{value.name}/low", f"{value.name}/rounded"
    uses, producer = list(value.uses()), value.producer()
    if producer is None:
        graph.insert_before(graph[0], [there, back])
    else:
        graph.insert_after(producer, [there, back])
    for node, index in uses:
        if node is not there:
            node.replace_input_with(index, rounded)
    for i, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[i] = rounded
            rounded.name, value.name = value.name, f"{value.name}/exact"


def spell_out_attention(model: ir.Model) -> None:
    """Replace every `Attention` by the steps of its ONNX definition, each with a result in F, as in kernels that are not fused.

    Expects 4-D Q, K and V of one width and a boolean mask or none, as in all graphs of this project.
    """
    graph = model.graph
    for node in [node for node in graph if node.op_type == "Attention"]:
        op = _Inserter(graph, node)
        logits, two = _logits(op, node), op.constant([2], _INT64)
        if len(node.inputs) > 3:
            allowed = op("Unsqueeze", node.inputs[3], two, dtype=ir.DataType.BOOL)
            logits = op("Where", allowed, logits, op("Cast", op.constant(-math.inf, FLOAT), to=op.low))
        mixed = op("MatMul", op("Softmax", logits, axis=-1), op("Unsqueeze", node.inputs[2], two))
        node.outputs[0].replace_all_uses_with(op("Reshape", mixed, op("Shape", node.inputs[0], dtype=_INT64)))
        graph.remove(node, safe=True)


def scaled_logits(graph: ir.Graph, attention: ir.Node) -> ir.Value:
    """Insert nodes before `attention` that compute the input of its softmax, without the mask."""
    return _logits(_Inserter(graph, attention), attention)


class _Inserter:
    """Inserts nodes before a given one. Results are in F unless `dtype` is given."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node, self._count = graph, node, 0
        self.low = node.outputs[0].dtype or FLOAT

    def __call__(self, op_type: str, *inputs: ir.Value | None, dtype: ir.DataType | None = None, **attributes: Any) -> ir.Value:
        made = ir.node(op_type, inputs, attributes)
        self._count += 1
        made.outputs[0].name, made.outputs[0].dtype = f"{self._node.outputs[0].name}/{op_type}.{self._count}", dtype or self.low
        self._graph.insert_before(self._node, made)
        return made.outputs[0]

    def constant(self, value: Any, dtype: ir.DataType) -> ir.Value:
        return self("Constant", value=ir.tensor(value, dtype=dtype), dtype=dtype)


def _logits(op: _Inserter, attention: ir.Node) -> ir.Value:
    """[batch, key heads, query heads to a key head, S, T]: Q and K, each times the root of the scale, multiplied."""
    q, k = attention.inputs[:2]
    heads, rest = op("Shape", k, dtype=_INT64, start=1, end=2), op("Shape", q, dtype=_INT64, start=2)
    grouped = op("Concat", op.constant([0], _INT64), heads, op.constant([-1], _INT64), rest, dtype=_INT64, axis=0)
    if "scale" in attention.attributes:
        root = op.constant(math.sqrt(attention.attributes["scale"].as_float()), FLOAT)
    else:  # 1 / sqrt(width)
        width = op("Cast", op("Shape", q, dtype=_INT64, start=3), dtype=FLOAT, to=FLOAT)
        root = op("Pow", width, op.constant(-0.25, FLOAT), dtype=FLOAT)
    root = op("Cast", root, to=op.low)
    turned = op("Transpose", op("Mul", k, root), perm=[0, 1, 3, 2])
    return op("MatMul", op("Reshape", op("Mul", q, root), grouped), op("Unsqueeze", turned, op.constant([2], _INT64)))


def serialized(model: ir.Model) -> bytes:
    """The model as bytes for ONNX Runtime; its external data stay in their files."""
    return bytes(ir.to_proto(model).SerializeToString())


def wide_options(options: Any, folder: Path) -> Any:
    """Set onnxruntime.SessionOptions for a widened model whose external data are in `folder`; returns them.

    Weights are mapped from their files and widened one at a time, so anonymous memory holds only the activations and the largest matrix in
    FP32. Graph optimisation is off: constant folding would widen all weights at once.
    """
    ort = onnxruntime()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # the order of the nodes; the default order would widen all weights first
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # return memory as soon as it is free
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options


class _EmulatedSession(Session):
    def _load(self, path: Path, options: Any, providers: Any) -> Any:
        model = ir.load(path)
        widen(model, rounding=True)
        return onnxruntime().InferenceSession(serialized(model), wide_options(options, path.parent), providers=providers)


class EmulatedDeployment(Deployment):
    """A bundle with the rounding of a GPU, on the CPU."""

    def session(self, stage: str, threads: int = 0) -> Session:
        return _EmulatedSession(self.graphs[stage], self.device, threads, arena=self.arena)


def emulate(bundle: Bundle) -> EmulatedDeployment:
    """`bundle` on the CPU, with graphs that are widened and round. Their inputs and outputs are FP32.

    Raises:
        BundleError: a file of the bundle is missing or was changed.
    """
    bundle.verify_files()
    cine = replace(bundle.cine, stages=_wide_stages(bundle.cine.stages)) if bundle.cine else None
    graphs = {name: bundle.folder / stage.file for name, stage in bundle.all_stages.items()}
    return EmulatedDeployment(replace(bundle, stages=_wide_stages(bundle.stages), cine=cine), Device("cpu"), graphs)


def _wide_stages(stages: Mapping[str, StageSpec]) -> dict[str, StageSpec]:
    return {name: replace(stage, inputs=_wide(stage.inputs), outputs=_wide(stage.outputs)) for name, stage in stages.items()}


def _wide(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, dtype="float32" if "float" in spec.dtype else spec.dtype) for spec in specs)

"""Operations and bytes of a graph: small graphs counted by hand, and the language model against its closed formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import pytest

from tests.support.paths import Tiny
from vessel_export.graphs.costs import graph_cost, unit_flops
from vessel_export.graphs.language_model import build_language_model
from vessel_export.sources.base_model import open_base
from vessel_rt.formats.stage_cost import Cost

_FLOAT = ir.DataType.FLOAT


def _model(op: str, inputs: dict[str, Sequence[int | str]], weights: dict[str, Sequence[int]], **attributes: Any) -> ir.Model:
    """A graph of one node, in FP32: its inputs, then weights that are never read."""
    edges = [ir.val(name, _FLOAT, shape) for name, shape in inputs.items()]
    held = [ir.val(name, _FLOAT, shape) for name, shape in weights.items()]
    node = ir.node(op, [*edges, *held], attributes, name="the_node", num_outputs=1)
    node.outputs[0].name, node.outputs[0].dtype = "out", _FLOAT
    return ir.Model(ir.Graph(edges, node.outputs, nodes=[node], initializers=held, opset_imports={"": 24}), ir_version=11)


def test_matmul_broadcasts_over_the_batch() -> None:
    model = _model("MatMul", {"x": ["batch", 5, 16]}, {"w": [16, 7]})
    assert graph_cost(model, {"batch": 3}) == Cost(2 * 3 * 5 * 16 * 7, 4 * (3 * 5 * 16 + 16 * 7 + 3 * 5 * 7))


def test_gemm_may_be_transposed() -> None:
    model = _model("Gemm", {"x": [16, "rows"]}, {"w": [7, 16], "bias": [7]}, transA=1, transB=1)
    assert graph_cost(model, {"rows": 5}) == Cost(2 * 5 * 16 * 7, 4 * (16 * 5 + 7 * 16 + 7 + 5 * 7))


def test_convolution_in_groups_counts_a_groups_channels() -> None:
    model = _model("Conv", {"x": ["n", 6, 9, 9]}, {"w": [4, 3, 3, 3]}, group=2, strides=[2, 2], pads=[1, 1, 1, 1])
    assert graph_cost(model, {"n": 2}) == Cost(2 * (2 * 4 * 5 * 5) * (3 * 3 * 3), 4 * (2 * 6 * 81 + 4 * 27 + 2 * 4 * 25))


def test_transposed_convolution_counts_what_each_input_value_reaches() -> None:
    model = _model("ConvTranspose", {"x": ["n", 6, 5, 5]}, {"w": [6, 4, 2, 2]}, strides=[2, 2])
    assert graph_cost(model, {"n": 2}) == Cost(2 * (2 * 6 * 5 * 5) * (4 * 2 * 2), 4 * (2 * 6 * 25 + 6 * 16 + 2 * 4 * 100))


def test_attention_of_grouped_queries_counts_every_query_head() -> None:
    model = _model("Attention", {"q": [2, 4, "s", 8], "k": [2, 1, "t", 8], "v": [2, 1, "t", 8]}, {})
    edges = 2 * 4 * 3 * 8 + 2 * (2 * 1 * 5 * 8) + 2 * 4 * 3 * 8
    assert graph_cost(model, {"s": 3, "t": 5}) == Cost(4 * 2 * 4 * 3 * 5 * 8, 4 * edges)


def test_what_cannot_be_counted_is_named() -> None:
    with pytest.raises(ValueError, match="input x: its axis batch"):
        graph_cost(_model("MatMul", {"x": ["batch", 5, 16]}, {"w": [16, 7]}), {})
    with pytest.raises(ValueError, match="Einsum the_node"):
        graph_cost(_model("Einsum", {"x": [5, 16]}, {"w": [16, 7]}, equation="ij,jk->ik"), {})


def test_a_shape_that_depends_on_data_is_named() -> None:
    x, w = ir.val("x", _FLOAT, ["n", 4]), ir.val("w", _FLOAT, [4, 2])
    chosen = ir.val("chosen", ir.DataType.BOOL, ["n"])
    compress = ir.node("Compress", [x, chosen], {"axis": 0}, name="compress")
    product = ir.node("MatMul", [compress.outputs[0], w], name="product")
    product.outputs[0].name = "out"
    graph = ir.Graph([x, w, chosen], product.outputs, nodes=[compress, product], opset_imports={"": 24})
    with pytest.raises(ValueError, match="MatMul product: the shape of"):
        graph_cost(ir.Model(graph, ir_version=11), {"n": 3})


@pytest.mark.parametrize(("sequence", "live", "kept"), [(320, 320, 1), (1, 320, 1), (336, 336, 16)])
def test_language_model_is_its_closed_formula(tiny: Tiny, sequence: int, live: int, kept: int) -> None:
    config, vocabulary, capacity, batch = open_base(str(tiny.base)).language, 487, 4096, 2
    hidden, queries, keys = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
    matrices = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * config.intermediate_size  # a layer's
    flops = batch * (sequence * config.layers * (2 * matrices + 4 * queries * live) + kept * 2 * hidden * vocabulary)

    vectors = config.layers * (2 * hidden + queries + 3 * keys) + hidden  # norms; biases, and what keys have in common
    weights = config.layers * matrices + hidden * vocabulary + vectors + capacity * config.head_dim  # the latter: rotary tables
    cache = batch * 2 * config.layers * keys * live  # live - sequence slots read, sequence written
    moved = 4 * (weights + batch * (sequence + kept) * hidden + cache) + 8 * (batch * sequence + batch + live + 2 * batch * kept)

    graph = build_language_model(config, vocabulary, capacity, _FLOAT)
    cost = graph_cost(graph.model, {"batch": batch, "sequence": sequence, "live": live, "kept": kept})
    assert cost.flops == flops
    assert 0 <= cost.bytes - moved < 1024  # the graph's own constants: axes, and the shapes of heads
    assert unit_flops(build_language_model(config, vocabulary, capacity, _FLOAT).model) == config.layers * (2 * matrices + 4 * queries) + (
        2 * hidden * vocabulary
    )

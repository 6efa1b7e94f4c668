"""Emulation rounds where a strongly typed engine stores, nowhere else, and never holds more than one weight in FP32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnx_ir import DataType

from vessel_export.parity.emulate import emulate, serialized, spell_out_attention, wide_options, widen
from vessel_rt.formats.bundle import Bundle

FLOAT16, BFLOAT16, FLOAT = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT


def _model(nodes: list[Any], inputs: dict[str, list[Any]], low: int) -> ir.Model:
    """A graph whose output is `y`, everything in it of the type `low`."""
    kinds = {name: TensorProto.BOOL if name == "mask" else low for name in inputs}
    values = [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in inputs.items()]
    graph = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", low, None)])
    inferred = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))
    for node in inferred.graph:
        for value in node.outputs:
            value.dtype = DataType(low)
    return inferred


def _run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    options = wide_options(ort.SessionOptions(), Path("."))
    session = ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(["y"], feeds)[0]
    return result


VALUES = np.array([70000, 65519, 1 + 2**-12, 1 + 2**-10, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 1e-7, -3.0, 3e38], np.float32)


@pytest.mark.parametrize(("low", "dtype"), [(FLOAT16, torch.float16), (BFLOAT16, torch.bfloat16)])
def test_results_are_rounded_to_the_graphs_type(low: int, dtype: torch.dtype) -> None:
    model = _model([helper.make_node("Neg", ["x"], ["y"])], {"x": ["n"]}, low)
    widen(model, rounding=True)
    expected = -torch.from_numpy(VALUES).to(dtype).float().numpy()
    assert np.array_equal(_run(model, x=VALUES), expected)
    assert expected[0] == (-np.inf if low == FLOAT16 else -70144)
    assert expected[2] == -1


def test_what_overflows_between_two_operators_is_seen() -> None:
    """300 * 300 / 300: infinite in FP16, where ONNX Runtime may keep the product in FP32."""
    nodes = [helper.make_node("Mul", ["x", "x"], ["square"]), helper.make_node("Div", ["square", "x"], ["y"])]
    x = np.full(4, 300, np.float32)
    for rounding, expected in ((True, np.inf), (False, 300)):
        model = _model(nodes, {"x": ["n"]}, FLOAT16)
        widen(model, rounding=rounding)
        assert (_run(model, x=x) == expected).all()


def test_a_sum_inside_an_operator_is_fp32() -> None:
    """1 + 1024 times 2^-12: FP16 would lose each of them."""
    model = _model([helper.make_node("MatMul", ["a", "b"], ["y"])], {"a": [1, 1025], "b": [1025, 1]}, FLOAT16)
    widen(model, rounding=True)
    a = np.full((1, 1025), 2.0**-12, np.float32)
    a[0, 0] = 1
    assert _run(model, a=a, b=np.ones((1025, 1), np.float32)) == 1.25


@pytest.mark.parametrize("masked", [False, True])
def test_attention_spelled_out_is_attention(masked: bool) -> None:
    """Six query heads on two key heads, as grouped-query attention has them."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((2, heads, length, 16)).astype(np.float32) for heads, length in ((6, 5), (2, 7), (2, 7)))
    feeds: dict[str, np.ndarray] = {"q": q, "k": k, "v": v}
    if masked:
        feeds["mask"] = np.tril(np.ones((2, 1, 5, 7), bool), 2)
    attributes = {} if masked else {"scale": 0.3}  # without one it is 1 / sqrt(16)
    nodes = [helper.make_node("Attention", list(feeds), ["mixed"], **attributes), helper.make_node("Identity", ["mixed"], ["y"])]
    results = []
    for spelled in (False, True):
        model = _model(nodes, {name: list(array.shape) for name, array in feeds.items()}, FLOAT16)
        if spelled:
            spell_out_attention(model)
            assert "Attention" not in {node.op_type for node in model.graph}
        widen(model, rounding=False)
        results.append(_run(model, **feeds))
    assert np.abs(results[0] - results[1]).max() < 1e-6


@pytest.mark.parametrize("precision", [None, FLOAT, FLOAT16])
def test_onnx_runtimes_own_attention_rounds_its_logits(precision: int | None) -> None:
    """On the CPU, whatever `softmax_precision` says: why the graphs take from all keys what they share (docs/numerics.md)."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, 1, 8, 128)).astype(np.float16) for _ in range(3))
    q[..., 63] = k[..., 63] = 300
    attributes = {"scale": 128**-0.5} | ({} if precision is None else {"softmax_precision": precision})
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], **attributes)
    model, wide = (_model([node], {name: [1, 1, 8, 128] for name in "qkv"}, FLOAT16) for _ in range(2))
    widen(wide, rounding=True)
    exact = _run(wide, **{name: array.astype(np.float32) for name, array in zip("qkv", (q, k, v), strict=True)})
    assert np.abs(_run(model, q=q, k=k, v=v) - exact).max() > 0.1 * np.abs(exact).max()
    assert np.abs(_run(model, q=q, k=k - k[:, :, :1], v=v) - exact).max() < 2e-3 * np.abs(exact).max()


@pytest.mark.parametrize("stage", ["vision_encoder", "language_model", "sam2_image_encoder", "sam2_mask_decoder"])
def test_weights_stay_narrow_until_they_are_used(small_fp16: Path, stage: str) -> None:
    model = ir.load(small_fp16 / f"{stage}.onnx")
    before = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    widen(model, rounding=True)
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == before
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} <= {DataType.FLOAT, DataType.INT64}
    order = {node: i for i, node in enumerate(model.graph)}
    narrow = [value for value in model.graph.initializers.values() if value.dtype == DataType.FLOAT16]
    assert narrow
    for value in narrow:
        for cast, _ in value.uses():
            assert cast.op_type == "Cast"
            [(user, _)] = cast.outputs[0].uses()
            between = list(order)[order[cast] + 1 : order[user]]
            assert {node.op_type for node in between} <= {"Cast"}, value.name  # its neighbours' widening, for the same operator


def test_an_emulated_bundle_is_fp32_at_its_edge(small_fp16: Path) -> None:
    deployment = emulate(Bundle.load(small_fp16))
    for stage in deployment.bundle.stages.values():
        assert {spec.dtype for spec in (*stage.inputs, *stage.outputs)} <= {"float32", "int64"}

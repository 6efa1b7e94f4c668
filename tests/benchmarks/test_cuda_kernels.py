"""The graphs that the exporter writes need no CUDA kernels but those that were found in the oldest onnxruntime-gpu that is admitted."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.cuda_kernels import RESULT, nodes_of
from tests.support.paths import ROOT
from vessel_rt.formats.bundle import Bundle


@pytest.fixture(scope="module")
def result() -> Any:
    return json.loads(RESULT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("bundle", ["fp32_bundle", "fp16_bundle", "bf16_bundle", "int8_fp16_bundle", "int4_fp16_bundle"])
def test_every_node_has_a_kernel(bundle: str, result: Any, request: pytest.FixtureRequest) -> None:
    """Quantized bundles with FP32 activations are for CPUs alone. What a new graph lacks, `python -m benchmarks.cuda_kernels` finds."""
    folder, kernels, on_the_host = request.getfixturevalue(bundle), set(result["kernels"]), set(result["on_the_host"])
    for stage in Bundle.load(folder).all_stages.values():
        nodes = nodes_of(folder / stage.file)
        assert nodes
        assert [node for node in nodes if node.kernel not in kernels and not (node.on_host and node.kernel in on_the_host)] == []


def test_the_kernels_are_those_of_the_oldest_version_that_is_admitted(result: Any) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    [gpu] = [wanted for wanted in extras["gpu"] if wanted.startswith("onnxruntime-gpu[")]
    assert f">={'.'.join(result['onnxruntime_gpu'].split('.')[:2])}," in gpu
    assert result["wrong"] == []


def test_nothing_but_inputs_and_outputs_was_copied(result: Any) -> None:
    """At most some shapes, to the device; not the cache, and nothing that grows with the images. Concat copies a table of 8 bytes for each
    position along its axis: of the keys of memories, in the three Concats of the tiny sam2_memory_attention."""
    for bundle, runs in result["copied_besides_inputs_and_outputs"].items():
        assert len(runs) == 16, bundle
        for what, (to_device, to_host) in runs.items():
            if what.startswith("sam2_memory_attention"):
                keys = (1024 + 4) * int(what.split()[1])
                assert (to_device < 4096 + 3 * 8 * keys, to_host) == (True, 0), (bundle, what)
                continue
            assert (to_device < 4096, to_host) == (True, 0), (bundle, what)
            assert runs[what.replace("2 ", "1 ")] == [to_device, to_host]


def test_a_node_is_named_by_its_operator_version_and_types(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 4])
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="a"),
        helper.make_node("Gather", ["shape", "first"], ["rows"], name="b"),
        helper.make_node("Concat", ["rows", "rest"], ["wanted"], axis=0, name="c"),
        helper.make_node("MatMul", ["x", "w"], ["z"], name="d"),
        helper.make_node("Reshape", ["z", "wanted"], ["y"], name="e"),
    ]
    weights = [
        helper.make_tensor("first", TensorProto.INT64, [1], [0]),
        helper.make_tensor("rest", TensorProto.INT64, [1], [4]),
        helper.make_tensor("w", TensorProto.FLOAT16, [8, 4], [0.0] * 32),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=[helper.make_opsetid("", 24)])
    onnx.save(model, tmp_path / "g.onnx")
    assert [(node.name, node.kernel, node.on_host) for node in nodes_of(tmp_path / "g.onnx")] == [
        ("a", "Shape-24(float16)", True),
        ("b", "Gather-13(int64, int64)", True),
        ("c", "Concat-13(int64, int64)", True),
        ("d", "MatMul-13(float16, float16)", False),
        ("e", "Reshape-24(float16, int64)", False),
    ]

"""Partitions of a graph: run in order they give the same bits as the whole graph, and chained they have its inputs and outputs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

from vessel_export.engines.partition import EP_CONTEXT, Context, chain, layer_cuts, partition, weight_files
from vessel_rt.formats.bundle import Bundle

Arrays = dict[str, npt.NDArray[Any]]


@pytest.mark.parametrize(
    ("layers", "partitions", "cuts"),
    [(28, 4, [6, 13, 20]), (3, 2, [0]), (2, 4, [0]), (28, 1, []), (5, 3, [0, 2])],
)
def test_partitions_have_nearly_equal_depth(layers: int, partitions: int, cuts: list[int]) -> None:
    assert layer_cuts(layers, partitions) == [f"residual.{layer}" for layer in cuts]
    ends = [-1, *cuts, layers - 1]
    depths = [after - before for before, after in itertools.pairwise(ends)]
    assert max(depths) - min(depths) <= 1


def _load(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / "language_model.onnx", load_external_data=False)


def _feeds(bundle: Bundle) -> Arrays:
    """A call in the middle of a sequence: two rows that have consumed 5 tokens, and now consume 3."""
    random, sizes = np.random.default_rng(0), bundle.language_model
    stage = bundle.stages["language_model"]
    cache = (2, sizes.kv_heads, sizes.capacity, sizes.head_dim)
    past = {spec.name: random.normal(size=cache).astype(spec.dtype) for spec in stage.inputs if spec.name.startswith("past_")}
    return past | {
        "inputs_embeds": random.normal(size=(2, 3, sizes.hidden_size)).astype(stage.input_dtype("inputs_embeds")),
        "position_ids": np.array([[5, 6, 7], [5, 6, 7]]),
        "write_indices": np.array([5, 5]),
        "kv_positions": np.arange(8),
        "gather_positions": np.array([[0, 2], [1, 2]]),
    }


def _run(graph: onnx.ModelProto, bundle: Path, feeds: Arrays) -> Arrays:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {value.name: feeds[value.name] for value in session.get_inputs()}), strict=True))


def test_partitions_compute_what_the_whole_computes(small_fp32: Path) -> None:
    model, bundle = _load(small_fp32), Bundle.load(small_fp32)
    feeds = _feeds(bundle)
    whole, values = _run(model, small_fp32, feeds), dict(feeds)
    pieces = partition(model, layer_cuts(bundle.language_model.layers, 99))
    assert len(pieces) == bundle.language_model.layers > 1
    for piece in pieces:
        values |= _run(piece, small_fp32, values)
    for name, array in whole.items():
        assert np.array_equal(array, values[name]), name
    matrices = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    assert [node.name for piece in pieces for node in piece.graph.node if node.op_type == "MatMul"] == matrices, "work is done twice"


def test_a_model_that_is_not_cut(small_fp32: Path) -> None:
    model = _load(small_fp32)
    [piece] = partition(model, [])
    assert len(piece.graph.node) == len(model.graph.node)
    assert {value.name for value in piece.graph.input} == {value.name for value in model.graph.input}
    assert [value.name for value in piece.graph.output] == [value.name for value in model.graph.output]


def test_a_cut_where_there_is_no_value(small_fp32: Path) -> None:
    with pytest.raises(ValueError, match=r"language_model has no value residual\.99"):
        partition(_load(small_fp32), ["residual.99"])


def test_partitions_are_chained_to_a_model_of_the_same_inputs_and_outputs(small_fp32: Path) -> None:
    model = _load(small_fp32)
    pieces = partition(model, layer_cuts(Bundle.load(small_fp32).language_model.layers, 2))
    contexts = [
        Context(
            tuple(value.name for value in piece.graph.input),
            tuple(value.name for value in piece.graph.output),
            {"ep_cache_context": f"{i}.engine", "embed_mode": 0, "partition_name": "alike"},
        )
        for i, piece in enumerate(pieces)
    ]
    chained = chain(model, contexts, {"key": "value"})
    assert list(chained.graph.input) == list(model.graph.input)
    assert list(chained.graph.output) == list(model.graph.output)
    assert [node.op_type for node in chained.graph.node] == [EP_CONTEXT] * 2
    assert not chained.graph.initializer
    attributes = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in chained.graph.node]
    assert [a["ep_cache_context"] for a in attributes] == [b"0.engine", b"1.engine"]
    assert len({a["partition_name"] for a in attributes}) == len({node.name for node in chained.graph.node}) == 2
    assert {entry.key: entry.value for entry in chained.metadata_props} == {"key": "value"}
    known = {value.name for value in chained.graph.input}
    for node in chained.graph.node:
        assert set(node.input) <= known
        known |= set(node.output)
    assert {value.name for value in chained.graph.output} <= known


def test_weight_files_are_those_that_a_graph_reads(small_fp32: Path) -> None:
    assert weight_files(_load(small_fp32)) == ["weights/language_model.safetensors"]
    vision = onnx.load(small_fp32 / "vision_encoder.onnx", load_external_data=False)
    assert weight_files(vision) == ["weights/projector.safetensors", "weights/vision_model.safetensors"]

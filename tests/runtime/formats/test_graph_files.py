from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, helper

from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.graph_files import named_files

ONE_LINE = r"\A.+\Z"


def outside(location: str) -> TensorProto:
    """A tensor whose values are in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def node_with(**attribute: Any) -> onnx.NodeProto:
    return onnx.NodeProto(op_type="Constant", output=["c"], attribute=[AttributeProto(name="value", **attribute)])


def sparse(values: str, indices: str) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=outside(values), indices=outside(indices), dims=[4])


def graph_of(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(nodes, "g", [], [])


def model_of(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph)


def everywhere() -> onnx.ModelProto:
    """A model with a file named in every place where ONNX has a tensor."""
    inner = graph_of(node_with(t=outside("in/attribute_t")), node_with(tensors=[outside("in/attribute_tensors")]))
    inner.initializer.append(outside("in/inner_initializer"))
    graph = graph_of(
        node_with(g=inner),
        node_with(graphs=[graph_of(node_with(t=outside("in/graphs")))]),
        node_with(sparse_tensor=sparse("in/sparse_values", "in/sparse_indices")),
        node_with(sparse_tensors=[sparse("in/sparses_values", "in/sparses_indices")]),
        helper.make_node("EPContext", [], ["y"], domain="com.microsoft", ep_cache_context="engine", onnx_model_filename="origin.onnx"),
    )
    graph.initializer.append(outside("in/initializer"))
    graph.sparse_initializer.append(sparse("in/sparse_initializer", "in/sparse_initializer_indices"))
    model = model_of(graph)
    function = helper.make_function("local", "f", [], ["c"], [node_with(t=outside("in/function"))], [helper.make_opsetid("", 21)])
    function.attribute_proto.append(AttributeProto(name="a", type=AttributeProto.TENSOR, t=outside("in/function_default")))
    model.functions.append(function)
    model.training_info.add(initialization=graph_of(node_with(t=outside("in/initialization"))), algorithm=graph_of())
    model.training_info[0].algorithm.initializer.append(outside("in/algorithm"))
    return model


def locations(message: Any) -> Iterator[str]:
    """Every external location and engine that a protobuf message holds, found by its descriptors: no list of places to forget one in."""
    if isinstance(message, onnx.StringStringEntryProto):
        return
    if isinstance(message, TensorProto):
        yield from (entry.value for entry in message.external_data if entry.key == "location")
    if isinstance(message, AttributeProto) and message.name in ("ep_cache_context", "onnx_model_filename"):
        yield message.s.decode("utf-8", "replace")
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            repeated: Iterable[Any] = value if not hasattr(value, "ListFields") else [value]
            for each in repeated:
                yield from locations(each)


def test_every_place_that_can_name_a_file_is_found(tmp_path: Path) -> None:
    path, model = tmp_path / "x.onnx", everywhere()
    path.write_bytes(model.SerializeToString())
    found = named_files(path)
    assert found == set(locations(model))
    assert {"engine", "origin.onnx"} < found
    assert len(found) == 17


def test_the_bundles_graphs_name_their_weights(fp32_bundle: Path) -> None:
    bundle = Bundle.load(fp32_bundle)
    found = set().union(*(named_files(fp32_bundle / stage.file) for stage in bundle.all_stages.values()))
    assert found == {name for name in bundle.files if name.startswith("weights/")} - {bundle.embed_tokens.file}


def test_a_key_that_is_there_twice_hides_nothing(tmp_path: Path) -> None:
    """Protobuf takes the last one; whichever it is, the value may be a file's name."""
    tensor = outside("first").SerializeToString().replace(b"location", b"lacation")
    entry = b"\x0a\x08location\x0a\x03abc\x12\x06hidden"
    content = tensor + bytes([13 << 3 | 2, len(entry)]) + entry
    graph = bytes([5 << 3 | 2, len(content)]) + content
    (tmp_path / "x.onnx").write_bytes(bytes([7 << 3 | 2, len(graph)]) + graph)
    assert named_files(tmp_path / "x.onnx") == {"hidden"}


@pytest.mark.parametrize(
    "content",
    [
        b"\x3a\x05\x00",  # longer than the file
        b"\x3a",
        b"\x08",
        b"\x08\xff",
        b"\x0b\x0c",  # a group
        b"\x3f\x00",  # wire type 7
        b"\xba\x80\x00\x00",  # a tag longer than it need be
        b"\xba\x80\x80\x80\x80\x00\x00",
        b"\x3a\x80\x80\x80\x80\x10" + bytes(16),  # a length beyond 32 bits
        b"\xba\x80\x80\x80\x10\x00",  # a tag whose upper bits some parsers drop
        b"not a graph",
    ],
)
def test_bytes_that_parsers_may_differ_about_are_no_graph(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=ONE_LINE):
        named_files(tmp_path / "x.onnx")


def test_no_file_that_protobuf_finds_in_a_damaged_graph_is_missed(tmp_path: Path) -> None:
    path, content, rng = tmp_path / "x.onnx", everywhere().SerializeToString(), random.Random(0)
    taken = 0
    for _ in range(3000):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(damaged))
            if rng.random() < 0.3:
                del damaged[at : at + rng.randint(1, 4)]
            else:
                damaged[at] = rng.randrange(256)
        try:
            model = onnx.ModelProto.FromString(bytes(damaged))
        except DecodeError:
            continue
        path.write_bytes(damaged)
        try:
            found = named_files(path)
        except ValueError:
            continue
        taken += 1
        assert found >= {str(Path(name)) for name in locations(model)}
    assert taken > 100


def test_a_graph_has_a_bound(tmp_path: Path) -> None:
    with (tmp_path / "x.onnx").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="larger than"):
        named_files(tmp_path / "x.onnx")


def test_deep_nesting_is_walked_without_recursion(tmp_path: Path) -> None:
    content = b""
    for _ in range(3000):
        for field in (6, 5, 1):  # the graph of an attribute of a node of a graph
            content = _field(field, content)
    (tmp_path / "x.onnx").write_bytes(_field(7, content))
    assert named_files(tmp_path / "x.onnx") == set()


def _field(number: int, content: bytes) -> bytes:
    length, digits = len(content), b""
    while length >= 128:
        digits, length = digits + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + digits + bytes([length]) + content

"""Integers and scales of a matrix, and the graph that multiplies by them on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

from vessel_export.graphs.assemble import Graph, assemble, save_graph
from vessel_export.graphs.layers import FLOAT, Linear
from vessel_export.graphs.quantize import Form, MatrixType, quantize_graph, quantized, with_quantized
from vessel_export.io.safetensors_writer import OutputTensor, file_size, in_pieces, write_safetensors
from vessel_rt.device.providers import Device, open_device
from vessel_rt.device.session import Session

KINDS = {name: MatrixType.named(name) for name in ("int8", "int4")}


def output(matrix: torch.Tensor, dtype: torch.dtype = torch.float32) -> OutputTensor:
    return OutputTensor("w.weight", tuple(matrix.shape), dtype, lambda: in_pieces(matrix))


def values(
    matrix: torch.Tensor, block: int, weights: str, dtype: torch.dtype = torch.float32, form: Form = "DequantizeLinear"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [in, out] and scales [in / block, out] as they are stored, without columns that fill up the matrix."""
    rows, columns = matrix.shape
    integers, scales = (torch.cat(list(tensor.pieces())) for tensor in quantized(output(matrix, dtype), block, KINDS[weights], form))
    if weights == "int4":
        integers = torch.stack([integers & 15, integers >> 4], dim=-1).to(torch.int8)
    if form == "MatMulNBits":
        return integers.reshape(columns, rows).T.to(torch.int16) - KINDS[weights].largest - 1, scales.reshape(columns, -1).T
    integers = integers if weights == "int8" else ((integers << 4) >> 4).reshape(rows, -1)
    return integers[:, :columns], scales.reshape(rows // block, -1)[:, :columns]


def block_of(rows: int, weights: str) -> int:
    return rows if weights == "int8" else next(size for size in (128, 64, 32, 16) if rows % size == 0)


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Columns of different magnitudes; the scales of some have few digits in FP16."""
    generator = torch.manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-7, 2, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", [96, 33])
@pytest.mark.parametrize(
    ("weights", "block", "form"),
    [
        ("int8", 256, "DequantizeLinear"),
        ("int4", 16, "DequantizeLinear"),
        ("int8", 128, "MatMulNBits"),
        ("int4", 128, "MatMulNBits"),
        ("int8", 256, "MatMulIntegerToFloat"),
    ],
)
def test_no_value_is_more_than_half_a_step_away(weights: str, block: int, form: Form, columns: int, dtype: torch.dtype) -> None:
    matrix = random(256, columns)
    integers, scales = values(matrix, block, weights, dtype, form)
    assert (scales.dtype, scales.shape) == (dtype, (256 // block, columns))
    steps = scales.double().repeat_interleave(block, 0)
    errors = (integers * steps - matrix.double()).abs() / steps
    assert errors.max() <= 0.5 + 1e-5
    assert integers.abs().max() == KINDS[weights].largest


def test_halves_are_rounded_to_even_and_zeros_stay_zeros() -> None:
    matrix = torch.zeros(16, 2)
    matrix[:5, 0] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5])
    integers, scales = values(matrix, 16, "int8")
    assert integers[:5, 0].tolist() == [127, 0, 2, 2, 0]
    assert scales.tolist() == [[1.0, 1.0]], "TensorRT refuses a scale of zero"
    assert not integers[:, 1].any()


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_pieces_give_the_bits_of_the_whole(weights: str, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random(33, 640).T if transposed else random(640, 33)
    block = 640 if weights == "int8" else 64
    whole = [torch.cat(list(tensor.pieces())) for tensor in quantized(output(matrix), block, KINDS[weights])]
    monkeypatch.setattr("vessel_export.io.safetensors_writer.PIECE", 1)
    assert len(list(in_pieces(matrix))) == 5
    for tensor, expected in zip(quantized(output(matrix), block, KINDS[weights]), whole, strict=True):
        assert torch.equal(torch.cat(list(tensor.pieces())), expected)
    scales = quantized(output(matrix), block, KINDS[weights])[1]
    assert torch.equal(torch.cat(list(scales.pieces())), whole[1]), "also before the integers"


def test_the_matrix_itself_is_not_changed() -> None:
    for matrix in (random(128, 48), random(48, 128).T):
        before = matrix.clone()
        values(matrix, 128, "int8")
        assert torch.equal(matrix, before)


def test_pieces_must_be_whole_blocks() -> None:
    tensor = OutputTensor("w.weight", (32, 4), torch.float32, lambda: torch.ones(32, 4).split(24))
    with pytest.raises(ValueError, match=r"w\.weight: a piece of 24 rows"):
        list(quantized(tensor, 16, KINDS["int4"])[0].pieces())


def test_int4_is_packed_as_onnx_packs_it() -> None:
    matrix = random(16, 5)
    (packed,) = quantized(output(matrix), 16, KINDS["int4"])[0].pieces()
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, (16, 16), packed.numpy().tobytes(), raw=True)  # filled up with zeros
    stored = onnx.numpy_helper.to_array(tensor).astype(np.int8)
    assert np.array_equal(stored[:, :5], values(matrix, 16, "int4")[0].numpy())
    assert not stored[:, 5:].any()


def product(rows: int, columns: int, dtype: ir.DataType = FLOAT) -> Graph:
    """x [batch, rows] -> x @ w [batch, columns]."""
    linear = Linear(rows, columns, dtype, bias=False)
    return assemble("w", linear, [ir.val("x", dtype, ["batch", rows])], [ir.val("y", dtype, ["batch", columns])], activation_bytes=1)


def written(folder: Path, matrix: torch.Tensor, weights: str, form: Form = "DequantizeLinear") -> Path:
    """The graph of `product` with quantized `matrix`, in `folder`."""
    graph = product(*matrix.shape)
    blocks, _ = quantize_graph(graph, KINDS[weights], form=form)
    tensor = OutputTensor("weight", tuple(matrix.shape), torch.float32, lambda: in_pieces(matrix))
    file = write_safetensors(folder, "w.safetensors", with_quantized([tensor], blocks, KINDS[weights], form))
    return folder / save_graph(graph, folder, file.locations).file


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("shape", [(256, 96), (192, 33), (96, 1), (48, 151)])
def test_the_graph_multiplies_by_the_rounded_matrix(tmp_path: Path, weights: str, shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    path = written(tmp_path, matrix, weights)
    block = block_of(shape[0], weights)
    integers, scales = values(matrix, block, weights)
    x = np.random.default_rng(0).standard_normal((7, shape[0])).astype(np.float32)
    expected = x @ (integers * scales.repeat_interleave(block, 0)).numpy()

    exact = ort.SessionOptions()
    exact.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (unfused,) = ort.InferenceSession(path, exact, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert np.abs(unfused - expected).max() <= 1e-6 * np.abs(expected).max()

    with Session(path, open_device(Device("cpu"))) as session:  # rounds x to 8 bits, a scale for each block
        fused = session.run({"x": x})["y"]
    sums = np.abs(x).max() / 127 * np.abs((integers * scales.repeat_interleave(block, 0)).numpy()).sum(0)  # of half a step each, twice
    assert (np.abs(fused - expected) <= sums).all()


@pytest.mark.parametrize("shape", [(256, 96), (192, 48), (96, 16), (48, 160)])
def test_both_forms_of_int4_give_the_same_bits_on_a_cpu(tmp_path: Path, shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    x = np.random.default_rng(0).standard_normal((7, shape[0])).astype(np.float32)
    found = []
    for form in ("DequantizeLinear", "MatMulNBits"):
        (tmp_path / form).mkdir()
        with Session(written(tmp_path / form, matrix, "int4", form), open_device(Device("cpu"))) as session:
            found.append(session.run({"x": x})["y"])
    assert np.array_equal(*found)


@pytest.mark.parametrize("block", [16, 128])
def test_matmulnbits_has_the_same_integers_and_scales(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random(256, 48)
    integers, scales = values(matrix, block, "int4")
    monkeypatch.setattr("vessel_export.graphs.quantize.PIECE", 1024)  # several strips of columns
    fused_integers, fused_scales = values(matrix, block, "int4", form="MatMulNBits")
    assert torch.equal(fused_integers, integers.to(torch.int16))
    assert torch.equal(fused_scales, scales)
    for tensor in quantized(output(matrix), block, KINDS["int4"], "MatMulNBits"):
        stored = torch.cat(list(tensor.pieces()))
        assert (tensor.shape, tensor.dtype) == (stored.shape, stored.dtype)


def products(path: Path, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    with Session(path, open_device(Device("cpu"))) as session:
        found: npt.NDArray[np.float32] = session.run({"x": x})["y"]
    return found


@pytest.mark.parametrize("shape", [(256, 96), (24, 33), (96, 1)])
def test_columns_with_one_scale_are_multiplied_by_rows_with_one_scale(tmp_path: Path, shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    integers, scales = values(matrix, shape[0], "int8")
    x = np.random.default_rng(0).standard_normal((7, shape[0])).astype(np.float32) * np.logspace(-5, 3, 7, dtype=np.float32)[:, None]
    x[3] = 0
    path = written(tmp_path, matrix, "int8", "MatMulIntegerToFloat")
    steps = np.maximum(np.maximum(x.max(1, keepdims=True) / 127, x.min(1, keepdims=True) / -128), 1e-30)
    expected = (np.rint(x / steps) @ integers.numpy().astype(np.float64)) * steps * scales.numpy()
    found = products(path, x)
    assert np.abs(found - expected).max() <= 1e-2 * np.abs(expected).max()  # x / steps may be rounded to the other side
    assert np.abs(found - expected).mean() <= 1e-5 * np.abs(expected).max()
    assert not found[3].any()
    for row in range(len(x)):
        assert np.array_equal(products(path, x[row : row + 1])[0], found[row]), "a row does not depend on the others"


@pytest.mark.parametrize(("operator", "zero_point"), [("Gelu", 32), ("Relu", 128)])
def test_most_integers_are_left_to_the_positive_results_of_gelu(operator: str, zero_point: int) -> None:
    graph = product(32, 4)
    before = ir.node(operator, graph.model.graph.inputs[:1])
    graph.model.graph.insert_before(graph.model.graph[0], before)
    graph.model.graph[1].replace_input_with(0, before.outputs[0])
    quantize_graph(graph, KINDS["int8"], (), "MatMulIntegerToFloat")
    (node,) = (node for node in graph.model.graph if node.op_type == "MatMulIntegerToFloat")
    constant = node.inputs[4]
    assert constant
    assert constant.const_value
    assert constant.const_value.numpy() == zero_point


def test_integers_and_scales_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random(640, 33)
    integers, scales = values(matrix, 640, "int8")
    monkeypatch.setattr("vessel_export.io.safetensors_writer.PIECE", 1)
    tensors = quantized(output(matrix), 640, KINDS["int8"], "MatMulIntegerToFloat")
    assert [(tensor.shape, tensor.dtype) for tensor in tensors] == [((640, 33), torch.int8), ((33,), torch.float32)]
    assert torch.equal(torch.cat(list(tensors[0].pieces())), integers)
    assert torch.equal(torch.cat(list(tensors[1].pieces())), scales[0])


def test_processors_without_vnni_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime takes other instructions there; the largest integers would overflow."""
    path = written(tmp_path, torch.ones(256, 96), "int8", "MatMulIntegerToFloat")
    x = np.ones((7, 256), np.float32)
    found = []
    for cpu in ("flags: avx2", "flags: avx2 avx512_vnni"):
        (tmp_path / "cpuinfo").write_text(cpu, encoding="ascii")
        monkeypatch.setattr("vessel_rt.device.session._CPUINFO", tmp_path / "cpuinfo")
        found.append(products(path, x))
    assert np.array_equal(*found)
    assert np.allclose(found[0], 256)


def test_the_cpu_fuses_dequantization_at_the_level_that_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, random(256, 64), "int4")
    options = ort.SessionOptions
    monkeypatch.setattr(ort, "SessionOptions", lambda: _saving(options(), tmp_path / "optimized.onnx"))
    with Session(path, open_device(Device("cpu"))):
        (node,) = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert (node.op_type, attributes["accuracy_level"], attributes["block_size"], attributes["bits"]) == ("MatMulNBits", 4, 128, 4)


def _saving(options: ort.SessionOptions, path: Path) -> ort.SessionOptions:
    options.optimized_model_filepath = str(path)
    return options


def test_blocks_divide_the_rows_and_what_cannot_be_divided_is_kept() -> None:
    for rows, block in ((3584, 128), (320, 64), (96, 32), (80, 16)):
        assert quantize_graph(product(rows, 4), KINDS["int4"]) == ({"weight": block}, {})
        assert quantize_graph(product(rows, 4), KINDS["int8"], form="MatMulNBits") == ({"weight": block}, {})
        assert quantize_graph(product(rows, 4), KINDS["int8"]) == ({"weight": rows}, {})
    graph = product(24, 4)
    assert quantize_graph(graph, KINDS["int4"]) == ({}, {"weight": "its 24 rows are not a multiple of 16"})
    assert [node.op_type for node in graph.model.graph] == ["MatMul"]


def test_exempt_matrices_are_kept_with_the_reason() -> None:
    assert quantize_graph(product(32, 4), KINDS["int8"], exempt={"weight": "a reason"}) == ({}, {"weight": "a reason"})


def test_columns_have_no_blocks() -> None:
    graph = product(24, 4)
    assert quantize_graph(graph, KINDS["int8"], (), "MatMulIntegerToFloat") == ({"weight": 24}, {})
    assert "MatMul" not in [node.op_type for node in graph.model.graph]


def test_what_the_recipe_keeps_is_kept() -> None:
    graph = product(32, 4)
    assert quantize_graph(graph, KINDS["int8"], ["other", "w*t"]) == ({}, {"weight": "the recipe keeps w*t"})
    assert [node.op_type for node in graph.model.graph] == ["MatMul"]


def test_a_file_has_integers_and_scales_and_the_size_that_was_planned(tmp_path: Path) -> None:
    tensors = quantized(output(random(256, 60), torch.float16), 256, KINDS["int8"])
    file = write_safetensors(tmp_path, "w.safetensors", tensors)
    assert file.bytes == file_size(tensors) == (tmp_path / "w.safetensors").stat().st_size
    loaded = load_file(tmp_path / "w.safetensors")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()} == {
        "w.weight": (torch.int8, (256, 64)),
        "w.weight_scale": (torch.float16, (64,)),
    }

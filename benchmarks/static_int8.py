"""Products of 8-bit matrices and 8-bit activations as TensorRT expects them, for the CPU: one fixed scale for each activation (W8A8).

The scales come from a calibration: the largest magnitude of each activation over some images and questions, divided by 127. Everything
else stays FP32, so the masks show what the 8 bits do alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from tokenizers import Tokenizer

from vessel_export.graphs.assemble import Graph, save_graph
from vessel_export.graphs.quantize import MatrixType, quantize_graph, quantized
from vessel_export.io.safetensors_writer import OutputTensor, in_pieces, write_safetensors
from vessel_export.parity.emulate import serialized, wide_options
from vessel_export.parity.inputs import Array, one_pass, read_samples
from vessel_rt.device.deployment import Deployment
from vessel_rt.device.providers import Device, onnxruntime
from vessel_rt.device.session import Session
from vessel_rt.formats.bundle import Bundle
from vessel_rt.model.preprocess import tile_pixels
from vessel_rt.model.prompt import EmbedTokens, PromptTokenizer

__all__ = ["calibrate", "matrix_of", "products_of", "stored_tensors", "with_static_activations"]

STAGES = ("vision_encoder", "language_model")


def calibrate(bundle: Bundle, images: Sequence[Path], questions: Sequence[str]) -> dict[str, float]:
    """The largest magnitude of what each matrix is multiplied by, by the matrix's name. `bundle` is FP32.

    The answer is not generated: the prompt and the bundle's first answer go through the language model in one pass.
    """
    observers = {stage: _Observer(bundle, stage) for stage in STAGES}
    answer = (
        Tokenizer.from_file(str(bundle.folder / bundle.prompt.tokenizer)).encode(bundle.prompt.answers[0], add_special_tokens=False).ids
    )
    with EmbedTokens(bundle) as embed:
        for question in questions:
            before, after = PromptTokenizer(bundle).encode(question)
            for sample in read_samples(images):
                image = observers["vision_encoder"].run({"pixel_values": tile_pixels(sample.runtime, bundle.tiles)}, "image_embeds")
                embeds = [embed.rows(before), image.reshape(-1, image.shape[-1]), embed.rows(after + answer)]
                feeds = one_pass(bundle.language_model, np.concatenate(embeds)[None].astype(np.float32), kept=1)
                observers["language_model"].run(feeds, "hidden_states")
    return {name: peak for observer in observers.values() for name, peak in observer.peaks.items()}


class _Observer:
    """A stage's graph that also returns the largest magnitude of what each of its matrices is multiplied by."""

    def __init__(self, bundle: Bundle, stage: str) -> None:
        model = ir.load(bundle.folder / bundle.stages[stage].file)
        products = {matrix_of(node): node for node in products_of(model.graph)}
        for name, node in products.items():
            magnitude = ir.node("Abs", [node.inputs[0]])
            peak = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
            magnitude.outputs[0].name, peak.outputs[0].name = f"{name}/magnitude", f"{name}/peak"
            peak.outputs[0].dtype, peak.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
            model.graph.insert_before(node, [magnitude, peak])
            model.graph.outputs.append(peak.outputs[0])
        options = wide_options(onnxruntime().SessionOptions(), bundle.folder)
        options.log_severity_level = 3
        self._session = onnxruntime().InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
        self.peaks = dict.fromkeys(products, 0.0)

    def run(self, feeds: Mapping[str, Array], output: str) -> Array:
        result, *peaks = self._session.run([output, *(f"{name}/peak" for name in self.peaks)], dict(feeds))
        for name, peak in zip(self.peaks, peaks, strict=True):
            self.peaks[name] = max(self.peaks[name], float(peak))
        found: Array = result
        return found


def products_of(graph: ir.Graph) -> list[ir.Node]:
    """The products with a matrix of weights."""
    return [node for node in graph if node.op_type == "MatMul" and (right := node.inputs[1]) is not None and right.is_initializer()]


def matrix_of(product: ir.Node) -> str:
    """The name of a product's matrix."""
    return str(product.inputs[1].name) if product.inputs[1] else ""


def with_static_activations(bundle: Bundle, folder: Path, peaks: Mapping[str, float], keep: Sequence[str]) -> Deployment:
    """`bundle` with matrices in INT8, a scale for each column, and their activations in INT8. `folder` is a new one in the bundle's."""
    folder.mkdir()
    graphs = {name: bundle.folder / stage.file for name, stage in bundle.stages.items()}
    return _AsWritten(bundle, Device("cpu"), graphs | {stage: _static_graph(bundle, stage, folder, peaks, keep) for stage in STAGES})


def _static_graph(bundle: Bundle, stage: str, folder: Path, peaks: Mapping[str, float], keep: Sequence[str]) -> Path:
    kind = MatrixType.named("int8")
    model = ir.load(bundle.folder / bundle.stages[stage].file)
    tensors = stored_tensors(bundle, model)
    graph = Graph(stage, model, 0, 0)
    products = {matrix_of(node): node for node in products_of(model.graph)}
    blocks, _ = quantize_graph(graph, kind, keep)
    for name in blocks:
        _round(model.graph, products[name], peaks[name] / kind.largest)
    stored = [made for tensor in tensors for made in (quantized(tensor, blocks[tensor.name], kind) if tensor.name in blocks else (tensor,))]
    return folder / save_graph(graph, folder, write_safetensors(folder, f"{stage}.safetensors", stored).locations).file


def stored_tensors(bundle: Bundle, model: ir.Model) -> list[OutputTensor]:
    """The weights of a stage's `model`, which loses them: it is to be saved with others."""
    tensors = []
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            array = torch.from_numpy(np.array(_mapped(bundle.folder, value.const_value)))
            tensors.append(OutputTensor(name, tuple(array.shape), array.dtype, functools.partial(in_pieces, array)))
            value.const_value = None
    return tensors


def _mapped(folder: Path, tensor: ir.ExternalTensor) -> Array:
    return np.memmap(folder / tensor.location, tensor.dtype.numpy(), "r", offset=tensor.offset or 0, shape=tuple(tensor.shape.numpy()))


def _round(graph: ir.Graph, product: ir.Node, scale: float) -> None:
    """Put QuantizeLinear and DequantizeLinear before a product's activation."""
    constants = [ir.node("Constant", [], {"value": ir.tensor(value)}) for value in (np.float32(scale), np.int8(0))]
    there = ir.node("QuantizeLinear", [product.inputs[0], *(node.outputs[0] for node in constants)])
    back = ir.node("DequantizeLinear", [there.outputs[0], *(node.outputs[0] for node in constants)])
    for node, name in zip((*constants, there, back), ("scale", "zero", "int8", "rounded"), strict=True):
        node.outputs[0].name = f"{product.name}/{name}"
    graph.insert_before(product, [*constants, there, back])
    product.replace_input_with(0, back.outputs[0])


class _AsWritten(Deployment):
    def session(self, stage: str, threads: int = 0) -> Session:
        return _AsWrittenSession(self.graphs[stage], self.device, threads)


class _AsWrittenSession(Session):
    """ONNX Runtime would fuse the graph to products whose activations have scales of their own."""

    def _load(self, path: Path, options: Any, providers: Any) -> Any:
        options.graph_optimization_level = onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
        return super()._load(path, options, providers)

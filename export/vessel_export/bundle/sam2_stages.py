"""Writes SAM2's stages of a bundle, with those of cines: traces its modules, writes weights and graphs. Does not know the checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vessel_export.bundle.reuse import older_file
from vessel_export.errors import BaseModelError
from vessel_export.graphs.assemble import DTYPES, Graph, save_graph
from vessel_export.graphs.costs import graph_cost
from vessel_export.graphs.quantize import MatrixType, quantize_graph, with_quantized
from vessel_export.graphs.sam2_image_encoder import trace_sam2_image_encoder, weights_of_fine_features
from vessel_export.graphs.sam2_mask_decoder import trace_sam2_mask_decoder, trace_sam2_tracking_decoder
from vessel_export.graphs.sam2_memory import trace_sam2_memory_attention, trace_sam2_memory_encoder, tracking_fault
from vessel_export.io.safetensors_writer import WrittenFile, file_size, write_safetensors
from vessel_export.sources.base_model import open_sam2
from vessel_rt.formats.bundle import CINE_STAGES, Bundle, CineSpec, StageSpec
from vessel_rt.formats.recipe import Recipe

__all__ = ["Written", "write_sam2_stages"]

# The first with a fused Attention, for which TensorRT has kernels, and which is faster on the CPU (docs/performance.md)
_ATTENTION_OPSET = 23
_FEWEST_QUERIES = 4096  # of a single head, for the fused Attention
# The mask decoders' heads can be too narrow for that kernel, and it would not be faster. TensorRT-RTX 1.7 has no BF16 transposed
# convolution, so the decoders of a BF16 bundle are FP32. They are small, and the inputs and outputs of a BF16 graph are FP32 anyway.
_DECODER_OPSET = 20
_DECODER_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.float32}

_PROMPTED_FRAMES = 5  # of a cine, which Sa2VA's predict_forward gives to the language model

# Why a stage or a matrix of a quantized bundle is not.
_SMALL = "it is small, and masks change the most with it"
_FINE = "fpn_0 or fpn_1 depend on it, and masks change the most with them"

Arrays = Mapping[str, npt.NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class Written:
    """The stages, those of cines, the files of their weights, and what is quantized, as in bundle.json's `quantization`."""

    stages: dict[str, StageSpec]
    cine: CineSpec
    files: dict[str, WrittenFile]
    matrices: dict[str, dict[str, int]]
    kept: dict[str, str]


def write_sam2_stages(
    folder: Path, sam2: Path, updates: Arrays, prompt_head: Arrays, recipe: Recipe, neighbours: Sequence[Bundle]
) -> Written:
    """Write SAM2's stages into the bundle at `folder`.

    `sam2` is SAM2's .pt, `updates` the tensors that training changed, `prompt_head` text_hidden_fcs: weight and bias of "0" and "2".

    The image encoder is quantized only in INT8 with FP32 activations, for CPUs, and without the matrices that fpn_0 and fpn_1 depend on.

    Raises:
        VesselError: SAM2 does not fit its configuration, or a value does not fit the recipe's precision.
    """
    precision = recipe.precision
    opened = open_sam2(str(sam2))
    model: Any = opened.build({name: torch.from_numpy(array) for name, array in updates.items()})
    hidden_size = prompt_head["0.weight"].shape[0]
    if fault := tracking_fault(model):
        raise BaseModelError(f"{sam2}: {fault}; cines are tracked only with SAM 2.0's own settings, check --sam2 and its .yaml")
    traced = [
        trace_sam2_image_encoder(model, opened.image_size, DTYPES[precision], opset=_ATTENTION_OPSET),
        trace_sam2_mask_decoder(model, _prompt_head(prompt_head), hidden_size, _DECODER_DTYPE[precision], opset=_DECODER_OPSET),
        trace_sam2_tracking_decoder(model, _DECODER_DTYPE[precision], opset=_DECODER_OPSET),
        trace_sam2_memory_encoder(model, _DECODER_DTYPE[precision], opset=_DECODER_OPSET),
        trace_sam2_memory_attention(model, DTYPES[precision], opset=_memory_attention_opset(model, precision)),
    ]
    stages: dict[str, StageSpec] = {}
    matrices: dict[str, dict[str, int]] = {}
    kept: dict[str, str] = {}
    files: dict[str, WrittenFile] = {}
    for graph, weights in traced:
        if graph.name == "sam2_image_encoder" and (precision, recipe.weights) == ("fp32", "int8"):
            kind = MatrixType.named("int8")
            fine = dict.fromkeys(weights_of_fine_features(graph), _FINE)
            matrices[graph.name], reasons = quantize_graph(graph, kind, recipe.keep, "MatMulIntegerToFloat", exempt=fine)
            weights = with_quantized(weights, matrices[graph.name], kind, "MatMulIntegerToFloat")
            kept |= reasons
        elif graph.name not in CINE_STAGES:
            kept[graph.name] = _SMALL
        file = f"weights/{graph.name}.safetensors"
        files[file] = write_safetensors(folder, file, weights, older=older_file(neighbours, file, file_size(weights)))
        stages[graph.name] = save_graph(graph, folder, {name: at for file in files.values() for name, at in file.locations.items()})
    cine = CineSpec(
        prompted_frames=_PROMPTED_FRAMES,
        memories=model.num_maskmem,
        pointers=model.max_obj_ptrs_in_encoder,
        stages={name: stages.pop(name) for name in CINE_STAGES},
        memory_flops=_memory_flops(traced[-1][0]),
    )
    return Written(stages, cine, files, matrices, kept)


def _memory_attention_opset(model: Any, precision: str) -> int:
    """TensorRT-RTX 1.7 has no kernel of one head for few queries: none for 1,024, as in the tiny model, but one for 4,096.

    FP32 is for CPUs, which have one.
    """
    fused = precision == "fp32" or model.sam_image_embedding_size**2 >= _FEWEST_QUERIES
    return _ATTENTION_OPSET if fused else _DECODER_OPSET


def _memory_flops(attention: Graph) -> int:
    """The operations for one more memory: those of each key are the same, whether it is of a memory or of an object pointer."""
    return graph_cost(attention.model.clone(), {"memories": 2, "pointers": 1}).flops - attention.flops


def _prompt_head(arrays: Arrays) -> torch.nn.Sequential:
    hidden, narrow = arrays["0.weight"].shape[0], arrays["2.weight"].shape[0]
    head = torch.nn.Sequential(torch.nn.Linear(hidden, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, narrow))
    head.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=True)
    return head.eval()

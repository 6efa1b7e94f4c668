"""Writes SAM2's two stages of a bundle: traces its modules and writes their weights and graphs. Does not know the checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from vessel_export.bundle.reuse import older_file
from vessel_export.graphs.assemble import DTYPES, save_graph
from vessel_export.graphs.quantize import MatrixType, quantize_graph, with_quantized
from vessel_export.graphs.sam2_image_encoder import trace_sam2_image_encoder, weights_of_fine_features
from vessel_export.graphs.sam2_mask_decoder import trace_sam2_mask_decoder
from vessel_export.io.safetensors_writer import WrittenFile, file_size, write_safetensors
from vessel_export.sources.base_model import open_sam2
from vessel_rt.formats.bundle import Bundle, StageSpec
from vessel_rt.formats.recipe import Recipe

__all__ = ["Written", "write_sam2_stages"]

_ENCODER_OPSET = (
    23  # the first with a fused Attention, for which TensorRT has kernels, and which is faster on the CPU (docs/performance.md)
)
# The mask decoder's heads can be too narrow for that kernel, and it would not be faster. TensorRT-RTX 1.7 has no BF16 transposed
# convolution, so the decoder of a BF16 bundle is FP32. It is small, and the inputs and outputs of a BF16 graph are FP32 anyway.
_DECODER_OPSET = 20
_DECODER_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.float32}

# Why a stage or a matrix of a quantized bundle is not.
_SMALL = "it is small, and masks change the most with it"
_FINE = "fpn_0 or fpn_1 depend on it, and masks change the most with them"

Arrays = Mapping[str, npt.NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class Written:
    """The stages, the files of their weights, and what is quantized, as in bundle.json's `quantization`."""

    stages: dict[str, StageSpec] = dataclasses.field(default_factory=dict)
    files: dict[str, WrittenFile] = dataclasses.field(default_factory=dict)
    matrices: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    kept: dict[str, str] = dataclasses.field(default_factory=dict)


def write_sam2_stages(
    folder: Path, sam2: Path, updates: Arrays, prompt_head: Arrays, recipe: Recipe, neighbours: Sequence[Bundle]
) -> Written:
    """Write both stages into the bundle at `folder`.

    `sam2` is SAM2's .pt, `updates` the tensors that training changed, `prompt_head` text_hidden_fcs: weight and bias of "0" and "2".

    The image encoder is quantized only in INT8 with FP32 activations, for CPUs, and without the matrices that fpn_0 and fpn_1 depend on.

    Raises:
        VesselError: SAM2 does not fit its configuration, or a value does not fit the recipe's precision.
    """
    precision = recipe.precision
    opened = open_sam2(str(sam2))
    model = opened.build({name: torch.from_numpy(array) for name, array in updates.items()})
    hidden_size = prompt_head["0.weight"].shape[0]
    traced = [
        trace_sam2_image_encoder(model, opened.image_size, DTYPES[precision], opset=_ENCODER_OPSET),
        trace_sam2_mask_decoder(model, _prompt_head(prompt_head), hidden_size, _DECODER_DTYPE[precision], opset=_DECODER_OPSET),
    ]
    written = Written()
    for graph, weights in traced:
        if graph.name == "sam2_image_encoder" and (precision, recipe.weights) == ("fp32", "int8"):
            kind = MatrixType.named("int8")
            fine = dict.fromkeys(weights_of_fine_features(graph), _FINE)
            blocks, kept = quantize_graph(graph, kind, recipe.keep, "MatMulIntegerToFloat", exempt=fine)
            weights = with_quantized(weights, blocks, kind, "MatMulIntegerToFloat")
            written.matrices[graph.name] = blocks
            written.kept.update(kept)
        else:
            written.kept[graph.name] = _SMALL
        file = f"weights/{graph.name}.safetensors"
        written.files[file] = write_safetensors(folder, file, weights, older=older_file(neighbours, file, file_size(weights)))
        written.stages[graph.name] = save_graph(graph, folder, written.files[file].locations)
    return written


def _prompt_head(arrays: Arrays) -> torch.nn.Sequential:
    hidden, narrow = arrays["0.weight"].shape[0], arrays["2.weight"].shape[0]
    head = torch.nn.Sequential(torch.nn.Linear(hidden, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, narrow))
    head.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=True)
    return head.eval()

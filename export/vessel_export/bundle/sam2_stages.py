"""Writes SAM2's two stages of a bundle: traces its modules and writes their weights and graphs. Does not know the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from vessel_export.bundle.reuse import older_file
from vessel_export.graphs.assemble import DTYPES, save_graph
from vessel_export.graphs.sam2_image_encoder import trace_sam2_image_encoder
from vessel_export.graphs.sam2_mask_decoder import trace_sam2_mask_decoder
from vessel_export.io.safetensors_writer import WrittenFile, file_size, write_safetensors
from vessel_export.sources.base_model import open_sam2
from vessel_rt.formats.bundle import Bundle, StageSpec

__all__ = ["Written", "write_sam2_stages"]

_ENCODER_OPSET = (
    23  # the first with a fused Attention, for which TensorRT has kernels, and which is faster on the CPU (docs/performance.md)
)
# The mask decoder's heads can be too narrow for that kernel, and it would not be faster. TensorRT-RTX 1.7 has no BF16 transposed
# convolution, so the decoder of a BF16 bundle is FP32. It is small, and the inputs and outputs of a BF16 graph are FP32 anyway.
_DECODER_OPSET = 20
_DECODER_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.float32}

Written = tuple[dict[str, StageSpec], dict[str, WrittenFile]]  # stages and weights' files by name
Arrays = Mapping[str, npt.NDArray[np.float32]]


def write_sam2_stages(
    folder: Path, sam2: Path, updates: Arrays, prompt_head: Arrays, precision: str, neighbours: Sequence[Bundle]
) -> Written:
    """Write both stages into the bundle at `folder`.

    `sam2` is SAM2's .pt, `updates` the tensors that training changed, `prompt_head` text_hidden_fcs: weight and bias of "0" and "2".

    Raises:
        VesselError: SAM2 does not fit its configuration, or a value does not fit `precision`.
    """
    opened = open_sam2(str(sam2))
    model = opened.build({name: torch.from_numpy(array) for name, array in updates.items()})
    hidden_size = prompt_head["0.weight"].shape[0]
    traced = [
        trace_sam2_image_encoder(model, opened.image_size, DTYPES[precision], opset=_ENCODER_OPSET),
        trace_sam2_mask_decoder(model, _prompt_head(prompt_head), hidden_size, _DECODER_DTYPE[precision], opset=_DECODER_OPSET),
    ]
    stages, written = {}, {}
    for graph, weights in traced:
        file = f"weights/{graph.name}.safetensors"
        written[file] = write_safetensors(folder, file, weights, older=older_file(neighbours, file, file_size(weights)))
        stages[graph.name] = save_graph(graph, folder, written[file].locations)
    return stages, written


def _prompt_head(arrays: Arrays) -> torch.nn.Sequential:
    hidden, narrow = arrays["0.weight"].shape[0], arrays["2.weight"].shape[0]
    head = torch.nn.Sequential(torch.nn.Linear(hidden, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, narrow))
    head.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=True)
    return head.eval()

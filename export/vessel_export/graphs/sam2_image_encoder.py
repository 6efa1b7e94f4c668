"""sam2_image_encoder: Hiera and its feature pyramid, traced from sam2's own modules. It holds only weights that training freezes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from vessel_export.graphs.activations import sam2_encoder_bytes
from vessel_export.graphs.assemble import Graph
from vessel_export.graphs.torch_export import trace
from vessel_export.io.safetensors_writer import OutputTensor

__all__ = ["Sam2ImageEncoder", "trace_sam2_image_encoder", "weights_of_fine_features"]


class Sam2ImageEncoder(torch.nn.Module):
    """`pixel_values` [images, 3, S, S] -> fpn_0, fpn_1 (strides 4 and 8) and image_features (stride 16, `no_mem_embed` added).

    sam2's `forward_image` also applies `conv_s0` and `conv_s1`. They belong to the trained mask decoder, so that graph runs them.
    """

    def __init__(self, sam2_model: Any) -> None:
        super().__init__()
        self.image_encoder = sam2_model.image_encoder
        self.no_mem_embed = sam2_model.no_mem_embed

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        fpn = self.image_encoder(pixel_values)["backbone_fpn"]
        features = fpn[2].to(pixel_values.dtype)  # the pyramid's top-down addition is FP32 in sam2, whatever the weights
        return fpn[0], fpn[1], features + self.no_mem_embed.reshape(1, -1, 1, 1)


def trace_sam2_image_encoder(sam2_model: Any, image_size: int, dtype: torch.dtype, *, opset: int) -> tuple[Graph, list[OutputTensor]]:
    """The stage's graph and weights in `dtype`; the number of images is dynamic."""
    module = Sam2ImageEncoder(sam2_model).to(dtype)
    pixel_values = torch.zeros(2, 3, image_size, image_size, dtype=dtype)
    names = ("fpn_0", "fpn_1", "image_features")
    trunk_channels = len(sam2_model.image_encoder.trunk.patch_embed.proj.weight)
    size = sam2_encoder_bytes(image_size, trunk_channels, sam2_model.sam_prompt_embed_dim, dtype.itemsize)
    dynamic = {"pixel_values": "images"}
    return trace("sam2_image_encoder", module, {"pixel_values": pixel_values}, names, dynamic, opset=opset, activation_bytes=size)


def weights_of_fine_features(graph: Graph) -> set[str]:
    """The names of the weights on which fpn_0 and fpn_1 depend: those of Hiera's first two stages and of their convolutions."""
    pending = [value for value in graph.model.graph.outputs if value.name in ("fpn_0", "fpn_1")]
    seen: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        producer = value.producer()
        if value not in seen and producer:
            pending += [operand for operand in producer.inputs if operand]
        seen.add(value)
    return {str(value.name) for value in seen if value.is_initializer()}

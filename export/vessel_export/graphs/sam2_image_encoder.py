"""sam2_image_encoder: Hiera and its feature pyramid, traced from sam2's own modules. It holds only weights that training freezes."""

from __future__ import annotations

from collections.abc import Mapping
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
        for block in self.image_encoder.trunk.blocks:
            if block.pool is not None:
                block.pool = block.attn.q_pool = _MaxOfFour(block.pool)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        fpn = self.image_encoder(pixel_values)["backbone_fpn"]
        features = fpn[2].to(pixel_values.dtype)  # the pyramid's top-down addition is FP32 in sam2, whatever the weights
        return fpn[0], fpn[1], features + self.no_mem_embed.reshape(1, -1, 1, 1)


class _MaxOfFour(torch.nn.Module):
    """Hiera's pooling of 2 x 2 values of x [N, C, H, W], as maxima of slices.

    ONNX Runtime has no CUDA kernel for MaxPool since opset 22 (docs/engines.md), and Attention needs opset 23.
    """

    def __init__(self, pool: torch.nn.MaxPool2d) -> None:
        super().__init__()
        if not tuple(pool.kernel_size) == tuple(pool.stride) == (2, 2):  # type: ignore[arg-type]
            raise ValueError(f"Hiera pools with {pool}, not by 2 x 2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.maximum(x[:, :, 0::2], x[:, :, 1::2])
        return torch.maximum(rows[..., 0::2], rows[..., 1::2])


def trace_sam2_image_encoder(sam2_model: Any, image_size: int, dtype: torch.dtype, *, opset: int) -> tuple[Graph, list[OutputTensor]]:
    """The stage's graph and weights in `dtype`; the number of images is dynamic."""
    trunk = sam2_model.image_encoder.trunk
    positions = {name: parameter.detach().float() for name, parameter in trunk.named_parameters(recurse=False)}  # pos_embed*
    module = Sam2ImageEncoder(sam2_model).to(dtype)
    _interpolate_in_fp32(trunk, positions, dtype)
    pixel_values = torch.zeros(2, 3, image_size, image_size, dtype=dtype)
    names = ("fpn_0", "fpn_1", "image_features")
    trunk_channels = len(trunk.patch_embed.proj.weight)
    size = sam2_encoder_bytes(image_size, trunk_channels, sam2_model.sam_prompt_embed_dim, dtype.itemsize)
    dynamic = {"pixel_values": "images"}
    return trace("sam2_image_encoder", module, {"pixel_values": pixel_values}, names, dynamic, opset=opset, activation_bytes=size)


def _interpolate_in_fp32(trunk: Any, positions: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Give Hiera its positions in FP32, and convert them to `dtype` after they are interpolated: Resize has no BF16 kernel.

    They do not depend on the image, so runtimes compute them once, while they load the graph.
    """
    for name, values in positions.items():
        getattr(trunk, name).data = values
    interpolated = trunk._get_pos_embed
    trunk._get_pos_embed = lambda size: interpolated(size).to(dtype)


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

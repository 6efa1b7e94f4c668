"""sam2_mask_decoder: [SEG] state and image features -> low-res logits of a mask, by text_hidden_fcs and SAM2's mask decoder."""

from __future__ import annotations

from typing import Any

import torch

from vessel_export.graphs.activations import mask_decoder_bytes
from vessel_export.graphs.assemble import Graph
from vessel_export.graphs.torch_export import trace
from vessel_export.io.safetensors_writer import OutputTensor

__all__ = ["Sam2MaskDecoder", "trace_sam2_mask_decoder"]


class Sam2MaskDecoder(torch.nn.Module):
    """SAM2's decoder as Sa2VA prompts it: no points, the projected [SEG] state as one more sparse token, best of three masks.

    The prompt encoder's output without points (two `not_a_point` tokens), its dense `no_mask_embed` and its position encoding do not depend
    on the input and are constants. The object score is returned but not applied: Sa2VA does not gate masks by it.
    """

    mask_decoder: Any
    no_points: torch.Tensor  # [1, 2, C]
    no_mask: torch.Tensor  # [1, C, 1, 1]
    position: torch.Tensor  # [1, C, H, W]

    def __init__(self, sam2_model: Any, prompt_head: torch.nn.Sequential) -> None:
        super().__init__()
        prompt_encoder = sam2_model.sam_prompt_encoder
        no_point = torch.zeros(1, 1, 2), -torch.ones(1, 1, dtype=torch.int32)
        with torch.no_grad():
            sparse, dense = prompt_encoder(points=no_point, boxes=None, masks=None)
            position = prompt_encoder.get_dense_pe()
        self.mask_decoder = sam2_model.sam_mask_decoder
        self.text_hidden_fcs = prompt_head
        self.register_buffer("no_points", sparse)
        self.register_buffer("no_mask", dense[:, :, :1, :1].contiguous())
        self.register_buffer("position", position)

    def forward(
        self, fpn_0: torch.Tensor, fpn_1: torch.Tensor, image_features: torch.Tensor, seg_states: torch.Tensor, image_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """fpn_0 [images, C, 4H, 4W], fpn_1 [images, C, 2H, 2W], image_features [images, C, H, W], seg_states [masks, hidden],
        image_index int64 [masks] -> low_res_logits [masks, 4H, 4W], iou [masks], object_score [masks], all float32."""
        masks = seg_states.shape[0]
        prompt = self.text_hidden_fcs(seg_states)[:, None]
        features = image_features[image_index]
        logits, iou, _, object_score = self.mask_decoder(
            image_embeddings=features,
            image_pe=self.position,
            sparse_prompt_embeddings=torch.cat([self.no_points.expand(masks, -1, -1), prompt], dim=1),
            dense_prompt_embeddings=self.no_mask.expand_as(features),
            multimask_output=True,
            repeat_image=False,
            high_res_features=[self.mask_decoder.conv_s0(fpn_0)[image_index], self.mask_decoder.conv_s1(fpn_1)[image_index]],
        )
        best = iou.argmax(dim=-1, keepdim=True)  # [masks, 1]
        chosen = logits.gather(1, best[:, :, None, None].expand(-1, -1, *logits.shape[2:]))[:, 0]
        return chosen.float(), iou.gather(1, best)[:, 0].float(), object_score[:, 0].float()


def trace_sam2_mask_decoder(
    sam2_model: Any, prompt_head: torch.nn.Sequential, hidden_size: int, dtype: torch.dtype, *, opset: int
) -> tuple[Graph, list[OutputTensor]]:
    """The stage's graph and weights in `dtype`; the numbers of images and of masks are dynamic."""
    module = Sam2MaskDecoder(sam2_model, prompt_head).to(dtype)
    channels, side = sam2_model.sam_prompt_embed_dim, sam2_model.sam_image_embedding_size
    inputs = {
        "fpn_0": torch.zeros(2, channels, 4 * side, 4 * side, dtype=dtype),
        "fpn_1": torch.zeros(2, channels, 2 * side, 2 * side, dtype=dtype),
        "image_features": torch.zeros(2, channels, side, side, dtype=dtype),
        "seg_states": torch.zeros(3, hidden_size, dtype=dtype),
        "image_index": torch.zeros(3, dtype=torch.int64),
    }
    dynamic = dict.fromkeys(("fpn_0", "fpn_1", "image_features"), "images") | dict.fromkeys(("seg_states", "image_index"), "masks")
    outputs, size = ("low_res_logits", "iou", "object_score"), mask_decoder_bytes(side, channels, dtype.itemsize)
    return trace("sam2_mask_decoder", module, inputs, outputs, dynamic, opset=opset, activation_bytes=size)

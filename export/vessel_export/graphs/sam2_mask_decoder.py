"""The graphs of SAM2's mask decoder: image features and, except on tracked frames, a [SEG] state -> low-res logits of a mask."""

from __future__ import annotations

from typing import Any

import torch

from vessel_export.graphs.activations import mask_decoder_bytes
from vessel_export.graphs.assemble import Graph
from vessel_export.graphs.torch_export import trace
from vessel_export.io.safetensors_writer import OutputTensor

__all__ = ["Sam2MaskDecoder", "Sam2TrackingDecoder", "trace_sam2_mask_decoder", "trace_sam2_tracking_decoder"]

_OUTPUTS = ("low_res_logits", "iou", "object_score", "object_pointer")

_Prediction = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class _Decoder(torch.nn.Module):
    """SAM2's decoder without points: the best of three masks by predicted IoU, and its object pointer.

    The prompt encoder's output without points (two `not_a_point` tokens), its dense `no_mask_embed` and its position encoding do not depend
    on the input and are constants. Masks are not gated by the object score, as in Sa2VA; the pointer is (SAM2Base._forward_sam_heads).
    """

    mask_decoder: Any
    no_points: torch.Tensor  # [1, 2, C]
    no_mask: torch.Tensor  # [1, C, 1, 1]
    position: torch.Tensor  # [1, C, H, W]

    def __init__(self, sam2_model: Any) -> None:
        super().__init__()
        prompt_encoder = sam2_model.sam_prompt_encoder
        no_point = torch.zeros(1, 1, 2), -torch.ones(1, 1, dtype=torch.int32)
        with torch.no_grad():
            sparse, dense = prompt_encoder(points=no_point, boxes=None, masks=None)
            position = prompt_encoder.get_dense_pe()
        self.mask_decoder = sam2_model.sam_mask_decoder
        self.object_pointer = sam2_model.obj_ptr_proj
        self.no_object = sam2_model.no_obj_ptr
        self.register_buffer("no_points", sparse)
        self.register_buffer("no_mask", dense[:, :, :1, :1].contiguous())
        self.register_buffer("position", position)

    def predict(self, features: torch.Tensor, fine: list[torch.Tensor], prompts: torch.Tensor) -> _Prediction:
        """features [masks, C, H, W], fine: of conv_s0 and conv_s1, prompts [masks, tokens, C] -> low_res_logits [masks, 4H, 4W],
        iou [masks], object_score [masks], object_pointer [masks, C], all float32."""
        logits, iou, tokens, object_score = self.mask_decoder(
            image_embeddings=features,
            image_pe=self.position,
            sparse_prompt_embeddings=prompts,
            dense_prompt_embeddings=self.no_mask.expand_as(features),
            multimask_output=True,
            repeat_image=False,
            high_res_features=fine,
        )
        best = iou.argmax(dim=-1, keepdim=True)  # [masks, 1]
        chosen = logits.gather(1, best[:, :, None, None].expand(-1, -1, *logits.shape[2:]))[:, 0]
        token = tokens.gather(1, best[:, :, None].expand(-1, -1, tokens.shape[2]))[:, 0]
        pointer = torch.where(object_score > 0, self.object_pointer(token), self.no_object)
        return chosen.float(), iou.gather(1, best)[:, 0].float(), object_score[:, 0].float(), pointer.float()


class Sam2MaskDecoder(_Decoder):
    """The decoder as Sa2VA prompts it: with the projected [SEG] state as one more sparse token."""

    def __init__(self, sam2_model: Any, prompt_head: torch.nn.Sequential) -> None:
        super().__init__(sam2_model)
        self.text_hidden_fcs = prompt_head

    def forward(
        self, fpn_0: torch.Tensor, fpn_1: torch.Tensor, image_features: torch.Tensor, seg_states: torch.Tensor, image_index: torch.Tensor
    ) -> _Prediction:
        """fpn_0 [images, C, 4H, 4W], fpn_1 [images, C, 2H, 2W], image_features [images, C, H, W], seg_states [masks, hidden],
        image_index int64 [masks] -> as `predict`."""
        prompt = self.text_hidden_fcs(seg_states)[:, None]
        fine = [self.mask_decoder.conv_s0(fpn_0)[image_index], self.mask_decoder.conv_s1(fpn_1)[image_index]]
        prompts = torch.cat([self.no_points.expand(seg_states.shape[0], -1, -1), prompt], dim=1)
        return self.predict(image_features[image_index], fine, prompts)


class Sam2TrackingDecoder(_Decoder):
    """The decoder on a tracked frame of a cine, which has no prompt: its features are conditioned on memories instead.

    SAM 2.0 predicts three masks there, too (`multimask_output_for_tracking`, `multimask_min_pt_num` 0).
    """

    def forward(self, fpn_0: torch.Tensor, fpn_1: torch.Tensor, conditioned_features: torch.Tensor) -> _Prediction:
        """fpn_0 [1, C, 4H, 4W], fpn_1 [1, C, 2H, 2W], conditioned_features [1, C, H, W] -> as `predict`, with one mask."""
        fine = [self.mask_decoder.conv_s0(fpn_0), self.mask_decoder.conv_s1(fpn_1)]
        return self.predict(conditioned_features, fine, self.no_points)


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
    size = mask_decoder_bytes(side, channels, dtype.itemsize)
    return trace("sam2_mask_decoder", module, inputs, _OUTPUTS, dynamic, opset=opset, activation_bytes=size)


def trace_sam2_tracking_decoder(sam2_model: Any, dtype: torch.dtype, *, opset: int) -> tuple[Graph, list[OutputTensor]]:
    """The stage's graph and weights in `dtype`. Its parameters are sam2_mask_decoder's: only other weights are returned."""
    module = Sam2TrackingDecoder(sam2_model).to(dtype)
    channels, side = sam2_model.sam_prompt_embed_dim, sam2_model.sam_image_embedding_size
    inputs = {
        "fpn_0": torch.zeros(1, channels, 4 * side, 4 * side, dtype=dtype),
        "fpn_1": torch.zeros(1, channels, 2 * side, 2 * side, dtype=dtype),
        "conditioned_features": torch.zeros(1, channels, side, side, dtype=dtype),
    }
    size = mask_decoder_bytes(side, channels, dtype.itemsize)
    return trace("sam2_tracking_decoder", module, inputs, _OUTPUTS, {}, opset=opset, activation_bytes=size, weights_of="sam2_mask_decoder")

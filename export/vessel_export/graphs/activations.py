"""Estimates of the memory that a stage's activations take, for `vessel-rt plan`. Does not know graphs.

An estimate is the largest sum of tensors that are alive at the same time, with `b` bytes for a value of the graph's type F, for one unit
of the stage's work: a tile, a token of the cache, an image, a mask. Attention is counted as fused: its scores are never written.

TensorRT-RTX 1.7.1 reports "Total Activation Memory", which leaves out inputs and outputs, when it compiles InternVL3-8B's FP16 graphs for
sm86. For one image and the stages in their order it is 273, 618, 281 and 88 MB; the estimates are 370, 680, 371 and 143 MB.
"""

from __future__ import annotations

from vessel_export.sources.base_config import LanguageConfig, VisionConfig

__all__ = [
    "language_model_bytes",
    "mask_decoder_bytes",
    "memory_attention_bytes",
    "memory_encoder_bytes",
    "sam2_encoder_bytes",
    "vision_encoder_bytes",
]

_FP32 = 4  # bytes


def vision_encoder_bytes(config: VisionConfig, b: int) -> int:
    """For a tile: at each position, in the MLP, two FP32 residuals, the normed input, GELU's input and output. And the pixels."""
    positions = 1 + (config.image_size // config.patch_size) ** 2
    mlp = 2 * _FP32 * config.hidden_size + b * (config.hidden_size + 2 * config.intermediate_size)
    return positions * mlp + b * 3 * config.image_size**2


def language_model_bytes(config: LanguageConfig, b: int) -> int:
    """For a token: in the MLP, two FP32 residuals, the normed input, gate, up and their product. And `inputs_embeds`.

    The mask and the logits, which depend on the cache's length and on the positions that are returned, are not included.
    """
    return 2 * _FP32 * config.hidden_size + b * (config.hidden_size + 3 * config.intermediate_size) + b * config.hidden_size


def sam2_encoder_bytes(side: int, trunk_channels: int, channels: int, b: int) -> int:
    """For an image of `side` pixels: 17 maps of the trunk's first stage, its largest, at stride 4. And the pixels and the outputs.

    The maps are the residual, the normed input, Q, K and V of padded windows, and twice the MLP's four-fold width. The outputs, at strides
    4, 8 and 16, stay until the masks are made.
    """
    outputs = channels * sum((side // stride) ** 2 for stride in (4, 8, 16))
    return b * (17 * trunk_channels * (side // 4) ** 2 + 3 * side**2 + outputs)


def mask_decoder_bytes(side: int, channels: int, b: int) -> int:
    """For a mask: 17 maps of the image features' size, `side` x `side`.

    The transformer's keys, values and sums are 8 of them. Upscaling takes 3 and 6: at two and four times the side, with a fourth and an
    eighth of the channels.
    """
    return b * 17 * channels * side**2


def memory_encoder_bytes(side: int, channels: int) -> int:
    """For a frame, in FP32: the mask at 16 times the features' `side`, four times over, and 11 maps of `channels`.

    The mask is resized, its sigmoid scaled, and convolved to 4 channels at half the side. The widest maps are those of a CXBlock: the
    residual, the normed input, and GELU's input and output of four times the width.
    """
    return _FP32 * (4 * (16 * side) ** 2 + 11 * channels * side**2)


def memory_attention_bytes(side: int, channels: int, memory_channels: int, b: int) -> int:
    """For a memory: at each of `side` x `side` positions, keys and values before and after projection, and rotated keys in FP32.

    The frame's attention to itself takes as much as one more memory.
    """
    return side**2 * (b * (2 * memory_channels + 3 * channels) + 2 * _FP32 * channels)

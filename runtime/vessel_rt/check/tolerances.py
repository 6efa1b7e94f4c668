"""How far a bundle's outputs may lie from the goldens. The reasons and the measurements are in docs/numerics.md."""

from __future__ import annotations

import dataclasses

from vessel_rt.formats.bundle import Bundle

__all__ = ["SOURCES", "Tolerances", "error_limit", "tolerances_of"]

SOURCES = {
    "language_model": ("vision_encoder",),
    "sam2_mask_decoder": ("language_model", "sam2_image_encoder"),
    "sam2_memory_encoder": ("sam2_image_encoder", "sam2_mask_decoder"),
    "sam2_memory_attention": ("sam2_image_encoder", "sam2_memory_encoder"),
    "sam2_tracking_decoder": ("sam2_image_encoder", "sam2_memory_attention"),
}
"""The stages that a stage takes its inputs from."""


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """Limits for one type of weights.

    `error`: the most of |output - reference| / |reference| (L2 norms) of an output, when every stage gets the output of the one before it.
    `iou`: the least IoU of a low-res mask over its decided pixels: those whose golden logit is farther from zero than `undecided` times the
    mask's largest. `mean_iou`: the least mean over all masks.
    """

    error: float
    iou: float
    mean_iou: float
    undecided: float = 0.0


_FLOATS = {
    "fp32": Tolerances(error=1e-4, iou=1.0, mean_iou=1.0, undecided=1e-3),
    "fp16": Tolerances(error=6e-3, iou=0.98, mean_iou=0.995),
    "bf16": Tolerances(error=4e-2, iou=0.95, mean_iou=0.98),
}
_INTEGERS = {
    "int8": Tolerances(error=5e-2, iou=0.9, mean_iou=0.99),
    "int4": Tolerances(error=3e-1, iou=0.85, mean_iou=0.97),
}


def tolerances_of(bundle: Bundle) -> Tolerances:
    """The limits of a bundle's masks: those of the type of its weights."""
    return _INTEGERS[bundle.weights] if bundle.quantization else _FLOATS[bundle.precision]


def error_limit(bundle: Bundle, stage: str) -> float:
    """The most error of the outputs of a stage. One that is not quantized, and takes nothing from one that is, has the precision's."""
    return (_INTEGERS[bundle.weights] if _quantized(bundle, stage) else _FLOATS[bundle.precision]).error


def _quantized(bundle: Bundle, stage: str) -> bool:
    """Whether a stage, or one that it takes its inputs from, has matrices of integers."""
    matrices = bundle.quantization.matrices if bundle.quantization else {}
    return stage in matrices or any(_quantized(bundle, source) for source in SOURCES.get(stage, ()))

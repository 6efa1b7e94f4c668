"""How far a bundle's outputs may lie from the goldens. The reasons and the measurements are in docs/numerics.md."""

from __future__ import annotations

import dataclasses

from vessel_rt.formats.bundle import Bundle

__all__ = ["Tolerances", "tolerances_of"]


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """Limits for one type of weights.

    `error`: the most of |output - reference| / |reference| of each output, by stage, when every stage gets the output of the one before it.
    `iou`: the least IoU of a low-res mask over its decided pixels: those whose golden logit is farther from zero than `undecided` times the
    mask's largest. `mean_iou`: the least mean over all masks.
    """

    error: dict[str, float]
    iou: float
    mean_iou: float
    undecided: float = 0.0


_STAGES = ("vision_encoder", "language_model", "sam2_image_encoder", "sam2_mask_decoder")

_TOLERANCES = {
    "fp32": Tolerances(dict.fromkeys(_STAGES, 1e-4), iou=1.0, mean_iou=1.0, undecided=1e-3),
    "fp16": Tolerances(dict.fromkeys(_STAGES, 2e-2), iou=0.98, mean_iou=0.99),
    "bf16": Tolerances(dict.fromkeys(_STAGES, 1e-1), iou=0.9, mean_iou=0.95),
    "int8": Tolerances(dict.fromkeys(_STAGES, 5e-2), iou=0.9, mean_iou=0.98),
    "int4": Tolerances(dict.fromkeys(_STAGES, 3e-1), iou=0.8, mean_iou=0.95),
}


def tolerances_of(bundle: Bundle) -> Tolerances:
    """The tolerances of a bundle: of the type of its weights."""
    return _TOLERANCES[bundle.weights]

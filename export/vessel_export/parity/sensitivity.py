"""Which matrices of a quantized bundle move the masks: the reference with one of them as the bundle stores it, one after the other.

Activations keep the reference's type, so this is what the weights alone do. Does not know how the exporter quantizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from vessel_export.parity.inputs import Sample
from vessel_export.parity.stage_masks import masks_with
from vessel_export.parity.stored_matrices import Matrix, stored_matrices
from vessel_rt.evaluation.metrics import iou
from vessel_rt.formats.bundle import Bundle

if TYPE_CHECKING:
    from vessel_export.parity.reference import Reference, ReferenceResult

__all__ = ["MatrixEffect", "Sensitivity", "measure_sensitivity"]

_SHOWN = 12
_HEAD = "lm_head.weight"  # gives tokens only, and the answer stays the same here


@dataclasses.dataclass(frozen=True)
class MatrixEffect:
    """A matrix, and the mean IoU with the reference's masks if it alone is quantized."""

    stage: str
    name: str
    mean_iou: float


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The effects of all matrices, the largest first."""

    effects: tuple[MatrixEffect, ...]

    def to_keep(self, mean_iou: float) -> list[str]:
        """The fewest matrices without which the sum of all losses leaves a mean IoU of at least `mean_iou`. Losses add up only roughly."""
        losses = [1 - effect.mean_iou for effect in self.effects]
        count = next((n for n in range(len(losses)) if sum(losses[n:]) <= 1 - mean_iou), len(losses))
        return [effect.name for effect in self.effects[:count]]

    def table(self, mean_iou: float) -> str:
        """The matrices that move the masks most, and what to add to a recipe."""
        lines = [f"{effect.mean_iou:.6f}  {effect.stage}  {effect.name}" for effect in self.effects[:_SHOWN]]
        names = ", ".join(f'"{name}"' for name in self.to_keep(mean_iou))
        return "\n".join(["mean mask IoU with one matrix quantized, the lowest first:", *lines, f"for the recipe: keep = [{names}]"])


def measure_sensitivity(bundle: Bundle, reference: Reference, samples: Sequence[Sample], questions: Sequence[str]) -> Sensitivity:
    """Measure every quantized matrix but the head. Each takes one run of its stage and what follows, for every sample and question.

    Raises:
        BundleError: the graphs are not quantized as the bundle says.
    """
    limit = bundle.language_model.max_new_tokens
    results = [reference.segment(sample.reference, question, max_new_tokens=limit) for sample in samples for question in questions]
    matrices = [(stage, matrix) for stage in bundle.stages for matrix in stored_matrices(bundle, stage) if matrix.name != _HEAD]
    effects = []
    for stage, matrix in tqdm(matrices, desc="matrices", disable=None, leave=False):
        with _in_place(reference, bundle, matrix):
            overlaps = [overlap for result in results for overlap in _overlaps(reference, result, stage)]
        effects.append(MatrixEffect(stage, matrix.name, float(np.mean(overlaps)) if overlaps else 1.0))
    return Sensitivity(tuple(sorted(effects, key=lambda effect: effect.mean_iou)))


def _overlaps(reference: Reference, result: ReferenceResult, stage: str) -> Iterator[float]:
    if stage == "sam2_image_encoder":
        features = dataclasses.asdict(reference.encode_sam2(result.sam2_pixel_values))
        masks = masks_with(reference, result, stage, {name: values.cpu().numpy() for name, values in features.items()})
    else:
        embeds = reference.encode_tiles(result.pixel_values) if stage == "vision_encoder" else result.image_embeds
        masks = masks_with(reference, result, "vision_encoder", {"image_embeds": embeds.cpu().numpy()})
    for ours, theirs in zip(masks, result.masks.cpu().numpy(), strict=False):
        yield iou(ours, theirs)


@contextlib.contextmanager
def _in_place(reference: Reference, bundle: Bundle, matrix: Matrix) -> Iterator[None]:
    """The reference multiplies by the stored matrix instead of its own."""
    weight, start = matrix.values(bundle.folder).mT.to(reference.device), 0  # [out, in]
    hooks = []
    for module in matrix.modules(reference):
        own = weight[start : start + module.out_features]
        start += module.out_features
        hooks.append(module.register_forward_hook(_product(own, getattr(module, "base_layer", module).bias)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _product(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(inputs[0], weight, bias)

    return hook

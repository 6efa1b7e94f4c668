"""The reference with its own outputs gives its own masks; with another stage's it gives others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.paths import Tiny
from vessel_export.parity.reference import Reference, ReferenceResult
from vessel_export.parity.stage_masks import masks_with

QUESTION = "Please segment vessel and catheter in this image."


@pytest.fixture(scope="module")
def reference(tiny: Tiny) -> Reference:
    return Reference.load(tiny.checkpoint, tiny.base, tiny.sam2)


@pytest.fixture(scope="module")
def result(tiny: Tiny, reference: Reference) -> ReferenceResult:
    return reference.segment(Image.open(min(tiny.frames.glob("*.jpg"))), QUESTION)


def outputs(result: ReferenceResult, stage: str) -> dict[str, Any]:
    """The reference's own, as a bundle's graph returns them."""
    return {
        "vision_encoder": {"image_embeds": result.image_embeds},
        "language_model": {"hidden_states": result.hidden_states[None]},
        "sam2_image_encoder": {name: getattr(result.sam2_features, name) for name in ("fpn_0", "fpn_1", "image_features")},
        "sam2_mask_decoder": {"low_res_logits": result.prediction.low_res_logits},
    }[stage]


@pytest.mark.parametrize("stage", ["vision_encoder", "language_model", "sam2_image_encoder", "sam2_mask_decoder"])
def test_a_stage_of_its_own_and_a_changed_one(reference: Reference, result: ReferenceResult, stage: str) -> None:
    own = {name: tensor.numpy() for name, tensor in outputs(result, stage).items()}
    expected = result.masks.numpy()
    assert len(expected) == 2
    same = masks_with(reference, result, stage, own)
    assert same.shape == expected.shape
    assert (same != expected).sum() <= 2, "one pass instead of many steps may change the last bit of a logit"
    noise = np.random.default_rng(0)
    changed = {name: array + noise.normal(0, 10 * array.std(), array.shape) for name, array in own.items()}
    if stage == "vision_encoder":  # the small model's prompts do not depend on the image: nothing but NaN shows in the masks
        changed = {name: np.full_like(array, np.nan) for name, array in own.items()}
    assert (masks_with(reference, result, stage, changed) != expected).sum() > 100

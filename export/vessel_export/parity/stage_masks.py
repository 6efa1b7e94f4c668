"""Masks of the reference with the outputs of one stage of the bundle in place of its own: how far that stage alone moves the masks.

Does not know the bundle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vessel_export.parity.inputs import Array

if TYPE_CHECKING:
    import torch

    from vessel_export.parity.reference import Reference, ReferenceResult

__all__ = ["consumed", "masks_with"]


def masks_with(reference: Reference, result: ReferenceResult, stage: str, outputs: Mapping[str, Array]) -> npt.NDArray[np.bool_]:
    """The masks of `result` [masks, height, width] with `outputs` of `stage` instead of the reference's own. The answer stays the same.

    A [SEG] at the very end of an answer has no mask here: no state of one pass over prompt and answer consumes it.
    """
    import torch

    ours = {name: torch.from_numpy(np.asarray(array, np.float32)).to(reference.device) for name, array in outputs.items()}
    # Row k + 1 of the last len(answer) states consumed token k of the answer.
    seg = result.answer_ids[:-1] == reference.tokenizer.convert_tokens_to_ids("[SEG]")
    states, features = result.hidden_states[1:][seg], result.sam2_features
    with torch.inference_mode():
        if stage == "vision_encoder":
            hidden_states, _ = reference.run_language_model(consumed(reference, result, ours["image_embeds"]))
            states = hidden_states[0, -len(result.answer_ids) :][1:][seg]
        elif stage == "language_model":
            states = ours["hidden_states"][0, 1:][seg]
        elif stage == "sam2_image_encoder":
            features = dataclasses.replace(features, **{field.name: ours[field.name] for field in dataclasses.fields(features)})
        logits = ours["low_res_logits"] if stage == "sam2_mask_decoder" else reference.decode_masks(features, states).low_res_logits
        height, width = result.mask_logits.shape[1:]
        masks: npt.NDArray[np.bool_] = (reference.upsample(logits, height=height, width=width).sigmoid() > 0.5).cpu().numpy()
    return masks


def consumed(reference: Reference, result: ReferenceResult, image_embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings [1, tokens, hidden] of prompt and answer, without the answer's last token, which the model does not consume."""
    import torch

    with torch.inference_mode():
        prompt = reference.embed(result.prompt_ids, image_embeds)
        answer = reference.embed(result.answer_ids[:-1], image_embeds[:0])
        return torch.cat([prompt, answer], dim=1)

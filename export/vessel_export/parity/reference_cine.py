"""The reference of cines: Sa2VA's video path in PyTorch, on sam2's own classes.

The language model sees the first frames, one tile each. SAM2Base._track_step runs every frame: those first frames as initial conditioning
frames, each with the [SEG] state's projection as one more sparse token, and the others with memories. The steps are those of Sa2VA's
`predict_forward` and of its SAM2VideoPredictor (projects/sa2va/hf/models/modeling_sa2va_chat.py and sam2.py). Two differences between
Sa2VA's copy of sam2 and sam2 itself are applied here: the sparse token, and that masks are not gated by the object score. Memories are not
rounded to BF16, as Sa2VA's predictor does whatever the model's type. Shares nothing with the runtime.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vessel_export.parity.reference import MAX_NEW_TOKENS, Reference
from vessel_export.parity.reference_pixels import to_pixel_values

__all__ = ["CineResult", "segment_cine", "track"]

PROMPTED_FRAMES = 5  # of `predict_forward`: `if frame_idx < 5`
CINE_PROMPT = "<|im_start|>user\n{frames}\n{question}<|im_end|>\n<|im_start|>assistant\n"
FRAME = "<img>{image_tokens}</img>"


@dataclasses.dataclass(frozen=True)
class CineResult:
    """The result for one cine and one question.

    `prompt_ids`, `answer_ids` and `answer` are as in ReferenceResult. `low_res_logits` is float32
    [masks, frames, 256, 256] and `mask_logits` float32 [masks, frames, height, width]; `masks` is true where their sigmoid is above one
    half.
    """

    prompt_ids: Tensor
    answer_ids: Tensor
    answer: str
    low_res_logits: Tensor
    mask_logits: Tensor

    @property
    def masks(self) -> Tensor:
        """bool [masks, frames, height, width]."""
        return self.mask_logits.sigmoid() > 0.5


@torch.inference_mode()
def segment_cine(
    reference: Reference,
    frames: Sequence[Image.Image],
    question: str,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    draft: Sequence[int] = (),
) -> CineResult:
    """Answer `question` about the cine, and predict a mask on every frame for each [SEG] of the answer; `draft` is as in `segment`."""
    frames = [frame.convert("RGB") for frame in frames]
    size = reference.tile_size
    seen = [frame.resize((size, size), Image.Resampling.BICUBIC) for frame in frames[:PROMPTED_FRAMES]]
    embeds = reference.encode_tiles(to_pixel_values(seen).to(reference.device, reference.dtype))  # [frames, 256, hidden]
    text = "\n".join([FRAME.format(image_tokens="<IMG_CONTEXT>" * embeds.shape[1])] * len(seen))
    prompt_ids = torch.tensor(reference.tokenizer.encode(CINE_PROMPT.format(frames=text, question=question)), device=reference.device)
    answer_ids, _, seg_states = reference.generate(reference.embed(prompt_ids, embeds), max_new_tokens, draft)
    side = reference.sam2.image_size
    squares = [to_pixel_values([frame.resize((side, side))]).to(reference.device, reference.dtype) for frame in frames]
    low_res = [track(reference, squares, state, range(len(seen))) for state in seg_states]
    height, width = frames[0].height, frames[0].width
    empty = torch.empty(0, len(frames), side // 4, side // 4)
    return CineResult(
        prompt_ids,
        answer_ids,
        reference.tokenizer.decode(answer_ids, skip_special_tokens=False).strip(),
        torch.stack(low_res) if low_res else empty,
        torch.stack([reference.upsample(logits, height=height, width=width) for logits in low_res])
        if low_res
        else torch.empty(0, len(frames), height, width),
    )


@torch.inference_mode()
def track(
    reference: Reference, squares: Sequence[Tensor], seg_state: Tensor, conditioning: Sequence[int], *, reverse: bool = False
) -> Tensor:
    """Low-res logits float32 [frames, 256, 256] of the object of `seg_state` [hidden].

    `conditioning` frames are prompted by it. The others are tracked in the order of the pass, forward from the first conditioning frame or,
    in `reverse`, backward from the last; frames that the pass does not reach are NaN. `squares` are SAM2's pixels [1, 3, 1024, 1024].
    """
    sam2 = reference.sam2
    outputs: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    found = torch.full((len(squares), sam2.image_size // 4, sam2.image_size // 4), torch.nan)
    prompt = reference.text_hidden_fcs(seg_state)[None, None]  # [1, 1, C]

    def step(frame: int, prompt: Tensor | None) -> None:
        _, feats, positions, sizes = sam2._prepare_backbone_features(sam2.forward_image(squares[frame]))
        feats, positions = ([level.to(reference.dtype) for level in levels] for levels in (feats, positions))
        with _prompted(sam2, prompt) as predictions:
            _, (*_, pointer, object_score), _, _ = sam2._track_step(
                frame_idx=frame,
                is_init_cond_frame=prompt is not None,
                current_vision_feats=feats,
                current_vision_pos_embeds=positions,
                feat_sizes=sizes,
                point_inputs=None,
                mask_inputs=None,
                output_dict=outputs,
                num_frames=len(squares),
                track_in_reverse=reverse,
                prev_sam_mask_logits=None,
            )
        [(logits, iou)] = predictions  # [1, 3, 256, 256] and [1, 3]: sam2 gates the masks in its output, Sa2VA does not
        low_res = logits[:, iou[0].argmax()][None].float()
        size = (sam2.image_size, sam2.image_size)
        high_res = nn.functional.interpolate(low_res, size=size, mode="bilinear", align_corners=False)
        features, memory_positions = sam2._encode_new_memory(
            current_vision_feats=feats,
            feat_sizes=sizes,
            pred_masks_high_res=high_res.to(reference.dtype),
            object_score_logits=object_score,
            is_mask_from_pts=False,
        )
        kind = "non_cond_frame_outputs" if prompt is None else "cond_frame_outputs"
        outputs[kind][frame] = {"maskmem_features": features, "maskmem_pos_enc": memory_positions, "obj_ptr": pointer}
        found[frame] = low_res[0, 0].cpu()

    for frame in conditioning:
        step(frame, prompt)
    order = range(max(conditioning), -1, -1) if reverse else range(min(conditioning), len(squares))
    for frame in order:
        if frame not in outputs["cond_frame_outputs"]:
            step(frame, None)
    return found


@contextlib.contextmanager
def _prompted(sam2: Any, prompt: Tensor | None) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """In this block `prompt` is one more sparse token of sam2's prompt encoder. Gets what the mask decoder predicts: logits and IoUs."""
    predictions: list[tuple[Tensor, Tensor]] = []

    def add(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        sparse, dense = output
        return (sparse if prompt is None else torch.cat([sparse.to(prompt.dtype), prompt], dim=1)), dense

    hooks = [
        sam2.sam_prompt_encoder.register_forward_hook(add),
        sam2.sam_mask_decoder.register_forward_hook(lambda _module, _inputs, output: predictions.append(output[:2])),
    ]
    try:
        yield predictions
    finally:
        for hook in hooks:
            hook.remove()

"""The model in PyTorch, computed by the libraries that it was trained with: the reference that a bundle is compared with.

transformers runs the vision encoder and the language model, peft applies the LoRA (unmerged), and SAM2's own modules decode the masks.
Preprocessing has an implementation of its own (reference_pixels.py). Nothing is shared with merge_lora, graphs or vessel_rt, so that a bug
there shows up as a difference. Simple rather than fast: one image at a time, one token at a time.

The computation follows Sa2VA's inference code (projects/sa2va/hf/models/modeling_sa2va_chat.py, `predict_forward`); docs/numerics.md
records the comparison with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vessel_export.parity.reference_modules import (
    load_language_model,
    load_projector,
    load_sam2,
    load_text_hidden_fcs,
    load_tokenizer,
    load_vision_model,
    open_internvl3,
    widen_in_use,
)
from vessel_export.parity.reference_pixels import tile_image, to_pixel_values
from vessel_export.sources.checkpoint import open_checkpoint

__all__ = ["MaskPrediction", "Reference", "ReferenceResult", "Sam2Features"]

# Constants of Sa2VA's inference (`preparing_for_generation`) and of its template qwen_chat.
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
PROMPT = "<|im_start|>user\n<img>{image_tokens}</img>\n{question}<|im_end|>\n<|im_start|>assistant\n"
MAX_NEW_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Sam2Features:
    """The outputs of sam2_image_encoder for one image, named as in docs/architecture.md (sizes of SAM2 Hiera-L).

    `fpn_0` [1, 256, 256, 256] and `fpn_1` [1, 256, 128, 128] are taken before the mask decoder's conv_s0 and conv_s1;
    `image_features` [1, 256, 64, 64] has no_mem_embed added.
    """

    fpn_0: Tensor
    fpn_1: Tensor
    image_features: Tensor


@dataclasses.dataclass(frozen=True)
class MaskPrediction:
    """The best of three masks, by predicted IoU, for each [SEG] state; all float32.

    `low_res_logits` [masks, 256, 256]; `iou` [masks], predicted, 0 to 1; `object_score` [masks], a logit that is not used.
    """

    low_res_logits: Tensor
    iou: Tensor
    object_score: Tensor


@dataclasses.dataclass(frozen=True)
class ReferenceResult:
    """The result for one image and one question, with the inputs and outputs of every stage.

    `prompt_ids` [prompt] and `answer_ids` [answer] are int64; the answer includes its stop token. `answer` is its text as Sa2VA prints it,
    with special tokens. `hidden_states` [answer, hidden] are the final-norm states whose logits gave `answer_ids`: row k is at position
    prompt - 1 + k. `seg_states` [masks, hidden] are those at the positions that consume [SEG]. `mask_logits` is float32
    [masks, height, width] at the image's size; `masks` is true where their sigmoid is above one half.
    """

    prompt_ids: Tensor
    answer_ids: Tensor
    answer: str
    pixel_values: Tensor
    image_embeds: Tensor
    hidden_states: Tensor
    seg_states: Tensor
    sam2_pixel_values: Tensor
    sam2_features: Sam2Features
    prediction: MaskPrediction
    mask_logits: Tensor

    @property
    def masks(self) -> Tensor:
        """bool [masks, height, width]."""
        return self.mask_logits.sigmoid() > 0.5


@dataclasses.dataclass(frozen=True)
class Reference:
    """A fine-tuned Sa2VA, built by `Reference.load` from the libraries' own modules, in eval mode."""

    tokenizer: Any
    vision_model: nn.Module
    projector: nn.Module
    language_model: Any
    text_hidden_fcs: nn.Module
    sam2: Any
    tile_size: int
    downsample_ratio: float
    device: torch.device
    dtype: torch.dtype
    streamed: bool

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        base: Path,
        sam2: Path,
        *,
        lora_alpha: float | None = None,
        skip: Collection[str] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory: float = math.inf,
    ) -> Reference:
        """Build the model from the same three sources that the exporter reads.

        `base` is a folder in InternVL3's original layout or in the transformers-native `-hf` one. `sam2` is SAM2's .pt, with a .yaml of the
        same stem next to it or, for Meta's own file names, in the sam2 package. `lora_alpha` overrides the checkpoint's. `skip` names
        tensors of the checkpoint to leave out. If the parameters take more than `memory` bytes, the model is `streamed`: all large ones but
        SAM2's stay in their files, and each is converted to `dtype` while it is used. The numbers are the same; each pass reads the files
        again.

        Raises:
            CheckpointError: the checkpoint is unreadable, a tensor is missing or misshapen, or LoRA's alpha is unknown.
            BaseModelError: the base model or SAM2 is missing, incomplete or of another kind.
        """
        trained, internvl3 = open_checkpoint(checkpoint, skip), open_internvl3(base)
        tokenizer = load_tokenizer(internvl3)
        language_model = load_language_model(internvl3, trained, lora_alpha=lora_alpha, vocabulary=len(tokenizer))
        sam2_model = load_sam2(sam2, trained)
        text_hidden_fcs = load_text_hidden_fcs(internvl3.text_config.hidden_size, sam2_model.hidden_dim, trained)
        vision_model, projector = load_vision_model(internvl3), load_projector(internvl3, trained)
        modules = (vision_model, projector, language_model, text_hidden_fcs)
        for module in (*modules, sam2_model):
            module.eval().requires_grad_(False)
        values = sum(parameter.numel() for module in (*modules, sam2_model) for parameter in module.parameters())
        streamed = values * dtype.itemsize > memory
        if streamed:
            vision_model.embeddings.to(dtype=dtype)  # small, and other modules look at its dtype
            for module in modules:
                widen_in_use(module, dtype)
        for module in (sam2_model,) if streamed else (*modules, sam2_model):
            module.to(device=device, dtype=dtype)
        sam2_model.sam_prompt_encoder.float()  # it computes with FP32 coordinates in every dtype
        return cls(
            tokenizer=tokenizer,
            vision_model=vision_model,
            projector=projector,
            language_model=language_model,
            text_hidden_fcs=text_hidden_fcs,
            sam2=sam2_model,
            tile_size=internvl3.vision_config.image_size[0],
            downsample_ratio=internvl3.downsample_ratio,
            device=torch.device(device),
            dtype=dtype,
            streamed=streamed,
        )

    @torch.inference_mode()
    def segment(
        self, image: Image.Image, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS, draft: Sequence[int] = ()
    ) -> ReferenceResult:
        """Answer `question` about `image` (any mode; converted to RGB), and predict a mask for each [SEG] of the answer.

        `draft` has the ids of an expected answer. The answer is the same without it, but takes a pass for each of its tokens.
        """
        image = image.convert("RGB")
        pixel_values = to_pixel_values(tile_image(image, self.tile_size)).to(self.device, self.dtype)
        image_embeds = self.encode_tiles(pixel_values)
        prompt_ids = self.prompt_ids(question, image_embeds.shape[0] * image_embeds.shape[1])
        answer_ids, hidden_states, seg_states = self.generate(self.embed(prompt_ids, image_embeds), max_new_tokens, draft)
        size = self.sam2.image_size
        sam2_pixel_values = to_pixel_values([image.resize((size, size))]).to(self.device, self.dtype)
        features = self.encode_sam2(sam2_pixel_values)
        prediction = self.decode_masks(features, seg_states)
        return ReferenceResult(
            prompt_ids=prompt_ids,
            answer_ids=answer_ids,
            answer=self.tokenizer.decode(answer_ids, skip_special_tokens=False).strip(),
            pixel_values=pixel_values,
            image_embeds=image_embeds,
            hidden_states=hidden_states,
            seg_states=seg_states,
            sam2_pixel_values=sam2_pixel_values,
            sam2_features=features,
            prediction=prediction,
            mask_logits=self.upsample(prediction.low_res_logits, height=image.height, width=image.width),
        )

    def prompt_ids(self, question: str, image_tokens: int) -> Tensor:
        """The prompt's ids, int64 [prompt]: template qwen_chat without a system message."""
        text = PROMPT.format(image_tokens="<IMG_CONTEXT>" * image_tokens, question=question)
        return torch.tensor(self.tokenizer.encode(text), device=self.device)

    def embed(self, ids: Tensor, image_embeds: Tensor) -> Tensor:
        """`ids` [sequence] as inputs_embeds [1, sequence, hidden], the image's embeddings in place of <IMG_CONTEXT>."""
        embeds = self.language_model.get_input_embeddings()(ids)
        embeds[ids == self.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")] = image_embeds.flatten(0, 1)
        return embeds[None]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def encode_tiles(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [tiles, 3, 448, 448] -> image_embeds [tiles, 256, hidden]: InternViT, pixel shuffle v2, mlp1."""
        patches = self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 1:]  # without the class token
        return self.projector(_pixel_shuffle(patches, round(1 / self.downsample_ratio)))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def run_language_model(self, inputs_embeds: Tensor, cache: Any = None, kept: int | None = None) -> tuple[Tensor, Tensor]:
        """inputs_embeds [batch, sequence, hidden] -> final-norm hidden states of that shape, next ids [batch, sequence].

        `cache` (transformers' DynamicCache), if given, holds the positions before these and is updated. With `kept`, only that many of the
        last positions are returned.
        """
        model = self.language_model.get_base_model()
        output = model.model(inputs_embeds=inputs_embeds, past_key_values=cache, use_cache=cache is not None)
        states = output.last_hidden_state if kept is None else output.last_hidden_state[:, -kept:]
        return states, model.lm_head(states).argmax(-1)

    @torch.inference_mode()
    def generate(self, inputs_embeds: Tensor, max_new_tokens: int, draft: Sequence[int] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy decoding after a prompt [1, prompt, hidden], up to a stop token or `max_new_tokens`.

        The tokens of `draft` run together with the prompt. Those before the first that differs from the arg-max at the position before it
        are accepted, and decoding goes on token by token.

        Returns answer ids [answer], the hidden states that gave them [answer, hidden], and the [SEG] states [masks, hidden].
        """
        from transformers import DynamicCache

        stops = {self.tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS}
        seg_id = self.tokenizer.convert_tokens_to_ids("[SEG]")
        cache, prompt = DynamicCache(), inputs_embeds.shape[1]
        ids: list[int] = []
        states: list[Tensor] = []  # states[k] emitted ids[k], states[k + 1] consumed it

        def finished() -> bool:
            """The last token is consumed only if it is [SEG], whose state becomes a mask."""
            ended = bool(ids) and (ids[-1] in stops or len(ids) == max_new_tokens)
            return ended and (ids[-1] != seg_id or len(states) > len(ids))

        pending = list(draft[:max_new_tokens])
        if pending:
            inputs_embeds = torch.cat([inputs_embeds, self._embed_ids(pending)], dim=1)
        while not finished():
            hidden_states, next_ids = self.run_language_model(inputs_embeds, cache, kept=len(pending) + 1)
            for i, (state, said) in enumerate(zip(hidden_states[0], next_ids[0].tolist(), strict=True)):
                states.append(state)
                if len(ids) < max_new_tokens:
                    ids.append(said)
                if finished() or pending[i : i + 1] != ids[-1:]:
                    break
            if rejected := cache.get_seq_length() - (prompt + len(ids) - 1):
                cache.crop(-rejected)
            inputs_embeds, pending = self._embed_ids(ids[-1:]), []
        table, answer_ids = torch.stack(states), torch.tensor(ids, device=self.device)
        consumed = table[1:]
        return answer_ids, table[: len(ids)], consumed[answer_ids[: len(consumed)] == seg_id]

    def _embed_ids(self, ids: Sequence[int]) -> Tensor:
        """[1, len(ids), hidden]."""
        return self.language_model.get_input_embeddings()(torch.tensor([ids], device=self.device))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def encode_sam2(self, pixel_values: Tensor) -> Sam2Features:
        """pixel_values [1, 3, 1024, 1024] -> the inputs of mask decoding."""
        fpn_0, fpn_1, top = (level.to(self.dtype) for level in self.sam2.image_encoder(pixel_values)["backbone_fpn"])
        return Sam2Features(fpn_0, fpn_1, top + self.sam2.no_mem_embed.reshape(1, -1, 1, 1))

    @torch.inference_mode()
    def decode_masks(self, features: Sam2Features, seg_states: Tensor) -> MaskPrediction:
        """One image's features and seg_states [masks, hidden] -> its masks.

        As in Sa2VA's `_forward_sam_heads`: no points (SAM2 then pads with two `not_a_point` tokens), the language embedding as a third
        sparse token, three masks, and no gating by the object score.
        """
        count, decoder, prompt_encoder = len(seg_states), self.sam2.sam_mask_decoder, self.sam2.sam_prompt_encoder
        if count == 0:  # SAM2's decoder does not take an empty batch
            none = torch.empty(0, device=self.device)
            return MaskPrediction(none.reshape(0, *features.fpn_0.shape[2:]), none, none)
        no_point = torch.zeros(count, 1, 2, device=self.device), -torch.ones(count, 1, dtype=torch.int32, device=self.device)
        sparse, dense = prompt_encoder(points=no_point, boxes=None, masks=None)
        prompts = self.text_hidden_fcs(seg_states)[:, None]  # [masks, 1, 256]
        high_res = (decoder.conv_s0(features.fpn_0), decoder.conv_s1(features.fpn_1))
        logits, iou, _, object_score = decoder(
            image_embeddings=features.image_features.expand(count, -1, -1, -1),
            image_pe=prompt_encoder.get_dense_pe().to(self.dtype),
            sparse_prompt_embeddings=torch.cat([sparse.to(self.dtype), prompts], dim=1),
            dense_prompt_embeddings=dense.to(self.dtype),
            multimask_output=True,
            repeat_image=False,
            high_res_features=[level.expand(count, -1, -1, -1) for level in high_res],
        )
        best = torch.arange(count, device=self.device), iou.argmax(1)
        return MaskPrediction(logits[best].float(), iou[best].float(), object_score[:, 0].float())

    @torch.inference_mode()
    def upsample(self, low_res_logits: Tensor, *, height: int, width: int) -> Tensor:
        """low_res_logits [masks, 256, 256] -> float32 [masks, height, width]: bilinear to SAM2's square, then to the image's size."""
        size, logits = self.sam2.image_size, low_res_logits.float()[:, None]
        for shape in ((size, size), (height, width)):
            logits = nn.functional.interpolate(logits, size=shape, mode="bilinear", align_corners=False)
        return logits[:, 0]


def _pixel_shuffle(patches: Tensor, factor: int) -> Tensor:
    """patches [tiles, side * side, width] -> [tiles, (side / factor)^2, width * factor^2]; InternVL's "v2" order."""
    side = math.isqrt(patches.shape[1])
    blocks = patches.reshape(len(patches), side // factor, factor, side // factor, factor, -1)  # [tiles, Y, y, X, x, width]
    return blocks.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)

"""The small Sa2VA: InternViT, projector, Qwen2 with LoRA, and SAM2 with a language prompt, at sizes that two CPU cores can train.

The modules' names are those of the real checkpoints (InternVL3's original layout, Sa2VA's), so that a state dict is a file's content.
Nothing here reads or writes files, and nothing but `TinyConfig` says how small the model is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

__all__ = [
    "LORA_TARGETS", "MEMORY_PARTS", "Decoded", "Features", "InternViT", "MaskBranch", "TinyConfig", "Tracker", "VisionLanguageModel",
    "add_lora", "build_sam2", "prompt_head",
]  # fmt: skip

MEMORY_PARTS = ("memory_attention", "memory_encoder", "maskmem_tpos_enc", "obj_ptr_proj", "no_obj_ptr")
"""What of SAM2 only cines need: the beginnings of the tensors' names."""

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """Every size that differs from Sa2VA-InternVL3-8B."""

    image_size: int = 448
    patch_size: int = 28
    vision_hidden: int = 80
    vision_layers: int = 3
    vision_heads: int = 4
    vision_intermediate: int = 320
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 320
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile: pixel shuffle 0.5 leaves a quarter of the patches."""
        return (self.image_size // self.patch_size // 2) ** 2

    def qwen2(self, vocabulary: int) -> dict[str, Any]:
        """The `llm_config` of an InternVL3 folder, as keywords of Qwen2Config."""
        return {
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "intermediate_size": self.intermediate,
            "vocab_size": vocabulary, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "tie_word_embeddings": False, "attention_dropout": 0.0, "initializer_range": 0.02,
        }  # fmt: skip


class _Embeddings(nn.Module):
    """Patch, class and position embeddings: [tiles, 3, size, size] -> [tiles, 1 + patches, hidden]."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(1, 1, config.vision_hidden) * 0.02)
        self.patch_embedding = nn.Conv2d(3, config.vision_hidden, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + patches, config.vision_hidden) * 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        tokens: Tensor = torch.cat([self.class_embedding.expand(len(pixels), -1, -1), patches], dim=1)
        return tokens + self.position_embedding


class _Attention(nn.Module):
    """Self-attention with one matrix for Q, K and V."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, hidden))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, intermediate)
        self.fc2 = nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    """A pre-norm block with layer scale (`ls1`, `ls2`)."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        hidden = config.vision_hidden
        self.norm1, self.norm2 = nn.LayerNorm(hidden, eps=1e-6), nn.LayerNorm(hidden, eps=1e-6)
        self.attn = _Attention(hidden, config.vision_heads)
        self.mlp = _Mlp(hidden, config.vision_intermediate)
        self.ls1, self.ls2 = nn.Parameter(torch.full((hidden,), 0.1)), nn.Parameter(torch.full((hidden,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2  # type: ignore[no-any-return]


class _Encoder(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.vision_layers))


class InternViT(nn.Module):
    """InternVL's vision model: [tiles, 3, size, size] -> [tiles, 1 + patches, hidden], without a final norm."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)

    def forward(self, pixels: Tensor) -> Tensor:
        x: Tensor = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class VisionLanguageModel(nn.Module):
    """`vision_model`, `mlp1` and `language_model`: InternVL3 under the names of its own files."""

    def __init__(self, config: TinyConfig, vocabulary: int) -> None:
        super().__init__()
        self.vision_model = InternViT(config)
        shuffled = 4 * config.vision_hidden
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(shuffled), nn.Linear(shuffled, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.hidden)
        )
        self.language_model: Any = Qwen2ForCausalLM(Qwen2Config(**config.qwen2(vocabulary)))

    def patches(self, pixels: Tensor) -> Tensor:
        """Pixel-shuffled patches (ps_version v2): [tiles, 3, size, size] -> [tiles, tokens, 4 * vision hidden]."""
        x: Tensor = self.vision_model(pixels)[:, 1:]
        tiles, count, hidden = x.shape
        side = int(count**0.5)
        x = x.view(tiles, side, side // 2, hidden * 2).permute(0, 2, 1, 3)
        x = x.reshape(tiles, side // 2, side // 2, hidden * 4).permute(0, 2, 1, 3)
        return x.reshape(tiles, count // 4, hidden * 4)

    def embed(self, ids: Tensor, patches: Tensor, image_token: int) -> Tensor:
        """Embeddings of `ids` [batch, sequence] with the projected `patches` in the places of `image_token`."""
        embeds = self.language_model.get_input_embeddings()(ids)
        image = self.mlp1(patches).to(embeds.dtype).reshape(-1, embeds.shape[-1])
        return embeds.masked_scatter((ids == image_token)[..., None], image)  # type: ignore[no-any-return]


def add_lora(model: VisionLanguageModel, config: TinyConfig, vocabulary: int) -> None:
    """Grow the vocabulary and wrap the language model in LoRA as Sa2VA does: embed_tokens and lm_head are trained whole."""
    model.language_model.resize_token_embeddings(vocabulary, mean_resizing=False)
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=list(LORA_TARGETS), modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    model.language_model = get_peft_model(model.language_model, lora)


def prompt_head(hidden: int, sam2_hidden: int) -> nn.Sequential:
    """Sa2VA's text_hidden_fcs: the state that consumes [SEG] -> SAM2's prompt."""
    return nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, sam2_hidden))


def build_sam2(yaml: str) -> Any:
    """A SAM2Base with random weights from the text of a SAM2 configuration."""
    return instantiate(OmegaConf.create(yaml).model, _recursive_=True)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Three masks of each object: low-res `logits` [objects, 3, side, side], `iou` [objects, 3], `tokens` [objects, 3, d_model]; and the
    objects' `score` [objects]."""

    logits: Tensor
    iou: Tensor
    score: Tensor
    tokens: Tensor

    @property
    def mask(self) -> Tensor:
        """The logits [objects, side, side] of the mask of the highest predicted IoU."""
        return self.logits[torch.arange(len(self.iou)), self.iou.argmax(dim=1)]

    @property
    def token(self) -> Tensor:
        """The token [objects, d_model] of the same mask."""
        return self.tokens[torch.arange(len(self.iou)), self.iou.argmax(dim=1)]

    def gated(self) -> Decoded:
        """With logits of -1024 for an object whose score is not above 0, as in sam2."""
        return dataclasses.replace(self, logits=torch.where(self.score[:, None, None, None] > 0, self.logits, -1024.0))


Features = tuple[Tensor, Tensor, Tensor]


class MaskBranch(nn.Module):
    """SAM2 on still images and cines with a language prompt, along the path that Sa2VA takes through SAM2Base."""

    def __init__(self, sam2: Any) -> None:
        super().__init__()
        self.sam2 = sam2

    def encode(self, pixels: Tensor) -> Features:
        """[images, 3, size, size] -> FPN features at strides 4 and 8, and at stride 16 with no_mem_embed added; all d_model wide."""
        fine, middle, coarse = self.sam2.image_encoder(pixels)["backbone_fpn"]
        return fine, middle, coarse + self._no_memory

    def decode(self, features: Features, prompts: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masks of `prompts` [masks, d_model] on the images `image` [masks]: low-res logits [masks, 3, side, side], IoU [masks, 3],
        object score [masks]."""
        fine, middle, coarse = features
        decoder = self.sam2.sam_mask_decoder
        decoded = self._decode((decoder.conv_s0(fine)[image], decoder.conv_s1(middle)[image], coarse[image]), prompts)
        return decoded.logits, decoded.iou, decoded.score

    def encode_frames(self, pixels: Tensor) -> Features:
        """[frames, 3, size, size] -> features for `decode_frames`, at strides 4 and 8 (as narrow as the decoder wants them) and 16."""
        fine, middle, coarse = self.sam2.image_encoder(pixels)["backbone_fpn"]
        return self.sam2.sam_mask_decoder.conv_s0(fine), self.sam2.sam_mask_decoder.conv_s1(middle), coarse

    def decode_frames(self, features: Features, prompts: Tensor) -> Decoded:
        """Masks of `prompts` [objects, d_model], one on each frame, as on still images."""
        fine, middle, coarse = features
        return self._decode((fine, middle, coarse + self._no_memory), prompts)

    @property
    def _no_memory(self) -> Tensor:
        embed: Tensor = self.sam2.no_mem_embed
        return embed.view(1, -1, 1, 1)

    def _decode(self, features: Features, prompts: Tensor | None) -> Decoded:
        """Without `prompts` what is on a frame is known from the memories in its features."""
        sam2 = self.sam2
        fine, middle, coarse = features
        count = len(coarse)
        points = (coarse.new_zeros(count, 1, 2), -torch.ones(count, 1, dtype=torch.int32))
        sparse, dense = sam2.sam_prompt_encoder(points=points, boxes=None, masks=None)
        logits, iou, tokens, score = sam2.sam_mask_decoder(
            image_embeddings=coarse,
            image_pe=sam2.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse if prompts is None else torch.cat([sparse, prompts[:, None]], dim=1),
            dense_prompt_embeddings=dense,
            multimask_output=True,
            repeat_image=False,
            high_res_features=[fine, middle],
        )
        return Decoded(logits, iou, score[:, 0], tokens)


@dataclasses.dataclass(frozen=True)
class Tracker:
    """Carries masks of some frames of a cine of `length` frames to the others, through SAM2's memory.

    The memory is read and written as by SAM2Base.track_step, where the object score empties a carried mask if `gated`: Sa2VA's copy of
    sam2 has no such rule. Gradients reach what writes the memory, but not the masks that are written.
    """

    branch: MaskBranch
    length: int
    gated: bool
    prompted: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    propagated: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def remember(self, place: int, coarse: Tensor, mask: Tensor, token: Tensor, score: Tensor) -> None:
        """Take frame `place` as a prompted one: its features [objects, ...] at stride 16, and `mask`, `token` and `score` as in Decoded."""
        self.prompted[place] = self._memory(coarse, mask, token, score)

    def propagate(self, place: int, features: Features, backwards: bool = False) -> Decoded:
        """The masks on frame `place`, from the prompted frames and the last six before it (after it, if `backwards`), which are then in
        the memory too. `features` are for each object. What is returned is not gated, so that it can be learned from."""
        fine, middle, coarse = features
        position = self.branch.sam2.image_encoder.neck.position_encoding(coarse[:1])
        recalled = self.branch.sam2._prepare_memory_conditioned_features(
            frame_idx=place,
            is_init_cond_frame=False,
            current_vision_feats=[_sequence(coarse)],
            current_vision_pos_embeds=[_sequence(position.expand_as(coarse))],
            feat_sizes=[tuple(coarse.shape[-2:])],
            output_dict={"cond_frame_outputs": self.prompted, "non_cond_frame_outputs": self.propagated},
            num_frames=self.length,
            track_in_reverse=backwards,
        )
        decoded = self.branch._decode((fine, middle, recalled), None)
        self.propagated[place] = self._memory(coarse, self.mask(decoded).detach(), decoded.token.detach(), decoded.score.detach())
        return decoded

    def mask(self, decoded: Decoded) -> Tensor:
        """The logits [objects, side, side] of the mask of a carried frame."""
        return (decoded.gated() if self.gated else decoded).mask

    def _memory(self, coarse: Tensor, mask: Tensor, token: Tensor, score: Tensor) -> dict[str, Any]:
        sam2 = self.branch.sam2
        high = F.interpolate(mask[:, None], size=(sam2.image_size,) * 2, mode="bilinear", align_corners=False)
        features, position = sam2._encode_new_memory([_sequence(coarse)], [tuple(coarse.shape[-2:])], high, score[:, None], False)
        present = (score[:, None] > 0).float()
        pointer = present * sam2.obj_ptr_proj(token) + (1 - present) * sam2.no_obj_ptr
        return {"maskmem_features": features, "maskmem_pos_enc": position, "obj_ptr": pointer}


def _sequence(features: Tensor) -> Tensor:
    """[objects, d_model, height, width] -> [height * width, objects, d_model]"""
    return features.flatten(2).permute(2, 0, 1)

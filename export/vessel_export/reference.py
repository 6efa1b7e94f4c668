"""The model in PyTorch, computed by the libraries it was trained with: the truth that a bundle is compared with.

transformers runs the vision encoder and the language model, peft applies the LoRA (unmerged), and SAM2's own modules make the masks.
Preprocessing is written here once more, with Pillow and torch. Nothing is shared with `merge`, `graphs` or `vessel_rt`: a mistake
made there cannot hide here. Speed does not matter in this module; one image at a time, one token at a time.

What is computed follows Sa2VA's inference code (projects/sa2va/hf/models/modeling_sa2va_chat.py, `predict_forward`);
docs/numerics.md records the comparison with it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from vessel_export.checkpoint import Checkpoint, open_checkpoint
from vessel_export.errors import BaseModelError, CheckpointError

__all__ = ["MaskPrediction", "Reference", "ReferenceResult", "Sam2Features", "tile_image", "to_pixel_values"]

# Sa2VA's constants (`preparing_for_generation`, and `special_tokens` of its training configuration, whose order gives the ids).
MIN_TILES, MAX_TILES = 1, 12
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPECIAL_TOKENS = ("[SEG]", "<p>", "</p>", "<vp>", "</vp>")
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
PROMPT = "<|im_start|>user\n<img>{image_tokens}</img>\n{question}<|im_end|>\n<|im_start|>assistant\n"
MAX_NEW_TOKENS = 2048

# InternVisionModel's names -> those of transformers' InternVLVisionModel, in this order; qkv is split apart from this.
_VISION_NAMES = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("encoder.layers.", "encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
# Where each part's tensors lie: (prefix in the file, part and prefix here), first match wins.
_ORIGINAL_PARTS = (
    ("vision_model.", "vision."),
    ("mlp1.", "projector."),
    ("language_model.", "language."),
)
_HF_PARTS = (  # as saved by transformers 4 (`language_model.model.`) and by later versions (`model.language_model.`)
    ("model.language_model.", "language.model."),
    ("language_model.", "language."),
    ("lm_head.", "language.lm_head."),
    ("vision_tower.", "vision."),
    ("model.vision_tower.", "vision."),
    ("multi_modal_projector.layer_norm.", "projector.0."),
    ("multi_modal_projector.linear_1.", "projector.1."),
    ("multi_modal_projector.linear_2.", "projector.3."),
    ("model.multi_modal_projector.layer_norm.", "projector.0."),
    ("model.multi_modal_projector.linear_1.", "projector.1."),
    ("model.multi_modal_projector.linear_2.", "projector.3."),
)


@dataclasses.dataclass(frozen=True)
class Sam2Features:
    """What sam2_image_encoder gives for one image (sizes of SAM2 Hiera-L): docs/architecture.md has the same names.

    `fpn_0` [1, 256, 256, 256] and `fpn_1` [1, 256, 128, 128] are taken before the mask decoder's conv_s0 and conv_s1;
    `image_features` [1, 256, 64, 64] has no_mem_embed added.
    """

    fpn_0: Tensor
    fpn_1: Tensor
    image_features: Tensor


@dataclasses.dataclass(frozen=True)
class MaskPrediction:
    """The best of three masks, by predicted IoU, for each [SEG] state; all float32.

    `low_res_logits` [masks, 256, 256]; `iou` [masks], predicted, 0 to 1; `object_score` [masks], a logit that gates nothing.
    """

    low_res_logits: Tensor
    iou: Tensor
    object_score: Tensor


@dataclasses.dataclass(frozen=True)
class ReferenceResult:
    """One image and one question, with every stage's inputs and outputs.

    `prompt_ids` [prompt] and `answer_ids` [answer] are int64, the answer with its stop token; `answer` is its text as Sa2VA
    prints it, special tokens included. `hidden_states` [answer, hidden] is the final-norm state whose logits gave `answer_ids`, so its
    row k stands at position prompt - 1 + k; `seg_states` [masks, hidden] are those at the positions that consume [SEG].
    `masks` is bool [masks, height, width] at the image's own size.
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
    masks: Tensor


@dataclasses.dataclass(frozen=True)
class Reference:
    """A fine-tuned Sa2VA, loaded; make one with `Reference.load`. Its parts are the libraries' own modules, in eval mode."""

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

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        base: Path,
        sam2: Path,
        *,
        lora_alpha: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Reference:
        """Build the model from the same three files that the exporter reads.

        `base` is a folder in InternVL3's original layout or in the transformers-native `-hf` one; `sam2` is SAM2's .pt, its yaml beside
        it under the same stem or, for Meta's own file names, in the sam2 package. `lora_alpha` overrides the checkpoint's.

        Raises:
            CheckpointError: the checkpoint is unreadable, lacks or misshapes a tensor, or tells no alpha and none is given.
            BaseModelError: the base model or SAM2 is missing, incomplete or of another kind.
        """
        trained = open_checkpoint(checkpoint)
        config, parts = _read_base(base)
        vision_config, text_config, downsample_ratio = _configs(base, config)
        tokenizer = _load_tokenizer(base, text_config)
        language_model = _language_model(text_config, parts["language"], trained, lora_alpha, len(tokenizer), dtype)
        vision_model = _load_strictly(_new_vision_model(vision_config), parts["vision"], f"{base}: vision_model")
        projector = _new_projector(vision_config.hidden_size, text_config.hidden_size, downsample_ratio)
        _load_strictly(projector, _under(trained.tensors, "mllm.model.mlp1."), f"{checkpoint}: mlp1")
        sam2_model = _load_sam2(sam2)
        mask_decoder = _under(trained.tensors, "grounding_encoder.sam2_model.sam_mask_decoder.")
        _load_strictly(sam2_model.sam_mask_decoder, mask_decoder, f"{checkpoint}: sam_mask_decoder")
        text_hidden_fcs = _new_text_hidden_fcs(text_config.hidden_size, sam2_model.hidden_dim)
        _load_strictly(text_hidden_fcs, _under(trained.tensors, "text_hidden_fcs."), f"{checkpoint}: text_hidden_fcs")

        def ready(module: nn.Module) -> nn.Module:
            return module.eval().requires_grad_(False).to(device=device, dtype=dtype)

        ready(sam2_model)
        sam2_model.sam_prompt_encoder.float()  # its coordinates are FP32 whatever the weights are
        return cls(
            tokenizer=tokenizer,
            vision_model=ready(vision_model),
            projector=ready(projector),
            language_model=ready(language_model),
            text_hidden_fcs=ready(text_hidden_fcs),
            sam2=sam2_model,
            tile_size=vision_config.image_size[0],
            downsample_ratio=downsample_ratio,
            device=torch.device(device),
            dtype=dtype,
        )

    @torch.inference_mode()
    def segment(self, image: Image.Image, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> ReferenceResult:
        """Answer `question` about `image` (any mode; converted to RGB) and give a mask for each [SEG] of the answer."""
        image = image.convert("RGB")
        pixel_values = to_pixel_values(tile_image(image, self.tile_size)).to(self.device, self.dtype)
        image_embeds = self.encode_tiles(pixel_values)
        prompt_ids = self.prompt_ids(question, image_embeds.shape[0] * image_embeds.shape[1])
        answer_ids, hidden_states, seg_states = self.generate(self.embed(prompt_ids, image_embeds), max_new_tokens)
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
            masks=self.upsample(prediction.low_res_logits, height=image.height, width=image.width),
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
        patches = self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 1:]  # the class token goes
        return self.projector(_pixel_shuffle(patches, round(1 / self.downsample_ratio)))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def run_language_model(self, inputs_embeds: Tensor, cache: Any = None) -> tuple[Tensor, Tensor]:
        """inputs_embeds [batch, sequence, hidden] -> final-norm hidden states of that shape, next ids [batch, sequence].

        `cache` (transformers' DynamicCache), if given, holds the positions before these and is extended.
        """
        model = self.language_model.get_base_model()
        output = model.model(inputs_embeds=inputs_embeds, past_key_values=cache, use_cache=cache is not None)
        return output.last_hidden_state, model.lm_head(output.last_hidden_state).argmax(-1)

    @torch.inference_mode()
    def generate(self, inputs_embeds: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy decoding after a prompt [1, prompt, hidden], up to a stop token or `max_new_tokens`.

        Returns answer ids [answer], the hidden states that gave them [answer, hidden], and the [SEG] states [masks, hidden].
        """
        from transformers import DynamicCache

        stops = {self.tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS}
        seg_id = self.tokenizer.convert_tokens_to_ids("[SEG]")
        cache = DynamicCache()
        ids: list[int] = []
        states: list[Tensor] = []
        while True:
            hidden_states, next_ids = self.run_language_model(inputs_embeds, cache)
            states.append(hidden_states[0, -1])
            if len(ids) == max_new_tokens or (ids and ids[-1] in stops):
                break
            ids.append(int(next_ids[0, -1]))
            inputs_embeds = self.language_model.get_input_embeddings()(next_ids[:, -1:])
        # Every emitted token was consumed by one more run: states[k] emitted ids[k], states[k + 1] consumed it.
        table = torch.stack(states)
        answer_ids = torch.tensor(ids, device=self.device)
        return answer_ids, table[:-1], table[1:][answer_ids == seg_id]

    @torch.inference_mode()
    def encode_sam2(self, pixel_values: Tensor) -> Sam2Features:
        """pixel_values [1, 3, 1024, 1024] -> the features that mask decoding takes."""
        fpn_0, fpn_1, top = (level.to(self.dtype) for level in self.sam2.image_encoder(pixel_values)["backbone_fpn"])
        return Sam2Features(fpn_0, fpn_1, top + self.sam2.no_mem_embed.reshape(1, -1, 1, 1))

    @torch.inference_mode()
    def decode_masks(self, features: Sam2Features, seg_states: Tensor) -> MaskPrediction:
        """One image's features and seg_states [masks, hidden] -> its masks.

        As Sa2VA's `_forward_sam_heads`: no points (SAM2 then pads with two `not_a_point` tokens), the language embedding as a third
        sparse token, three masks, and no gating by the object score.
        """
        count, decoder, prompt_encoder = len(seg_states), self.sam2.sam_mask_decoder, self.sam2.sam_prompt_encoder
        if count == 0:  # SAM2's decoder takes no empty batch
            return MaskPrediction(torch.empty(0, *features.fpn_0.shape[2:]), torch.empty(0), torch.empty(0))
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
        """low_res_logits [masks, 256, 256] -> bool [masks, height, width]: bilinear to SAM2's square, then to the image's size."""
        size, logits = self.sam2.image_size, low_res_logits.float()[:, None]
        for shape in ((size, size), (height, width)):
            logits = nn.functional.interpolate(logits, size=shape, mode="bilinear", align_corners=False)
        return logits[:, 0].sigmoid() > 0.5


def tile_image(image: Image.Image, size: int) -> list[Image.Image]:
    """Cut an RGB image into 1 to 12 tiles of `size` pixels, row by row, and a thumbnail last if there is more than one.

    InternVL's dynamic tiling: of all grids, the one whose aspect ratio is nearest the image's; of equally near ones the largest
    that the image fills by more than half. Resized by Pillow's default filter (bicubic).
    """
    columns, rows = _choose_grid(image.width, image.height, size)
    resized = image.resize((columns * size, rows * size))
    boxes = [(x * size, y * size, (x + 1) * size, (y + 1) * size) for y in range(rows) for x in range(columns)]
    tiles = [resized.crop(box) for box in boxes]
    return tiles if len(tiles) == 1 else [*tiles, image.resize((size, size))]


def to_pixel_values(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size -> float32 [images, 3, height, width]: to 0..1, then ImageNet's mean and standard deviation."""
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels.float() / 255 - mean) / std).contiguous()


def _choose_grid(width: int, height: int, size: int) -> tuple[int, int]:
    """(columns, rows) of tiles for an image of width x height pixels."""
    numbers = range(1, MAX_TILES + 1)
    grids = sorted(((c, r) for c in numbers for r in numbers if MIN_TILES <= c * r <= MAX_TILES), key=lambda grid: grid[0] * grid[1])
    best, least = (1, 1), math.inf
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        fills = width * height > 0.5 * size * size * columns * rows
        if distance < least or (distance == least and fills):
            best, least = (columns, rows), distance
    return best


def _pixel_shuffle(patches: Tensor, factor: int) -> Tensor:
    """patches [tiles, side * side, width] -> [tiles, (side / factor)^2, width * factor^2]; InternVL's "v2" order."""
    side = math.isqrt(patches.shape[1])
    blocks = patches.reshape(len(patches), side // factor, factor, side // factor, factor, -1)  # [tiles, Y, y, X, x, width]
    return blocks.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def _read_base(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """config.json, and the weights (memory-mapped) as "vision", "projector" and "language", named as transformers names them."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as e:
        raise BaseModelError(f"{folder}: no base model here (config.json: {e}); give a folder of InternVL3") from e
    prefixes = _HF_PARTS if config.get("model_type") == "internvl" else _ORIGINAL_PARTS
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "projector": {}, "language": {}}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            renamed = next((new + name.removeprefix(old) for old, new in prefixes if name.startswith(old)), None)
            if renamed is None:
                raise BaseModelError(f"{file}: unexpected tensor {name}; give an InternVL3 base model")
            part, _, key = renamed.partition(".")
            parts[part][key] = tensor
    if prefixes is _ORIGINAL_PARTS:
        parts["vision"] = _as_transformers_vision(parts["vision"])
    return config, parts


def _as_transformers_vision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """InternVisionModel's tensors under transformers' names, the joined qkv split in three."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in _VISION_NAMES:
            name = name.replace(old, new)
        if ".attention.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{letter}_proj.")] = part
        else:
            renamed[name] = tensor
    return renamed


def _configs(folder: Path, config: Mapping[str, Any]) -> tuple[Any, Any, float]:
    """transformers' configurations of vision encoder and language model, and the pixel shuffle's ratio."""
    from transformers import InternVLVisionConfig, Qwen2Config

    if config.get("model_type") == "internvl":
        vision_config = InternVLVisionConfig.from_dict(config["vision_config"])
        return vision_config, Qwen2Config.from_dict(config["text_config"]), config["downsample_ratio"]
    if config.get("model_type") != "internvl_chat" or config.get("ps_version") != "v2" or config.get("select_layer") != -1:
        raise BaseModelError(f"{folder}: not an InternVL3 (model_type internvl or internvl_chat, ps_version v2, select_layer -1)")
    vision = config["vision_config"]
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "norm_type", "layer_norm_eps")
    vision_config = InternVLVisionConfig(
        **{name: vision[name] for name in (*same, "image_size", "patch_size")},
        attention_bias=vision["qkv_bias"],
        use_qk_norm=vision["qk_normalization"],
    )
    return vision_config, Qwen2Config.from_dict(config["llm_config"]), config["downsample_ratio"]


def _load_tokenizer(folder: Path, config: Any) -> Any:
    """The base model's tokenizer with Sa2VA's special tokens added, in the order of its training configuration.

    The `-hf` layout of InternVL3 has a `<video>` token with an id past the embedding's rows; it goes, or it would shift [SEG]'s.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True)
    except (OSError, ValueError) as e:
        raise BaseModelError(f"{folder}: no tokenizer here ({str(e).splitlines()[0]}); copy the whole model folder") from e
    if len(tokenizer) > config.vocab_size:
        document = json.loads(tokenizer.backend_tokenizer.to_str())
        document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < config.vocab_size]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(document)))
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return tokenizer


def _new_vision_model(config: Any) -> nn.Module:
    from transformers import InternVLVisionModel

    return InternVLVisionModel(config)


def _new_projector(vision_hidden: int, hidden: int, downsample_ratio: float) -> nn.Module:
    """Sa2VA's mlp1."""
    width = vision_hidden * round(1 / downsample_ratio) ** 2
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))


def _new_text_hidden_fcs(hidden: int, mask_hidden: int) -> nn.Module:
    """Sa2VA's text_hidden_fcs (its Dropout(0.0) holds nothing)."""
    return nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, mask_hidden))


def _language_model(
    config: Any, base: Mapping[str, Tensor], trained: Checkpoint, lora_alpha: float | None, vocabulary: int, dtype: torch.dtype
) -> nn.Module:
    """Qwen2ForCausalLM wrapped by peft: LoRA beside the base weights, embed_tokens and lm_head replaced by the trained ones."""
    import peft
    from transformers import Qwen2ForCausalLM

    alpha = lora_alpha if lora_alpha is not None else trained.lora_alpha
    if alpha is None:
        raise CheckpointError(f"{trained.path}: tells no lora_alpha; give it with --lora-alpha")
    adapter = _under(trained.tensors, "mllm.model.language_model.")
    tables = {name: adapter.get(f"base_model.model.{name}.weight") for name in ("model.embed_tokens", "lm_head")}
    for name, table in tables.items():
        if table is None or len(table) != vocabulary:
            found = "is missing" if table is None else f"has {len(table)} rows"
            raise CheckpointError(f"{trained.path}: {name}.weight {found}; the base model's tokenizer has {vocabulary} with Sa2VA's tokens")
    # The base model's own tables, of another vocabulary, are never used: training replaced both whole.
    config.vocab_size, config.tie_word_embeddings = vocabulary, False
    state_dict = {**base, **{f"{name}.weight": table for name, table in tables.items()}}
    qwen2: Any = Qwen2ForCausalLM
    model, report = qwen2.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    _refuse_gaps("base model: language_model", report["missing_keys"], report["unexpected_keys"])
    lora: Any = peft.LoraConfig(
        r=trained.lora_rank,
        target_modules=sorted({match[1] for name in adapter if (match := re.search(r"\.(\w+)\.lora_A\.weight$", name))}),
        modules_to_save=["embed_tokens", "lm_head"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    lora.lora_alpha = alpha
    wrapped: nn.Module = peft.get_peft_model(model, lora)
    loaded: Any = peft.set_peft_model_state_dict(wrapped, adapter)
    missing = {name for name in loaded.missing_keys if ".lora_" in name or ".modules_to_save." in name}
    _refuse_gaps(f"{trained.path}: language_model", missing, loaded.unexpected_keys)
    return wrapped


def _load_sam2(weights: Path) -> Any:
    """sam2's SAM2Base, built from its yaml, with the weights of a .pt of `{"model": state_dict}`."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    yaml = _sam2_yaml(weights)
    config = OmegaConf.load(yaml)
    OmegaConf.resolve(config)
    for target in _targets(OmegaConf.to_container(config)):
        if not target.startswith("sam2.modeling."):  # hydra calls whatever a yaml names
            raise BaseModelError(f"{yaml}: names {target}; only classes of sam2.modeling are built")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)["model"]
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError) as e:
        raise BaseModelError(f"{weights}: not a SAM2 .pt ({str(e).splitlines()[0]})") from e
    return _load_strictly(instantiate(config.model, _recursive_=True), state, str(weights))


def _sam2_yaml(weights: Path) -> Path:
    """The yaml beside the .pt, else the one that the sam2 package has for Meta's file name."""
    from sam2 import build_sam

    beside = weights.with_suffix(".yaml")
    if beside.is_file():
        return beside
    for inside, file_name in build_sam.HF_MODEL_ID_TO_FILENAMES.values():
        if file_name == weights.name:
            return Path(build_sam.__file__).parent / str(inside)
    raise BaseModelError(f"{weights}: no {beside.name} beside it, and not one of Meta's file names; put SAM2's yaml there")


def _targets(node: Any) -> list[str]:
    """Every `_target_` of a hydra configuration."""
    if isinstance(node, dict):
        own = [str(node["_target_"])] if "_target_" in node else []
        return own + [target for value in node.values() for target in _targets(value)]
    return [target for value in node for target in _targets(value)] if isinstance(node, list) else []


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> nn.Module:
    """`module` with `tensors`, cast to its own dtype; every name must match, and every shape."""
    expected = module.state_dict()
    _refuse_gaps(what, expected.keys() - tensors.keys(), tensors.keys() - expected.keys())
    wrong = [f"{name} is {list(tensor.shape)}, not {list(expected[name].shape)}" for name, tensor in tensors.items()
             if tensor.shape != expected[name].shape]  # fmt: skip
    if wrong:
        raise BaseModelError(f"{what}: {'; '.join(wrong)}")
    module.load_state_dict(dict(tensors))
    return module


def _refuse_gaps(what: str, missing: Any, unexpected: Any) -> None:
    faults = [f"lacks {name}" for name in sorted(missing)] + [f"has unexpected {name}" for name in sorted(unexpected)]
    if faults:
        raise BaseModelError(f"{what} {', '.join(faults)}; give the base model and SAM2 that the checkpoint was trained on")

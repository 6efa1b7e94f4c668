"""Sa2VA's own inference code (projects/sa2va/hf/models) on images and cines. Run by benchmarks.sa2va, in Sa2VA's environment.

Sa2VA's files run as they are. What differs from a call on a GPU is set from outside: the CPU and FP32 in place of CUDA and BF16
(`_import_sa2va`, `_round`), and the sizes that its code has as constants (`_sam2_of`, `_prepare`). peft merges the LoRA, as in Sa2VA's
tools/convert_to_hf.py. No code is shared with vessel_rt and vessel_export; the checkpoint's tensors and alpha are as the exporter reads
them.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

_LANGUAGE_MODEL = "mllm.model.language_model."
_TRAINED_WHOLE = ("embed_tokens", "lm_head")
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SAM2 = "grounding_encoder.sam2_model."


def main() -> int:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.path.insert(0, str(Path(request["sa2va"], "projects", "sa2va", "hf")))
    chat, sam2 = _import_sa2va()
    with torch.inference_mode():
        model, tokenizer = _build(chat, sam2, request)
        _prepare(chat, model, tokenizer, request["max_new_tokens"])
        for number, case in enumerate(request["cases"]):
            _round(sam2, case["rounded"])
            _save(Path(request["out"], f"{number}.npz"), model, case)
            print(number + 1, flush=True)
    return 0


def _import_sa2va() -> tuple[Any, Any]:
    """Its modules modeling_sa2va_chat and sam2, for the CPU."""
    for name, attribute in (("modeling_internlm2", "InternLM2ForCausalLM"), ("modeling_phi3", "Phi3ForCausalLM")):
        unused = types.ModuleType(f"models.{name}")  # other language models, whose code asks for other versions of transformers
        setattr(unused, attribute, None)
        sys.modules[unused.__name__] = unused
    chat: Any = importlib.import_module("models.modeling_sa2va_chat")
    sam2: Any = importlib.import_module("models.sam2")
    torch.Tensor.cuda = lambda self, *_arguments, **_options: self  # type: ignore[method-assign]
    begin = sam2.SAM2VideoPredictor.init_state

    def begin_on_cpu(predictor: Any, images: Any) -> dict[str, Any]:
        state: dict[str, Any] = begin(predictor, images)
        return state | {"device": torch.device("cpu"), "storage_device": torch.device("cpu")}

    sam2.SAM2VideoPredictor.init_state = begin_on_cpu
    return chat, sam2


class _WithoutBfloat16(types.ModuleType):
    """torch, in which bfloat16 is float32."""

    def __getattr__(self, name: str) -> Any:
        return torch.float32 if name == "bfloat16" else getattr(torch, name)


def _round(sam2: Any, rounded: list[str]) -> None:
    """Let only what is in `rounded` go through BF16, as in Sa2VA's inference: `constants`, ImageNet's mean and standard deviation for
    SAM2's pixels, which its training has in FP32; `memories`, those of a cine."""
    sam2.SAM2.preprocess_image.__defaults__ = (torch.bfloat16 if "constants" in rounded else torch.float32,)
    sam2.torch = torch if "memories" in rounded else _WithoutBfloat16("torch")


def _build(chat: Any, sam2: Any, request: dict[str, Any]) -> tuple[Any, Any]:
    """The fine-tuned Sa2VAChatModel in FP32, and its tokenizer. Ends the process if a tensor of the sources is not used, or one of the
    model is in none of them."""
    base = Path(request["base"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["[SEG]", "<p>", "</p>", "<vp>", "</vp>"], special_tokens=True)  # projects/sa2va/configs/sa2va_finetune.py
    config = importlib.import_module("models.configuration_sa2va_chat").Sa2VAChatConfig.from_pretrained(base)
    config.template = "qwen_chat"
    config.llm_config.vocab_size = len(tokenizer)
    if request["sam2_config"]:
        built = _sam2_of(sam2, request["sam2_config"])
        chat.SAM2 = lambda: built
    model = chat.Sa2VAChatModel(config, use_flash_attn=False)
    unset = set(model.state_dict())

    def load(weights: dict[str, Tensor]) -> None:
        renamed = {name.replace(".gamma", ".g_weight"): tensor for name, tensor in weights.items()}
        unexpected = model.load_state_dict(renamed, strict=False).unexpected_keys
        if unexpected:
            raise SystemExit(f"Sa2VA's model has no {unexpected[0]}")
        unset.difference_update(renamed)

    for file in sorted(base.glob("*.safetensors")):
        load({name: tensor for name, tensor in load_file(file).items() if not _trained_whole(name)})
    load({_SAM2 + name: tensor for name, tensor in torch.load(request["sam2"], map_location="cpu", weights_only=True)["model"].items()})
    trained = load_file(request["trained"])
    load({name.removeprefix("mllm.model."): tensor for name, tensor in trained.items() if not name.startswith(_LANGUAGE_MODEL)})

    lora = {name.removeprefix(_LANGUAGE_MODEL): tensor for name, tensor in trained.items() if name.startswith(_LANGUAGE_MODEL)}
    absent = sorted(name for name in unset if not _trained_whole(name))
    if absent:
        raise SystemExit(f"neither base model, SAM2 nor checkpoint has {absent[0]}")
    settings: dict[str, Any] = {"target_modules": list(_LORA_TARGETS), "modules_to_save": list(_TRAINED_WHOLE), "task_type": "CAUSAL_LM"}
    alpha, rank = request["lora_alpha"], request["lora_rank"]
    language_model: Any = get_peft_model(model.language_model, LoraConfig(r=rank, lora_alpha=alpha, **settings))
    found: Any = set_peft_model_state_dict(language_model, lora)
    if found.unexpected_keys or any("lora" in name or "modules_to_save" in name for name in found.missing_keys):
        raise SystemExit(f"peft cannot use the LoRA: unexpected {found.unexpected_keys[:1]}, missing {found.missing_keys[:1]}")
    model.language_model = language_model.merge_and_unload()
    return model.eval(), tokenizer


def _trained_whole(name: str) -> bool:
    """Whether the checkpoint's tensor replaces the base model's, which has another vocabulary."""
    return any(f".{part}." in name for part in _TRAINED_WHOLE)


def _sam2_of(sam2: Any, structure: dict[str, Any]) -> Any:
    """Sa2VA's SAM2 in the sizes of a SAM2 configuration, in place of Hiera-L, which is all that its constructor builds."""

    def build(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        arguments = {name: build(value) for name, value in node.items() if name != "_target_"}
        return getattr(sam2, node["_target_"].rpartition(".")[2])(**arguments) if "_target_" in node else arguments

    built = sam2.SAM2.__new__(sam2.SAM2)
    nn.Module.__init__(built)
    built.sam2_model = build(structure | {"_target_": "SAM2VideoPredictor"})
    built.hidden_dim = built.sam2_model.hidden_dim
    built.img_mean, built.img_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return built


def _prepare(chat: Any, model: Any, tokenizer: Any, max_new_tokens: int) -> None:
    """Its settings for inference, with the sizes of this model and FP32."""
    model.preparing_for_generation(tokenizer, max_new_tokens=max_new_tokens, torch_dtype=torch.float32)
    vision = model.config.vision_config
    if vision.image_size != model.image_size:
        raise SystemExit(f"tiles of {vision.image_size} pixels: Sa2VA's code has {model.image_size} as a constant")
    model.patch_token = int((vision.image_size // vision.patch_size) ** 2 * model.downsample_ratio**2)
    model.extra_image_processor = chat.DirectResize(model.grounding_encoder.sam2_model.image_size)


def _save(path: Path, model: Any, case: dict[str, Any]) -> None:
    """Run a case; its answer, the logits on SAM2's square [masks, frames, side, side], and masks [masks, frames, height, width]."""
    logits: list[Any] = []
    encoder = model.grounding_encoder
    predict = encoder.language_embd_inference

    def recorded(*arguments: Any) -> Tensor:
        found: Tensor = predict(*arguments)  # [frames, 1, side, side]
        logits.append(found[:, 0].float().numpy())
        return found

    encoder.language_embd_inference = recorded
    frames = [Image.open(file).convert("RGB") for file in case["files"]]
    shown = {"video": frames} if case["cine"] else {"image": frames[0]}
    result = model.predict_forward(**shown, text=f"<image>\n{case['question']}", tokenizer=model.tokenizer)
    del encoder.language_embd_inference
    np.savez(path, answer=result["prediction"], logits=np.array(logits), masks=np.array(result["prediction_masks"], dtype=bool))


if __name__ == "__main__":
    raise SystemExit(main())

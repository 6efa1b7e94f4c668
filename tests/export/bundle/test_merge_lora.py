"""The merge: equal to peft's, bit for bit and to the one rounding; and no tensor of a checkpoint unaccounted for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.synth.random_model import lora_targets
from tests.support.small_models import LANGUAGE, fine_tuned_state, write_checkpoint
from vessel_export.bundle.bundle_writer import ExportRequest
from vessel_export.bundle.merge_lora import MergePlan, plan_merge
from vessel_export.errors import CheckpointError
from vessel_export.io.safetensors_writer import OutputTensor
from vessel_export.sources.base_model import open_base, open_sam2
from vessel_export.sources.checkpoint import open_checkpoint
from vessel_export.sources.names import LORA_PREFIX

ALPHA, RANK = 8, 4
MERGED = "weights/language_model.safetensors"


def _plan(request: ExportRequest, dtype: torch.dtype = torch.float32, checkpoint: Path | None = None) -> MergePlan:
    opened = open_checkpoint(checkpoint or request.checkpoint)
    return plan_merge(opened, open_base(request.base), open_sam2(request.sam2), alpha=ALPHA, capacity=64, dtype=dtype)


def _whole(tensor: OutputTensor) -> torch.Tensor:
    return torch.cat(list(tensor.pieces()))


def _merged_by_peft(request: ExportRequest) -> dict[str, torch.Tensor]:
    base, state = open_base(request.base), open_checkpoint(request.checkpoint).tensors
    c = LANGUAGE
    config = Qwen2Config(
        hidden_size=c.hidden_size, num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim, intermediate_size=c.intermediate_size, vocab_size=c.vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).float()
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict({name: base.tensor(f"language_model.{name}").float() for name in names}, strict=True)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[name.split(".")[1] for name in lora_targets(c)]))
    loaded = 0
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = state["mllm.model.language_model." + name.replace(".default", "")].float()
            loaded += 1
    assert loaded == 14 * c.layers
    return dict(adapted.merge_and_unload().named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_peft(small: ExportRequest, dtype: torch.dtype) -> None:
    """FP32 to the bit; narrower types to the bit too, since both round the same FP32 sum once."""
    expected = _merged_by_peft(small)
    written = {tensor.name: tensor for tensor in _plan(small, dtype).files[MERGED]}
    for i in range(LANGUAGE.layers):
        for module in lora_targets(LANGUAGE):
            ours = _whole(written[f"layers.{i}.{module}.weight"]).to(dtype)
            assert torch.equal(ours, expected[f"model.layers.{i}.{module}.weight"].to(dtype).T), module


def test_saved_modules_replace_and_grow_the_vocabulary(small: ExportRequest) -> None:
    plan, state = _plan(small), open_checkpoint(small.checkpoint).tensors
    (embedding,) = plan.files["weights/embed_tokens.safetensors"]
    head = next(tensor for tensor in plan.files[MERGED] if tensor.name == "lm_head.weight")
    assert plan.vocabulary == LANGUAGE.vocabulary + 5
    assert torch.equal(_whole(embedding), state[LORA_PREFIX + "model.embed_tokens.weight"])
    assert torch.equal(_whole(head), state[LORA_PREFIX + "lm_head.weight"].T)


def test_the_tables_are_those_of_transformers(small: ExportRequest) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    rotary = Qwen2RotaryEmbedding(Qwen2Config(head_dim=LANGUAGE.head_dim, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    cos, sin = rotary(torch.zeros(1), torch.arange(64)[None])
    written = {tensor.name: tensor for tensor in _plan(small).files[MERGED]}
    assert torch.equal(_whole(written["rotary_cos"]), cos[0, :, : LANGUAGE.head_dim // 2])
    assert torch.equal(_whole(written["rotary_sin"]), sin[0, :, : LANGUAGE.head_dim // 2])


Damage = Callable[[dict[str, torch.Tensor]], None]
Q0 = LORA_PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight"


def _rename(state: dict[str, torch.Tensor]) -> None:
    state[Q0.replace("q_proj", "query")] = state.pop(Q0)


def _poison(state: dict[str, torch.Tensor]) -> None:
    state["text_hidden_fcs.0.weight"][3, 5] = float("nan")


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (lambda state: state.pop(Q0), [f"{Q0} is missing"]),
        (_rename, [f"{Q0} is missing", f"{Q0.replace('q_proj', 'query')} is unknown"]),
        (_poison, ["text_hidden_fcs.0.weight has NaN or infinity"]),
        (lambda state: state.update({"mllm.model.mlp1.0.bias": torch.ones(3)}), ["mllm.model.mlp1.0.bias has shape [3], not [128]"]),
        (lambda state: state.update({"mllm.model.mlp1.0.bias": torch.ones(0)}), ["mllm.model.mlp1.0.bias has shape [0]"]),
        (lambda state: state.update({"ema.weight": torch.ones(3)}), ["ema.weight is unknown"]),
        (lambda state: state.pop("grounding_encoder.sam2_model.sam_mask_decoder.iou_token.weight"), ["iou_token.weight is missing"]),
    ],
    ids=["missing", "renamed", "nan", "shape", "empty", "unknown", "decoder"],
)
def test_every_fault_is_named(small: ExportRequest, tmp_path: Path, damage: Damage, messages: list[str]) -> None:
    state = fine_tuned_state()
    damage(state)
    with pytest.raises(CheckpointError) as raised:
        _plan(small, checkpoint=write_checkpoint(tmp_path / "damaged.pth", state))
    assert str(raised.value).count("\n") == 0
    for message in ["damaged.pth", *messages]:
        assert message in str(raised.value)


def test_a_checkpoint_of_another_model(small: ExportRequest, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "resnet.pth", {"backbone.conv1.weight": torch.ones(8, 3, 7, 7), "head.bias": torch.ones(8)})
    with pytest.raises(CheckpointError, match=r"does not fit the base model.* and \d+ more"):
        _plan(small, checkpoint=tmp_path / "resnet.pth")


def test_both_spellings_merge_alike(small: ExportRequest, tmp_path: Path) -> None:
    state = fine_tuned_state()
    spelled = {
        "module."
        + name.replace(".lora_A.", ".lora_A.default.")
        .replace(".lora_B.", ".lora_B.default.")
        .replace("lm_head.weight", "lm_head.modules_to_save.default.weight"): tensor
        for name, tensor in state.items()
    }
    plain, other = _plan(small), _plan(small, checkpoint=write_checkpoint(tmp_path / "s.pth", spelled))
    for ours, theirs in zip(plain.files[MERGED], other.files[MERGED], strict=True):
        assert torch.equal(_whole(ours), _whole(theirs))

"""A model with planted outliers overflows as plain FP16, and ours does not: SwiGLU product past 65504, residual 2e5, Q K^T past 65504.

What a GPU computes is emulated; the reference is torch in FP32. The same at the real model's widths, two layers
deep, is marked `full_width`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from tests.support.paths import Tiny
from vessel_export.bundle.bundle_writer import ExportRequest
from vessel_export.cli import main
from vessel_export.io.files import link_or_copy
from vessel_export.parity.checks import TOLERANCES
from vessel_export.parity.emulate import emulate, scaled_logits, serialized, spell_out_attention, wide_options, widen
from vessel_export.parity.exponents import apply, exponents_of, set_exponents
from vessel_export.parity.fp16_ranges import measure
from vessel_export.parity.inputs import Sample, drawn_samples, one_pass, read_samples
from vessel_export.parity.ranges_report import LIMIT
from vessel_export.parity.reference import Reference
from vessel_export.parity.verify import verify
from vessel_export.sources.checkpoint import open_checkpoint
from vessel_export.sources.names import LORA_PREFIX
from vessel_rt.device.deployment import deploy
from vessel_rt.device.providers import Device
from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.model.prompt import EmbedTokens, PromptTokenizer

QUESTION = "Please segment vessel in this image."
LORA_ALPHA = 128  # of the full-width model

Change = Callable[[ir.Model], None]


def _as_it_is(model: ir.Model) -> None:
    pass


def _without_scales(model: ir.Model) -> None:
    """Every product as plain FP16 makes it."""
    set_exponents(model.graph, dict.fromkeys(exponents_of(model.graph), 0))


def _with_whole_keys(model: ir.Model) -> None:
    """Keys with what their biases add to all of them."""
    for node in [node for node in model.graph if node.op_type == "Sub"]:
        whole = node.inputs[0]
        assert whole is not None
        node.outputs[0].replace_all_uses_with(whole)


def _with_whole_keys_unfused(model: ir.Model) -> None:
    _with_whole_keys(model)
    spell_out_attention(model)


def _run(
    folder: Path, stage: str, feeds: dict[str, np.ndarray], *outputs: str, change: Change = _as_it_is, rounding: bool = True
) -> list[Any]:
    """A stage of the bundle at `folder`, emulated after `change`."""
    model = ir.load(folder / f"{stage}.onnx")
    change(model)
    widen(model, rounding=rounding)
    options = wide_options(ort.SessionOptions(), folder)
    options.log_severity_level = 3
    session = ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
    results: list[Any] = session.run(list(outputs), feeds)
    return results


def _measured(folder: Path, copy: Path, samples: Sequence[Sample]) -> Bundle:
    """A copy of the bundle at `folder` with the exponents that `samples` ask for."""
    shutil.copytree(folder, copy, copy_function=link_or_copy)
    bundle = Bundle.load(copy)
    apply(bundle, measure(bundle, samples, QUESTION, threads=1))
    return Bundle.load(copy)


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def reference(planted: ExportRequest) -> Reference:
    return Reference.load(planted.checkpoint, Path(planted.base), Path(planted.sam2))


@dataclasses.dataclass(frozen=True)
class Expected:
    """One image and question in FP32: what goes into the language model and into the vision encoder, and what comes out."""

    pixel_values: np.ndarray
    image_embeds: np.ndarray
    feeds: dict[str, np.ndarray]
    hidden_states: np.ndarray
    ids: np.ndarray


@pytest.fixture(scope="module")
def expected(reference: Reference, planted_fp16: Path) -> Expected:
    result = reference.segment(drawn_samples()[0].reference, QUESTION, max_new_tokens=8)
    with torch.no_grad():
        prompt = reference.embed(result.prompt_ids, result.image_embeds)
        embeds = torch.cat([prompt, reference.embed(result.answer_ids[:-1], result.image_embeds[:0])], dim=1)
    feeds = one_pass(Bundle.load(planted_fp16).language_model, embeds.numpy(), kept=len(result.answer_ids))
    arrays = (result.pixel_values, result.image_embeds, result.hidden_states, result.answer_ids)
    pixel_values, image_embeds, hidden_states, ids = (tensor.numpy() for tensor in arrays)
    return Expected(pixel_values, image_embeds, feeds, hidden_states, ids)


def test_plain_fp16_in_torch_is_not_finite(planted: ExportRequest) -> None:
    """The reference itself, in half precision and with eager attention, as Sa2VA runs without flash-attn."""
    half = Reference.load(planted.checkpoint, Path(planted.base), Path(planted.sam2), dtype=torch.float16)
    result = half.segment(drawn_samples()[0].reference, QUESTION, max_new_tokens=2)
    assert not torch.isfinite(result.image_embeds).all()
    assert not torch.isfinite(result.hidden_states).all()


def test_logits_are_past_fp16(planted_fp16: Path, expected: Expected) -> None:
    """Q K^T before its scale, as eager attention makes it."""

    def show_logits(model: ir.Model) -> None:
        _with_whole_keys(model)
        attention = next(node for node in model.graph if node.op_type == "Attention")
        logits = scaled_logits(model.graph, attention)
        logits.name, logits.shape = "logits", ir.Shape(list("bkgst"))
        model.graph.outputs.append(logits)

    width = Bundle.load(planted_fp16).language_model.head_dim
    [logits] = _run(planted_fp16, "language_model", expected.feeds, "logits", change=show_logits, rounding=False)
    assert np.abs(logits).max() * width**0.5 > LIMIT


@pytest.mark.parametrize("stage", ["vision_encoder", "language_model"])
def test_the_graph_without_its_scales_is_not_finite(planted_fp16: Path, expected: Expected, stage: str) -> None:
    feeds, output = {
        "vision_encoder": ({"pixel_values": expected.pixel_values}, "image_embeds"),
        "language_model": (expected.feeds, "hidden_states"),
    }[stage]
    assert not np.isfinite(_run(planted_fp16, stage, feeds, output, change=_without_scales)[0]).all()
    assert np.isfinite(_run(planted_fp16, stage, feeds, output)[0]).all()


@pytest.mark.parametrize("unfused", [False, True])
def test_ours_is_within_tolerance(planted_fp16: Path, expected: Expected, unfused: bool) -> None:
    """Whether a kernel fuses attention or stores every step of it in FP16."""
    tolerance = TOLERANCES["fp16"].relative_error
    change = spell_out_attention if unfused else _as_it_is
    [image_embeds] = _run(planted_fp16, "vision_encoder", {"pixel_values": expected.pixel_values}, "image_embeds", change=change)
    assert _error(image_embeds, expected.image_embeds) < tolerance
    hidden, ids = _run(planted_fp16, "language_model", expected.feeds, "hidden_states", "next_ids", change=change)
    assert _error(hidden[0], expected.hidden_states) < tolerance
    assert np.array_equal(ids[0], expected.ids)


def test_keys_that_share_a_bias_need_it_taken_from_them(planted_fp16: Path, expected: Expected) -> None:
    """Unfused: the logits, of about 2e4, are finite in FP16, but have steps of 16."""
    [hidden] = _run(planted_fp16, "language_model", expected.feeds, "hidden_states", change=_with_whole_keys_unfused)
    assert _error(hidden[0], expected.hidden_states) > TOLERANCES["fp16"].relative_error


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_whole_bundle_in_emulation(reference: Reference, precision: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.load(request.getfixturevalue(f"planted_{precision}"))
    report = verify(emulate(bundle), reference, drawn_samples()[:1], [QUESTION], threads=1)
    assert report.passed, "\n" + report.table()


def test_the_whole_bundle_on_onnx_runtimes_own_fp16(reference: Reference, planted_fp16: Path) -> None:
    report = verify(deploy(Bundle.load(planted_fp16), Device("cpu")), reference, drawn_samples()[:1], [QUESTION], threads=1)
    assert report.passed, "\n" + report.table()


def test_with_measured_exponents(reference: Reference, planted_fp16: Path, tmp_path: Path) -> None:
    """They are far smaller than the exporter's, and the graphs are as good."""
    bundle = _measured(planted_fp16, tmp_path / "bundle", drawn_samples()[:1])
    report = verify(emulate(bundle), reference, drawn_samples()[:1], [QUESTION], threads=1)
    assert report.passed, "\n" + report.table()


def test_a_trained_model_with_measured_exponents(tiny: Tiny, fp16_bundle: Path, tmp_path: Path) -> None:
    samples = read_samples(sorted(tiny.frames.glob("*.jpg"))[:2])
    bundle = _measured(fp16_bundle, tmp_path / "bundle", samples)
    trained = Reference.load(tiny.checkpoint, tiny.base, tiny.sam2)
    for deployment in (emulate(bundle), deploy(bundle, Device("cpu"))):
        report = verify(deployment, trained, samples, [QUESTION], threads=1)
        assert report.passed, "\n" + report.table()


def test_a_bf16_bundle_on_the_cpu(planted: ExportRequest, planted_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It cannot run there, and says so; verify emulates it, and says that."""
    bundle = Bundle.load(planted_bf16)
    with pytest.raises(BundleError, match="bf16"):
        deploy(bundle, Device("cpu"))
    drawn_samples()[2].runtime.save(tmp_path / "frame.png")
    arguments = ["verify", "--bundle", planted_bf16, "--ckpt", planted.checkpoint, "--images", tmp_path / "frame.png", "--threads", 1]
    assert main([str(argument) for argument in arguments]) == 0
    assert "bf16: 1 runs, 1 masks: parity\nemulated: " in capsys.readouterr().out


def test_numpy_never_meets_bf16(planted_bf16: Path) -> None:
    """What the host gives and takes is FP32, and of the same values as the checkpoint's; only the cache is BF16."""
    bundle = Bundle.load(planted_bf16)
    for stage in bundle.stages.values():
        types = {spec.name: spec.dtype for spec in (*stage.inputs, *stage.outputs) if spec.dtype != "int64"}
        assert {name for name, dtype in types.items() if dtype != "float32"} == {
            name for name in types if name.startswith(("past_", "present_"))
        }
        assert set(types.values()) <= {"float32", "bfloat16"}
    with EmbedTokens(bundle) as table:
        rows = table.rows([3, 5])
    assert rows.dtype == np.float32
    assert np.array_equal(rows, torch.from_numpy(rows).bfloat16().float().numpy())


@dataclasses.dataclass(frozen=True)
class FullWidth:
    """The language model alone, by transformers: its layers' FP32 weights with LoRA merged, and the rows of embedding and head."""

    layers: Any
    embedding: torch.Tensor  # bf16, mapped
    head: torch.Tensor

    @classmethod
    def load(cls, request: ExportRequest) -> FullWidth:
        from transformers import Qwen2Config, Qwen2Model

        config = json.loads((Path(request.base) / "config.json").read_text(encoding="utf-8"))["llm_config"]
        state = open_checkpoint(request.checkpoint).tensors
        kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "rms_norm_eps")
        qwen = Qwen2Config(**{key: config[key] for key in kept}, rope_theta=config["rope_theta"], vocab_size=8, attn_implementation="eager")
        layers = Qwen2Model(qwen).eval().requires_grad_(False)
        own, given = dict(layers.named_parameters()), set()
        for file in Path(request.base).glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    parameter = name.removeprefix("language_model.model.")
                    if parameter == name or parameter == "embed_tokens.weight":
                        continue
                    own[parameter].copy_(tensors.get_tensor(name))
                    a, b = (state.get(f"{LORA_PREFIX}model.{parameter.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
                    if a is not None:
                        own[parameter].add_(b.float() @ a.float(), alpha=LORA_ALPHA / len(a))
                    given.add(parameter)
        assert own.keys() - given == {"embed_tokens.weight"}
        return cls(layers, state[LORA_PREFIX + "model.embed_tokens.weight"], state[LORA_PREFIX + "lm_head.weight"])

    def states(self, embeds: torch.Tensor) -> torch.Tensor:
        """Final-norm states [tokens, hidden] of embeds [tokens, hidden]."""
        dtype = next(self.layers.parameters()).dtype
        with torch.no_grad():
            return self.layers(inputs_embeds=embeds[None].to(dtype)).last_hidden_state[0].float()

    def ids(self, states: torch.Tensor) -> torch.Tensor:
        best = [(states @ rows.float().T).max(-1) for rows in self.head.split(16384)]
        part = torch.stack([found.values for found in best]).argmax(0)
        within = torch.stack([found.indices for found in best]).gather(0, part[None])[0]
        return part * 16384 + within


@pytest.mark.full_width
def test_at_the_real_models_widths(full_width: ExportRequest) -> None:
    folder, bundle = full_width.out, Bundle.load(full_width.out)
    before, after = PromptTokenizer(bundle).encode(QUESTION)
    answer = Tokenizer.from_file(str(folder / bundle.prompt.tokenizer)).encode(bundle.prompt.answers[0], add_special_tokens=False).ids
    kept = len(answer) + 1  # and after the prompt; none of these is <|im_start|>, whose one large number would hide the rest
    model = FullWidth.load(full_width)
    image = torch.randn(64, bundle.language_model.hidden_size, generator=torch.manual_seed(0))
    image[:, bundle.language_model.hidden_size // 3] = 0  # as the projector leaves it: what is planted fires for <|im_start|> alone
    embeds = torch.cat([model.embedding[before].float(), image, model.embedding[after + answer].float()])
    expected = model.states(embeds)
    assert expected.isfinite().all()
    expected = expected[-kept:]
    ids = model.ids(expected).numpy()
    model.layers.half()
    assert not model.states(embeds).isfinite().all()
    del model
    feeds = one_pass(bundle.language_model, embeds.numpy()[None], kept=kept)
    for change in (_as_it_is, spell_out_attention):
        hidden, ours = _run(folder, "language_model", feeds, "hidden_states", "next_ids", change=change)
        assert _error(hidden[0], expected.numpy()) < TOLERANCES["fp16"].relative_error
        assert np.array_equal(ours[0], ids)
    for change in (_without_scales, _with_whole_keys_unfused):
        [hidden] = _run(folder, "language_model", feeds, "hidden_states", change=change)
        assert not _error(hidden[0], expected.numpy()) < TOLERANCES["fp16"].relative_error
    pixels = {"pixel_values": np.random.default_rng(0).standard_normal((1, 3, 448, 448)).astype(np.float32)}
    [exact] = _run(folder, "vision_encoder", pixels, "image_embeds", rounding=False)
    assert _error(_run(folder, "vision_encoder", pixels, "image_embeds")[0], exact) < TOLERANCES["fp16"].relative_error
    assert not np.isfinite(_run(folder, "vision_encoder", pixels, "image_embeds", change=_without_scales)[0]).all()

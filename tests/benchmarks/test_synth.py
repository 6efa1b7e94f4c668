"""Random models: the real one's formats and sizes, the same bytes each time, and outliers where they are planted and nowhere else."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.synth import random_model as synth
from benchmarks.synth.__main__ import main
from benchmarks.synth.file_formats import ADDED_TOKENS, token_id, write_tokenizer
from benchmarks.synth.random_model import SynthError, SynthModel, base_tensors, checkpoint_tensors, full_size, sam2_tensors, write_synth
from tests.support.small_models import MODEL, VOCABULARY
from vessel_export.parity.reference import Reference
from vessel_export.parity.reference_modules import load_tokenizer, open_internvl3
from vessel_export.sources.base_model import open_base, open_sam2
from vessel_export.sources.checkpoint import open_checkpoint
from vessel_export.sources.names import LORA_PREFIX, NEW_TOKENS
from vessel_export.sources.tokenizer import extend_tokenizer

OUTLIERS = dataclasses.replace(MODEL, outliers=True, shards=4)
FP16_MAX = 65504
QUESTION = "Please segment vessel in this image."


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with outliers, in four shards."""
    out = tmp_path_factory.mktemp("synth") / "model"
    assert write_synth(out, OUTLIERS) == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return out


@pytest.fixture(scope="module")
def reference(written: Path) -> Reference:
    return Reference.load(written / "iter_12192.pth", written / "base", written / "sam2_hiera_short.pt")


def test_the_same_seed_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    write_synth(tmp_path / "again", OUTLIERS)
    assert files(tmp_path / "again") == files(written)
    write_synth(tmp_path / "other", dataclasses.replace(OUTLIERS, seed=1))
    other = files(tmp_path / "other")
    changed = {name for name, content in files(written).items() if content != other[name]}
    assert changed == {name for name in other if name.endswith((".safetensors", ".pt", ".pth"))}


def test_the_full_size() -> None:
    """FACTS of the real files: 535 tensors and 1,294 M values in the checkpoint, InternVL3-8B, SAM2 Hiera-L."""
    model = full_size()
    fine_tune = {tensor.name: tensor for tensor in checkpoint_tensors(model)}
    assert len(fine_tune) == 535
    assert sum(math.prod(tensor.shape) for tensor in fine_tune.values()) == pytest.approx(1294e6, rel=1e-3)
    assert {fine_tune[LORA_PREFIX + name].shape for name in ("model.embed_tokens.weight", "lm_head.weight")} == {(151_679, 3584)}
    assert {tensor.dtype for tensor in (*fine_tune.values(), *base_tensors(model))} == {torch.bfloat16}
    assert sum(math.prod(tensor.shape) for tensor in base_tensors(model)) == pytest.approx(7.94e9, rel=1e-3)
    assert sum(math.prod(tensor.shape) for tensor in sam2_tensors(model)) == pytest.approx(224.4e6, rel=1e-3)
    assert (model.sam2_config, model.sam2_file) == (None, "sam2_hiera_large.pt")


def test_fewer_layers_keep_every_width() -> None:
    def widths(model: SynthModel) -> set[tuple[int, ...]]:
        return {tensor.shape for tensors in (base_tensors(model), checkpoint_tensors(model), sam2_tensors(model)) for tensor in tensors}

    short = full_size(2)
    assert (short.language.layers, short.vision.layers) == (2, 2)
    assert widths(short) == widths(full_size())
    assert len(sam2_tensors(short)) < len(sam2_tensors(full_size()))


@pytest.mark.parametrize("layers", [0, 29])
def test_no_such_depth(layers: int) -> None:
    with pytest.raises(SynthError, match="from 1 to 28"):
        full_size(layers)


def test_shards_hold_every_tensor(written: Path) -> None:
    base, expected = open_base(str(written / "base")), base_tensors(OUTLIERS)
    assert (base.vision, base.language) == (OUTLIERS.vision, OUTLIERS.language)
    for tensor in expected:
        assert torch.equal(base.tensor(tensor.name), torch.cat(list(tensor.pieces()))), tensor.name
    index = json.loads((written / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == {tensor.name for tensor in expected}
    files = sorted((written / "base").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]


def test_the_checkpoint_is_mmengines(written: Path) -> None:
    path = written / "iter_12192.pth"
    checkpoint = open_checkpoint(path)
    assert (checkpoint.lora_rank, checkpoint.lora_alpha, checkpoint.iteration) == (4, 8.0, 12192)
    assert "mmengine" not in sys.modules
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert {"mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr"} <= set(unsafe)
    for tensor in checkpoint_tensors(OUTLIERS):
        stored = checkpoint.tensors[tensor.name]
        assert torch.equal(stored, torch.cat(list(tensor.pieces()))), tensor.name
        assert stored.untyped_storage().nbytes() == tensor.bytes  # its own, as training leaves it, and nobody's view


@pytest.mark.parametrize("file", ["iter_12192.pth", "sam2_hiera_short.pt"])
def test_torch_files_are_whole(written: Path, file: str) -> None:
    assert zipfile.ZipFile(written / file).testzip() is None


def test_sam2_fits_its_configuration(written: Path) -> None:
    sam2 = open_sam2(str(written / "sam2_hiera_short.pt"))
    assert {tensor.dtype for tensor in sam2.state_dict.values()} == {torch.float32}
    sam2.build()


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 151_674])
def test_the_tokenizer_fills_the_vocabulary(written: Path, tmp_path: Path, vocabulary: int) -> None:
    shutil.copytree(written / "base", tmp_path / "base")
    write_tokenizer(tmp_path / "base", vocabulary)
    exported = extend_tokenizer(tmp_path / "base", vocabulary, NEW_TOKENS)
    base = open_internvl3(tmp_path / "base")
    base.text_config.vocab_size = vocabulary
    theirs = load_tokenizer(base)
    assert exported.get_vocab_size() == len(theirs) == vocabulary + 5
    text = f"<|im_start|>user\n<img><IMG_CONTEXT></img>\n{QUESTION} Gefäß, 血管: it's 12.\n\n [SEG]<|im_end|>"
    ids = exported.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode(text)
    assert exported.decode(ids, skip_special_tokens=False) == text
    assert all(token_id(token, vocabulary) == exported.token_to_id(token) for token in ADDED_TOKENS)
    if vocabulary == 151_674:  # InternVL3-8B's own ids
        real = {
            "<|endoftext|>": 151_643,
            "<|im_end|>": 151_645,
            "<img>": 151_665,
            "<IMG_CONTEXT>": 151_667,
            "[SEG]": 151_674,
            "\u010a": 198,
        }
        assert {token: exported.token_to_id(token) for token in real} == real


def test_the_answer_is_one_mask(reference: Reference) -> None:
    result = reference.segment(_image(), QUESTION, max_new_tokens=8)
    assert result.answer == "[SEG]<|im_end|>"
    assert result.masks.any()
    assert not result.masks.all()
    assert result.prediction.low_res_logits.isfinite().all()


def _image() -> Image.Image:
    return Image.effect_noise((112, 112), 80).convert("RGB")


@dataclasses.dataclass
class Peaks:
    """Largest magnitudes of one image and question: after SwiGLU and of the residual stream by token, raw Q K^T, fc2 and ViT's residual."""

    ids: torch.Tensor
    swiglu: list[torch.Tensor]
    residual: list[torch.Tensor]
    qk: list[float]
    fc2: list[torch.Tensor]
    vision_residual: list[torch.Tensor]


def _peaks(reference: Reference) -> Peaks:
    """Run the vision encoder and the language model, listening."""
    embeds = reference.encode_tiles(torch.zeros(1, 3, 112, 112))
    peaks = Peaks(reference.prompt_ids(QUESTION, embeds.shape[1]), [], [], [], [], [])
    model, config = reference.language_model.get_base_model().model, MODEL.language

    def by_token(value: torch.Tensor) -> torch.Tensor:
        return value.abs().amax(-1)[0]

    def rotated(value: torch.Tensor, heads: int) -> torch.Tensor:
        split = value.reshape(1, -1, heads, config.head_dim).transpose(1, 2)
        cos, sin = model.rotary_emb(value, torch.arange(value.shape[1])[None])
        halves = torch.cat([-split[..., config.head_dim // 2 :], split[..., : config.head_dim // 2]], -1)
        return split * cos[:, None] + halves * sin[:, None]

    def attention(module: torch.nn.Module, _arguments: object, keywords: dict[str, torch.Tensor]) -> None:
        x = keywords["hidden_states"]
        q, k = rotated(module.q_proj(x), config.heads), rotated(module.k_proj(x), config.kv_heads)
        peaks.qk.append(float((q @ k.repeat_interleave(config.heads // config.kv_heads, 1).mT).abs().max()))

    hooks = []
    for layer in model.layers:
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: peaks.swiglu.append(by_token(given[0]))))
        hooks.append(layer.register_forward_hook(lambda _module, _given, out: peaks.residual.append(by_token(out))))
        hooks.append(layer.self_attn.register_forward_pre_hook(attention, with_kwargs=True))
    for layer in reference.vision_model.encoder.layer:
        hooks.append(layer.mlp.fc2.register_forward_hook(lambda _module, _given, out: peaks.fc2.append(by_token(out))))
        hooks.append(layer.register_forward_hook(lambda _module, _given, out: peaks.vision_residual.append(by_token(out))))
    reference.encode_tiles(torch.zeros(1, 3, 112, 112))
    hidden, _ = reference.run_language_model(reference.embed(peaks.ids, embeds))
    assert hidden.isfinite().all()
    for hook in hooks:
        hook.remove()
    return peaks


def test_outliers_are_where_they_are_planted(reference: Reference) -> None:
    peaks = _peaks(reference)
    starts = peaks.ids == token_id("<|im_start|>", VOCABULARY)
    assert starts.sum() == 2
    assert peaks.swiglu[0][starts].min() > FP16_MAX
    assert peaks.swiglu[0][~starts].max() < 100
    assert all(layer[starts].min() > 1.8e5 and layer[starts].max() < 2.2e5 for layer in peaks.residual)  # to the end
    assert all(layer[~starts].max() < 100 for layer in peaks.residual)
    assert all(FP16_MAX < peak < 1e5 for peak in peaks.qk)
    assert peaks.fc2[0][0] > FP16_MAX
    assert peaks.fc2[0][1:].max() < 100
    assert all(2e3 < layer[0] < 4e3 and layer[1:].max() < 100 for layer in peaks.vision_residual)


def test_they_are_more_than_half_precision_holds(written: Path) -> None:
    half = Reference.load(written / "iter_12192.pth", written / "base", written / "sam2_hiera_short.pt", dtype=torch.float16)
    embeds = half.encode_tiles(torch.zeros(1, 3, 112, 112, dtype=torch.float16))
    ids = half.prompt_ids(QUESTION, embeds.shape[1])
    hidden, _ = half.run_language_model(half.embed(ids, torch.zeros_like(embeds)))
    assert not embeds.isfinite().all()
    assert not hidden.isfinite().all()


def test_without_outliers_everything_is_ordinary(written: Path, tmp_path: Path) -> None:
    write_synth(tmp_path / "plain", MODEL)
    paths = (tmp_path / "plain" / name for name in ("iter_12192.pth", "base", "sam2_hiera_short.pt"))
    peaks = _peaks(Reference.load(*paths))
    assert max(float(layer.max()) for layer in (*peaks.swiglu, *peaks.residual, *peaks.fc2, *peaks.vision_residual)) < 100
    assert max(peaks.qk) < 1000


def test_a_folder_with_something_in_it_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["--out", str(tmp_path), "--layers", "1"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: " in line
    assert "--out" in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_synth(tmp_path / "out", MODEL)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert (tmp_path / "out" / "iter_12192.pth").is_file()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))


@pytest.mark.usefixtures("full_disk")
def test_too_small_a_disk(tmp_path: Path) -> None:
    with pytest.raises(SynthError, match=r"0\.0 GB free, this takes"):
        write_synth(tmp_path / "out", full_size(1))
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object, **_keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synth, "save_checkpoint", fails)
    with pytest.raises(OSError, match="No space"):
        write_synth(tmp_path / "out", MODEL)
    assert not list(tmp_path.iterdir())

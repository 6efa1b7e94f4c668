"""The bundle as a folder: complete or not there, the same bytes each time, readable by other tools; and the export's bad inputs."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.disks import limited_files
from tests.support.paths import ROOT
from tests.support.small_models import fine_tuned_state, write_checkpoint
from vessel_export.bundle import bundle_writer
from vessel_export.bundle.bundle_writer import ExportRequest, export_bundle
from vessel_export.cli import main
from vessel_export.errors import BaseModelError, CheckpointError
from vessel_export.io.files import staging
from vessel_export.io.safetensors_writer import OutputTensor, in_pieces, write_safetensors
from vessel_export.sources.base_model import open_base
from vessel_rt.device.deployment import deploy
from vessel_rt.device.providers import Device
from vessel_rt.errors import RecipeError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.recipe import LanguageModelRecipe
from vessel_rt.model.segmenter import Segmenter


@pytest.mark.parametrize("small_bundle", ["small_fp32", pytest.param("small_fp16", marks=pytest.mark.slow)], indirect=True)
def test_the_same_bytes_each_time(small: ExportRequest, small_bundle: Path, tmp_path: Path) -> None:
    """Exported again, and traced again in another process."""
    precision = Bundle.load(small_bundle).precision
    again = export_bundle(
        dataclasses.replace(small, out=tmp_path / "again", recipe=msgspec.structs.replace(small.recipe, precision=precision))
    ).bundle
    assert again.files == Bundle.load(small_bundle).files


def test_every_file_is_recorded_and_hidden_nothing(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    bundle.verify_files()
    on_disk = {path.relative_to(small_bundle).as_posix() for path in small_bundle.rglob("*") if path.is_file()}
    assert on_disk == {*bundle.files, "bundle.json"}
    assert not list(small_bundle.parent.glob(".*"))
    assert str(ROOT) not in "".join(path.read_bytes().decode("latin-1") for path in small_bundle.glob("*.onnx"))


def test_weights_are_plain_safetensors_and_graphs_point_into_them(small_bundle: Path) -> None:
    for file in small_bundle.glob("*.onnx"):
        bare, whole = onnx.load(file, load_external_data=False), onnx.load(file)
        loaded = {}
        for initializer, bound in zip(whole.graph.initializer, bare.graph.initializer, strict=True):
            if bound.data_location != onnx.TensorProto.EXTERNAL:
                continue
            location = next(entry.value for entry in bound.external_data if entry.key == "location")
            tensors = loaded.setdefault(location, load_file(small_bundle / location))
            assert np.array_equal(onnx.numpy_helper.to_array(initializer), tensors[initializer.name].numpy()), initializer.name
        assert loaded, file


def test_every_tensor_is_aligned_to_its_own_size(small_bundle: Path) -> None:
    for file in (small_bundle / "weights").iterdir():
        header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + header_bytes])
        assert (8 + header_bytes) % 4096 == 0
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            size = end - begin
            assert begin % (size & -size) == 0, name


MEMORY = ("weights/sam2_memory_encoder.safetensors", "weights/sam2_memory_attention.safetensors")
DECODERS = ("weights/sam2_mask_decoder.safetensors", "weights/sam2_tracking_decoder.safetensors")
SAM2 = ("weights/sam2_image_encoder.safetensors", *DECODERS, *MEMORY)
FROZEN = ("weights/vision_model.safetensors", "weights/sam2_image_encoder.safetensors", *MEMORY)


@pytest.fixture
def following(small: ExportRequest, small_fp32: Path, tmp_path: Path) -> ExportRequest:
    """A request for another checkpoint of the same run, with its bundle next to a copy of the first, `iter_12192`."""
    shutil.copytree(small_fp32, tmp_path / "iter_12192")
    state = {name: tensor * 1.5 for name, tensor in fine_tuned_state().items()}
    return dataclasses.replace(small, checkpoint=write_checkpoint(tmp_path / "iter_10000.pth", state), out=tmp_path / "iter_10000")


@pytest.mark.usefixtures("traced_once")
def test_what_training_freezes_is_not_written_again(following: ExportRequest) -> None:
    export = export_bundle(following)
    first, second = Bundle.load(following.out.with_name("iter_12192")), export.bundle
    assert export.reused_files == FROZEN
    assert all((second.folder / name).samefile(first.folder / name) for name in FROZEN)
    assert first.files["sam2_image_encoder.onnx"] == second.files["sam2_image_encoder.onnx"]
    frozen = sum(second.files[name].bytes for name in FROZEN)
    assert export.bytes_written == sum(record.bytes for record in second.files.values()) - frozen
    second.verify_files()
    shutil.rmtree(first.folder)
    with Segmenter(deploy(Bundle.load(following.out), Device("cpu"))) as segmenter:  # ONNX Runtime takes the links, and outlives the first
        segmenter.segment(Image.new("RGB", (64, 64)), "Please segment vessel in this image.")


@pytest.mark.usefixtures("traced_once")
def test_the_whole_bundle_again_writes_no_weights(small: ExportRequest, small_fp32: Path, tmp_path: Path) -> None:
    shutil.copytree(small_fp32, tmp_path / "bundle")
    export = export_bundle(dataclasses.replace(small, out=tmp_path / "bundle", overwrite=True))
    weights = [name for name in export.bundle.files if name.endswith(".safetensors")]
    assert sorted(export.reused_files) == sorted(weights)
    assert export.bytes_written == sum(record.bytes for name, record in export.bundle.files.items() if name not in weights)
    export.bundle.verify_files()


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_bundles_share_what_training_freezes(small: ExportRequest, small_fp32: Path, tmp_path: Path, weights: str) -> None:
    """With one another InternViT too; with an unquantized one what is not quantized."""
    shutil.copytree(small_fp32, tmp_path / "whole")
    request = dataclasses.replace(small, recipe=msgspec.structs.replace(small.recipe, weights=weights), out=tmp_path / "first")
    first = export_bundle(request)
    assert first.reused_files == ("weights/embed_tokens.safetensors", *(SAM2 if weights == "int4" else SAM2[1:]))
    state = {name: tensor * 1.5 for name, tensor in fine_tuned_state().items()}
    later = write_checkpoint(tmp_path / "iter_10000.pth", state)
    second = export_bundle(dataclasses.replace(request, checkpoint=later, out=tmp_path / "second"))
    assert second.reused_files == FROZEN
    assert (tmp_path / "second" / FROZEN[0]).samefile(tmp_path / "first" / FROZEN[0])
    again = export_bundle(dataclasses.replace(request, out=tmp_path / "again"))
    assert again.bundle.files == first.bundle.files
    shutil.rmtree(tmp_path / "first")
    with Segmenter(deploy(second.bundle, Device("cpu"))) as segmenter:  # ONNX Runtime takes the links
        segmenter.segment(Image.new("RGB", (64, 64)), "Please segment vessel in this image.")


def test_a_quantized_bundle_lists_every_matrix(small_int8: Path) -> None:
    bundle = Bundle.load(small_int8)
    assert (bundle.precision, bundle.weights) == ("fp32", "int8")
    assert bundle.quantization
    matrices = bundle.quantization.matrices
    assert matrices.keys() == {"vision_encoder", "language_model", "sam2_image_encoder"}
    assert matrices["language_model"]["layers.1.mlp.down_proj.weight"] == 16  # 80 rows
    assert matrices["language_model"]["lm_head.weight"] == 16  # 48 rows
    assert matrices["vision_encoder"]["vision_model.layers.0.mlp.fc2.weight"] == 64
    blocks = "sam2_image_encoder.image_encoder.trunk.blocks."
    assert matrices["sam2_image_encoder"][f"{blocks}3.attn.qkv.weight"] == 64  # all rows
    assert {name.removeprefix(blocks)[0] for name in matrices["sam2_image_encoder"]} == {"2", "3", "4"}
    kept = bundle.quantization.kept.keys() - {"sam2_mask_decoder"}
    assert {name.removeprefix(blocks)[0] for name in kept} == {"0", "1"}
    for stage in bundle.stages.values():
        graph = onnx.load(small_int8 / stage.file, load_external_data=False).graph
        integers = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
        stored = {tensor.name for tensor in graph.initializer if tensor.data_type in integers and tensor.external_data}
        assert stored == set(matrices.get(stage.file.removesuffix(".onnx"), {}))


@pytest.mark.usefixtures("traced_once")
def test_gpus_and_int4_keep_sam2_as_it_is(small: ExportRequest, tmp_path: Path) -> None:
    for precision, weights in (("fp16", "int8"), ("fp32", "int4")):
        recipe = msgspec.structs.replace(small.recipe, precision=precision, weights=weights)
        quantization = export_bundle(dataclasses.replace(small, recipe=recipe, out=tmp_path / precision)).bundle.quantization
        assert quantization
        assert set(quantization.kept) == {"sam2_image_encoder", "sam2_mask_decoder"}


def test_bf16_has_too_few_digits_for_scales(small: ExportRequest, tmp_path: Path) -> None:
    recipe = msgspec.structs.replace(small.recipe, precision="bf16", weights="int8")
    with pytest.raises(RecipeError, match=r"int8.*fp32 and fp16"):
        export_bundle(dataclasses.replace(small, recipe=recipe, out=tmp_path / "b"))


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("position", [9, -1], ids=["first bytes", "last byte"])
def test_a_damaged_neighbour_is_not_taken_for_equal(following: ExportRequest, small_fp32: Path, position: int) -> None:
    """Its bundle.json still promises the hash: only the bytes tell."""
    damaged = following.out.with_name("iter_12192") / FROZEN[0]
    content = bytearray(damaged.read_bytes())
    content[position] ^= 1
    damaged.write_bytes(content)
    export = export_bundle(following)
    assert export.reused_files == FROZEN[1:]
    assert export.bundle.files[FROZEN[0]] == Bundle.load(small_fp32).files[FROZEN[0]]
    export.bundle.verify_files()


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_keywords: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    tensors = [OutputTensor("a", (3, 5), torch.float16, lambda: in_pieces(torch.arange(15).reshape(3, 5)))]
    first = write_safetensors(tmp_path, "first.safetensors", tensors)
    monkeypatch.setattr(os, "link", refuse)
    second = write_safetensors(tmp_path, "second.safetensors", tensors, older=tmp_path / "first.safetensors")
    assert (second.bytes_written, second.sha256) == (first.bytes, first.sha256)
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_at_any_moment(following: ExportRequest) -> None:
    """Killed early, midway and late: the older bundle stays whole, no half-written one appears, the next run completes."""
    folder = following.out.parent
    command = [
        Path(sys.executable).with_name("vessel-export"),
        "export",
        "--no-golden",
        "--recipe",
        "engines/cpu.toml",
        "--out",
        str(following.out),
    ]
    command += ["--ckpt", str(following.checkpoint), "--base", following.base, "--sam2", following.sam2]
    for appearing in (
        ".iter_10000.partial/weights",
        ".iter_10000.partial/weights/projector.safetensors",
        ".iter_10000.partial/*.onnx",
    ):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while not list(folder.glob(appearing)):
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert not following.out.exists()
        Bundle.load(folder / "iter_12192").verify_files()
    export_bundle(following).bundle.verify_files()
    assert sorted(path.name for path in folder.iterdir()) == ["iter_10000", "iter_10000.pth", "iter_12192"]


@pytest.mark.usefixtures("traced_once")
def test_the_native_layout_gives_the_same_bundle(small: ExportRequest, small_fp32: Path, tmp_path: Path) -> None:
    native = _to_native_layout(Path(small.base), tmp_path / "base-hf")
    exported = export_bundle(dataclasses.replace(small, base=str(native), out=tmp_path / "b")).bundle
    assert exported.files == Bundle.load(small_fp32).files


def _to_native_layout(original: Path, folder: Path) -> Path:
    """As transformers' conversion of InternVL3 writes it: renamed, Q, K and V apart, `<video>` added to the tokenizer."""
    shutil.copytree(original, folder)
    tensors = {}
    for name, tensor in load_file(original / "model.safetensors").items():
        name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
        for index, layer in (("0", "layer_norm"), ("1", "linear_1"), ("3", "linear_2")):
            name = name.replace(f"mlp1.{index}.", f"model.multi_modal_projector.{layer}.")
        if name.startswith("vision_model."):
            pairs = [("vision_model", "model.vision_tower"), ("layers", "layer"), ("class_embedding", "cls_token")]
            pairs += [("position_embedding", "position_embeddings"), ("patch_embedding", "patch_embeddings.projection")]
            pairs += [("ls1", "lambda_1"), ("ls2", "lambda_2"), ("attn.proj", "attention.projection_layer"), ("attn", "attention")]
            pairs += [("norm1", "layernorm_before"), ("norm2", "layernorm_after")]
            for old, new in pairs:
                name = name.replace(old, new)
        if "attention.qkv" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                tensors[name.replace("attention.qkv", f"attention.{part}_proj")] = piece.contiguous()
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    vision, text = config["vision_config"], config.pop("llm_config")
    vision |= {"image_size": [vision["image_size"]] * 2, "patch_size": [vision["patch_size"]] * 2}
    vision |= {"attention_bias": vision.pop("qkv_bias"), "use_qk_norm": vision.pop("qk_normalization")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    del text["rope_scaling"], config["force_image_size"], config["select_layer"], config["ps_version"]
    config |= {"text_config": text, "vision_feature_layer": -1, "model_type": "internvl"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    video = {**tokenizer["added_tokens"][-1], "id": text["vocab_size"], "content": "<video>"}
    tokenizer["added_tokens"].append(video)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_shards_are_read_as_one(small: ExportRequest, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(small.base, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    base = open_base(str(folder))
    assert all(torch.equal(base.tensor(name), tensor) for name, tensor in tensors.items())
    with safe_open(folder / "model-00001-of-00002.safetensors", "pt") as shard:
        assert set(shard.keys()) == set(names[::2])


def test_an_output_folder_that_exists_is_kept(small: ExportRequest, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match=re.escape(f"{out}: exists")):
        export_bundle(dataclasses.replace(small, out=out))
    assert (out / "mine.txt").read_text() == "keep"


def test_overwrite_never_takes_a_folder_that_is_no_bundle(small: ExportRequest, tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "rtx3090.toml").write_text("precision = 'fp16'")
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'engines'}: not a bundle")):
        export_bundle(dataclasses.replace(small, out=tmp_path / "engines", overwrite=True))
    assert (tmp_path / "engines" / "rtx3090.toml").exists()


def test_a_run_killed_between_its_renames_loses_nothing(small_fp32: Path, tmp_path: Path) -> None:
    shutil.copytree(small_fp32, tmp_path / ".bundle.old")
    with pytest.raises(KeyboardInterrupt), staging(tmp_path / "bundle"):
        raise KeyboardInterrupt
    Bundle.load(tmp_path / "bundle").verify_files()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_base_cut_short(small: ExportRequest, tmp_path: Path, file: str) -> None:
    shutil.copytree(small.base, tmp_path / "base")
    path = tmp_path / "base" / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BaseModelError, match=re.escape(file)):
        export_bundle(dataclasses.replace(small, base=str(tmp_path / "base"), out=tmp_path / "b"))


def test_a_configuration_of_another_size(small: ExportRequest, tmp_path: Path) -> None:
    shutil.copytree(small.base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["vision_config"]["intermediate_size"] *= 2
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=r"mlp\.fc1\.weight is \(32, 64\), .*config\.json"):
        export_bundle(dataclasses.replace(small, base=str(tmp_path / "base"), out=tmp_path / "b"))
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("traced_once")
def test_overwrite_replaces_only_when_complete(small: ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = dataclasses.replace(small, out=tmp_path / "bundle", overwrite=True)
    before = export_bundle(request).bundle

    def full_disk(*_arguments: object, **_keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_writer, "save_graph", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_bundle(request)
    Bundle.load(request.out).verify_files()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    monkeypatch.undo()
    (tmp_path / ".bundle.partial").mkdir()  # as a killed run leaves it
    assert export_bundle(request).bundle.files == before.files
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def command_of(request: ExportRequest) -> list[str]:
    """The command line of `request`, but for --out."""
    sources = ["--ckpt", str(request.checkpoint), "--base", request.base, "--sam2", request.sam2]
    return ["export", "--no-golden", *sources, "--recipe", "engines/cpu.toml"]


@pytest.mark.usefixtures("traced_once")
def test_a_disk_that_is_full_leaves_nothing(small: ExportRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command_of(small)
    with limited_files(tmp_path / "disk") as disk, disk.full(10_000):
        assert main([*arguments, "--out", str(disk.folder / "b")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vessel-export: error: ")
    assert disk.message in line
    assert not list(disk.folder.iterdir())


@pytest.mark.usefixtures("traced_once")
def test_a_weight_beyond_float16(small: ExportRequest, tmp_path: Path) -> None:
    state = fine_tuned_state()
    state["mllm.model.mlp1.1.bias"][0] = 1e5
    checkpoint = write_checkpoint(tmp_path / "wide.pth", state)
    request = dataclasses.replace(
        small, checkpoint=checkpoint, out=tmp_path / "b", recipe=msgspec.structs.replace(small.recipe, precision="fp16")
    )
    with pytest.raises(CheckpointError, match=r"projector\.linear_1\.bias .*float16"):
        export_bundle(request)


@pytest.mark.usefixtures("traced_once")
def test_alpha_has_to_come_from_somewhere(small: ExportRequest, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "silent.pth", fine_tuned_state(), alpha=None)
    request = dataclasses.replace(small, checkpoint=checkpoint, out=tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"silent\.pth: .*--lora-alpha .*2 r = 8"):
        export_bundle(request)
    assert export_bundle(dataclasses.replace(request, lora_alpha=8)).bundle.provenance.lora_alpha == 8


@pytest.mark.usefixtures("traced_once")
def test_an_unknown_tensor_can_be_left_out_by_name(small: ExportRequest, tmp_path: Path) -> None:
    state = fine_tuned_state() | {"ema.steps": torch.ones(1)}
    request = dataclasses.replace(small, checkpoint=write_checkpoint(tmp_path / "more.pth", state), out=tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"ema.steps is unknown.*--skip NAME"):
        export_bundle(request)
    with pytest.raises(CheckpointError, match=r"ema\.step; correct --skip"):
        export_bundle(dataclasses.replace(request, skip=("ema.step",)))
    assert export_bundle(dataclasses.replace(request, skip=("ema.steps",))).bundle.provenance.skipped == ("ema.steps",)


def test_a_base_without_tokenizer(small: ExportRequest, tmp_path: Path) -> None:
    shutil.copytree(small.base, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(BaseModelError, match="no tokenizer"):
        export_bundle(dataclasses.replace(small, base=str(tmp_path / "base"), out=tmp_path / "b"))


def test_a_base_that_is_not_whole(small: ExportRequest, tmp_path: Path) -> None:
    shutil.copytree(small.base, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["vision_model.encoder.layers.1.ls2"]
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"lacks vision_model.encoder.layers.1.ls2"):
        export_bundle(dataclasses.replace(small, base=str(tmp_path / "base"), out=tmp_path / "b"))


@pytest.mark.parametrize(("flag", "spec"), [("base", "OpenGVLab/InternVL3-8B"), ("sam2", "facebook/sam2-hiera-large")])
def test_offline_names_the_flag(small: ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, spec: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    request = dataclasses.replace(small, out=tmp_path / "b", **{flag: spec})
    with pytest.raises(BaseModelError, match=f"{spec}: .*--{flag}"):
        export_bundle(request)


def test_a_configuration_that_would_run_code(small: ExportRequest, tmp_path: Path) -> None:
    shutil.copy(small.sam2, tmp_path / "evil.pt")
    (tmp_path / "evil.yaml").write_text("model:\n  _target_: os.system\n  command: touch was_run\n")
    with pytest.raises(BaseModelError, match=r"os\.system"):
        export_bundle(dataclasses.replace(small, sam2=str(tmp_path / "evil.pt"), out=tmp_path / "b"))


def test_a_capacity_too_small(small: ExportRequest, tmp_path: Path) -> None:
    request = dataclasses.replace(
        small, out=tmp_path / "b", recipe=msgspec.structs.replace(small.recipe, language_model=LanguageModelRecipe(600, 512))
    )
    with pytest.raises(RecipeError, match=r"capacity is 600; .*976"):
        export_bundle(request)


@pytest.mark.usefixtures("traced_once")
def test_command_line(small: ExportRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = command_of(small)
    assert main([*arguments, "--out", str(tmp_path / "b"), "--precision", "fp16"]) == 0
    assert Bundle.load(tmp_path / "b").precision == "fp16"
    assert main([*arguments, "--out", str(tmp_path / "b")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("vessel-export: error: ")
    with pytest.raises(SystemExit) as usage:
        main(["export", "--precision", "int3"])
    assert usage.value.code == 2
    assert main(["export", "--ckpt", str(tmp_path / "none.pth"), "--recipe", "engines/cpu.toml"]) == 1
    assert "none.pth" in capsys.readouterr().err

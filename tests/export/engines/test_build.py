"""Engines built for an RTX 3090 on any machine: complete, recorded exactly, never half written, reused only if everything matches.

Nothing here runs an engine. The tiny model's take some seconds; the widths of the real one (`full_width`) take minutes and gigabytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from tests.support.paths import ROOT, Tiny
from vessel_export.bundle.bundle_writer import ExportRequest, export_bundle
from vessel_export.cli import main
from vessel_export.engines.build import Build, build_engines
from vessel_export.engines.partition import EP_CONTEXT
from vessel_export.engines.request import BuildRequest
from vessel_export.engines.rtx_compiler import compile_graph
from vessel_export.engines.stub_gpu import ARCHITECTURES, stub_provider
from vessel_export.sources.checkpoint import open_checkpoint
from vessel_rt.device.cuda_driver import list_gpus
from vessel_rt.errors import BundleError, EngineError, RecipeError, VesselError
from vessel_rt.formats.bundle import CINE_STAGES, STAGES, Bundle
from vessel_rt.formats.engine_sidecar import Engine, EngineSet, Target, builder_version
from vessel_rt.formats.profiles import Profile
from vessel_rt.formats.recipe import Recipe, load_recipe
from vessel_rt.io.checked_files import sha256_of

FROZEN_STAGES = ("sam2_image_encoder", "sam2_memory_encoder", "sam2_memory_attention")
FROZEN = tuple(f"weights/{name}.safetensors" for name in ("vision_model", *FROZEN_STAGES))
RECIPE = ROOT / "engines" / "rtx3090.toml"
SMALL = "sam2_mask_decoder", "vision_encoder"  # the quickest to build


def _obstacle() -> str | None:
    if sys.platform != "linux":
        return "stub GPUs work on Linux only"
    if builder_version("rtx") is None:
        return "TensorRT-RTX is not installed"
    return None if shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") else "there is no C compiler"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(_obstacle() is not None, reason=str(_obstacle()))]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(RECIPE)


def _request(bundle: Path, recipe: Recipe, *stages: str, rebuild: bool = False) -> BuildRequest:
    return BuildRequest(bundle, recipe, stub_gpu="sm86", stages=stages or None, rebuild=rebuild)


@pytest.fixture(scope="module")
def built(fp16_bundle: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with all its engines; not to be changed."""
    bundle = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(fp16_bundle, bundle)
    builds = build_engines(_request(bundle, recipe))
    assert [build.engine.stage for build in builds] == [*STAGES, *CINE_STAGES]
    assert all(build.seconds is not None for build in builds)
    return bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Iterator[Path]:
    """The same, to be changed."""
    copy = shutil.copytree(built, tmp_path / "bundle")
    yield copy
    shutil.rmtree(copy)  # tens of megabytes for each test


def _engines(bundle: Path) -> Path:
    return bundle / "engines" / "rtx-sm86"


def _target() -> Target:
    return Target("rtx", "sm86", str(builder_version("rtx")))


def _check_whole(folder: Path, engines: EngineSet) -> None:
    """Every graph became engines and nothing else, and looks the same from outside."""
    for stage, engine in engines.engines.items():
        graph = onnx.load(folder / f"{stage}.onnx", load_external_data=False).graph
        wrapper = onnx.load(engines.folder / f"{stage}.onnx", load_external_data=False).graph
        assert {node.op_type for node in wrapper.node} == {EP_CONTEXT}
        assert (list(wrapper.input), list(wrapper.output)) == (list(graph.input), list(graph.output))
        files = [attribute.s.decode() for node in wrapper.node for attribute in node.attribute if attribute.name == "ep_cache_context"]
        assert sorted([*files, f"{stage}.onnx"]) == sorted(engine.files)
        assert all(engine.files[file].bytes > 10_000 for file in files)


def test_every_stage_compiles_whole(built: Path, recipe: Recipe) -> None:
    bundle = Bundle.load(built)
    engines = EngineSet.open(bundle, _target())
    engines.verify()
    _check_whole(built, engines)
    assert recipe.engines is not None
    assert len(engines.engines["language_model"].files) - 1 == min(recipe.engines.language_model_partitions, bundle.language_model.layers)
    assert [path.name for path in (built / "engines").iterdir()] == ["rtx-sm86"]
    files = {f"{stage}.json" for stage in engines.engines} | engines.files.keys()
    assert {path.name for path in engines.folder.iterdir()} == files
    assert Bundle.load(built).files.keys() == bundle.files.keys()


def _quantized(weights: str) -> Recipe:
    return msgspec.structs.replace(load_recipe("rtx3090-int8"), weights=weights)


def test_engines_of_cines_are_not_needed_for_frames(bundle: Path) -> None:
    (_engines(bundle) / "sam2_memory_attention.json").unlink()
    assert EngineSet.open(Bundle.load(bundle), _target()).engines.keys() == set(STAGES)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_stages_compile_whole(tiny: Tiny, weights: str, tmp_path: Path) -> None:
    recipe = _quantized(weights)
    bundle = export_bundle(ExportRequest(tiny.checkpoint, str(tiny.base), str(tiny.sam2), tmp_path / "bundle", recipe)).bundle
    build_engines(_request(bundle.folder, recipe))
    engines = EngineSet.open(bundle, _target())
    _check_whole(bundle.folder, engines)


def test_what_a_sidecar_says(built: Path, recipe: Recipe) -> None:
    assert recipe.engines is not None
    batch = recipe.engines.max_batch
    engine, bundle = Engine.load(_engines(built) / "vision_encoder.json"), Bundle.load(built)
    assert (engine.builder, engine.architecture, engine.gpu, engine.precision) == ("rtx", "sm86", "NVIDIA GeForce RTX 3090", "fp16")
    names = ("vision_encoder.onnx", "weights/projector.safetensors", "weights/vision_model.safetensors")
    assert engine.sources == {name: bundle.files[name].sha256 for name in names}
    assert engine.profile == {"pixel_values": f"1x3x448x448, 1x3x448x448, {13 * batch}x3x448x448"}
    assert engine.versions == {"rtx": builder_version("rtx"), "onnxruntime": engine.versions["onnxruntime"], "driver": None}
    cache = Engine.load(_engines(built) / "language_model.json").profile["past_key.0"]
    sizes = bundle.language_model
    assert cache.endswith(f", {batch}x{sizes.kv_heads}x{sizes.capacity}x{sizes.head_dim}")


def test_engines_that_are_up_to_date_are_not_built(
    bundle: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in _engines(bundle).iterdir()}
    monkeypatch.setenv("PATH", "")  # no compiler is looked for when nothing is built
    assert main(["build", "--bundle", str(bundle), "--recipe", str(RECIPE), "--describe", "sm86"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len((*STAGES, *CINE_STAGES))
    assert all(re.fullmatch(r"rtx-sm86/\w+: up to date, [\d.]+ MB(, \d partitions)?", line) for line in lines), lines
    assert {path.name: path.stat().st_mtime_ns for path in _engines(bundle).iterdir()} == before
    assert all(build.seconds is None for build in build_engines(_request(bundle, recipe, rebuild=True)))


def test_only_what_is_missing_is_built(bundle: Path, recipe: Recipe) -> None:
    (_engines(bundle) / "sam2_mask_decoder.json").unlink()  # without a sidecar it is no engine
    builds = build_engines(_request(bundle, recipe))
    assert [build.engine.stage for build in builds if build.seconds is not None] == ["sam2_mask_decoder"]
    EngineSet.open(Bundle.load(bundle), _target()).verify()


def test_killed_halfway(bundle: Path, recipe: Recipe) -> None:
    """What was finished stays, nothing is half there, no compiler is left behind, and the next build goes on."""
    shutil.rmtree(bundle / "engines")
    command = [Path(sys.executable).with_name("vessel-export"), "build", "--bundle", bundle, "--recipe", RECIPE, "--describe", "sm86"]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    compiling = bundle / "engines" / ".rtx-sm86.partial" / "language_model" / ".language_model.1.engine.compiler"
    while not compiling.exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    for child in children:
        while Path(f"/proc/{child}").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
            time.sleep(0.01)
    assert sorted(path.name for path in _engines(bundle).glob("*.json")) == ["vision_encoder.json"]
    assert not list(_engines(bundle).glob("language_model*"))
    builds = build_engines(_request(bundle, recipe))
    assert [build.engine.stage for build in builds if build.seconds is None] == ["vision_encoder"]
    assert [path.name for path in (bundle / "engines").iterdir()] == ["rtx-sm86"]
    EngineSet.open(Bundle.load(bundle), _target()).verify()


def test_two_builds_at_once(bundle: Path, recipe: Recipe) -> None:
    import fcntl  # not on Windows, where this file is skipped

    (_engines(bundle) / "sam2_mask_decoder.json").unlink()
    handle = os.open(_engines(bundle), os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(VesselError, match=re.escape(f"{_engines(bundle)}: ")):
        build_engines(_request(bundle, recipe))
    os.close(handle)
    build_engines(_request(bundle, recipe))


def _flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _rebuilt(bundle: Path, recipe: Recipe) -> list[str]:
    builds: list[Build] = build_engines(_request(bundle, recipe, *SMALL, rebuild=True))
    EngineSet.open(Bundle.load(bundle), _target()).verify()
    return [build.engine.stage for build in builds if build.seconds is not None]


def test_a_flipped_byte(bundle: Path, recipe: Recipe) -> None:
    _flip_a_byte(_engines(bundle) / "vision_encoder.engine")
    fault = r"vision_encoder: vision_encoder.engine was changed .*; --rebuild"
    with pytest.raises(EngineError, match=fault):
        build_engines(_request(bundle, recipe))
    assert _rebuilt(bundle, recipe) == ["vision_encoder"]


def test_another_export(bundle: Path, recipe: Recipe) -> None:
    weights = bundle / "weights" / "projector.safetensors"
    _flip_a_byte(weights)
    document = json.loads((bundle / "bundle.json").read_text())
    document["files"]["weights/projector.safetensors"]["sha256"] = sha256_of(weights)
    (bundle / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(EngineError, match=r"vision_encoder: it was built from another weights/projector.safetensors; --rebuild"):
        build_engines(_request(bundle, recipe))
    assert _rebuilt(bundle, recipe) == ["vision_encoder"]


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("architecture", "sm89", "for sm89, not by rtx for sm86"),
        ("versions", {"rtx": "1.6.0"}, r"it was built by rtx 1\.6\.0, and"),
        ("profile", {"pixel_values": "1x3x448x448"}, "its shapes of pixel_values are 1x3x448x448, the recipe's are 1x3x448x448, "),
        ("sources", {}, "it was built from other files"),
        ("stage", "language_model", "it was built from other files"),
    ],
)
def test_a_foreign_engine(bundle: Path, recipe: Recipe, field: str, value: object, fault: str) -> None:
    sidecar = _engines(bundle) / "vision_encoder.json"
    document = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(document | {field: value}))
    with pytest.raises(EngineError, match=fault) as e:
        build_engines(_request(bundle, recipe))
    assert "\n" not in str(e.value)
    if field == "versions":
        assert _rebuilt(bundle, recipe) == ["vision_encoder"]


def test_a_sidecar_that_cannot_be_read(bundle: Path, recipe: Recipe) -> None:
    (_engines(bundle) / "vision_encoder.json").write_text("{")
    with pytest.raises(EngineError, match=r"vision_encoder.json: not an engine's description"):
        build_engines(_request(bundle, recipe))
    assert _rebuilt(bundle, recipe) == ["vision_encoder"]


def test_another_number_of_partitions(bundle: Path, recipe: Recipe) -> None:
    assert recipe.engines is not None
    whole = msgspec.structs.replace(recipe, engines=msgspec.structs.replace(recipe.engines, language_model_partitions=1))
    with pytest.raises(EngineError, match="language_model: it has 3 partitions, the recipe asks for 1"):
        build_engines(_request(bundle, whole))
    [build] = build_engines(_request(bundle, whole, "language_model", rebuild=True))
    assert sorted(build.engine.files) == ["language_model.engine", "language_model.onnx"]
    assert not list(_engines(bundle).glob("language_model.[0-9].engine")), "the older partitions are gone"


def test_what_anyone_may_write(bundle: Path, recipe: Recipe) -> None:
    (_engines(bundle) / "vision_encoder.engine").chmod(0o666)
    _engines(bundle).chmod(0o777)
    with pytest.raises(EngineError, match=r"vision_encoder.engine may be written by anyone"):
        build_engines(_request(bundle, recipe))
    umask = os.umask(0)
    try:
        build_engines(_request(bundle, recipe, rebuild=True))
    finally:
        os.umask(umask)
    for path in (_engines(bundle), *_engines(bundle).iterdir()):
        assert not path.stat().st_mode & stat.S_IWOTH, path


def test_damaged_weights_are_not_built_from(bundle: Path, recipe: Recipe) -> None:
    shutil.rmtree(bundle / "engines")
    _flip_a_byte(bundle / "weights" / "projector.safetensors")
    with pytest.raises(BundleError, match=r"damaged bundle: weights/projector.safetensors was changed"):
        build_engines(_request(bundle, recipe, "vision_encoder"))
    _flip_a_byte(bundle / "vision_encoder.onnx")
    with pytest.raises(BundleError, match=r"damaged bundle: vision_encoder.onnx was changed"):
        build_engines(_request(bundle, recipe, "vision_encoder"))
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"opt_tiles": 14}, "engines.opt_tiles is 14; an image has 13 at most"),
        ({"architecture": "sm90"}, r"architecture is sm90; .*sm86, sm89, sm120"),
    ],
)
def test_impossible_targets(built: Path, recipe: Recipe, changes: dict[str, object], fault: str) -> None:
    assert recipe.engines is not None
    engines = msgspec.structs.replace(recipe.engines, **changes)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=fault):
        build_engines(_request(built, msgspec.structs.replace(recipe, engines=engines)))


def test_recipes_that_do_not_fit_the_bundle(built: Path, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"recipe cpu: has no \[engines\]"):
        build_engines(_request(built, load_recipe(ROOT / "engines" / "cpu.toml")))
    other = msgspec.structs.replace(recipe, language_model=msgspec.structs.replace(recipe.language_model, capacity=8192))
    with pytest.raises(RecipeError, match=r"language_model.capacity is 8192, the bundle's is 4096"):
        build_engines(_request(built, other))


def _error(capsys: pytest.CaptureFixture[str], bundle: Path, *options: str) -> str:
    """What the command line says where it fails: one line."""
    assert main(["build", "--bundle", str(bundle), "--recipe", str(RECIPE), *options]) == 1
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def bare(built: Path, tmp_path: Path) -> Path:
    """A bundle without engines."""
    return shutil.copytree(built, tmp_path / "bare", ignore=shutil.ignore_patterns("engines"))


def test_what_the_command_line_refuses(bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--describe sm89: recipe rtx3090 is for sm86" in _error(capsys, bare, "--describe", "sm89")
    assert "--describe: tensorrt" in _error(capsys, bare, "--describe", "sm86", "--builder", "tensorrt")
    assert "--ampere-plus: rtx" in _error(capsys, bare, "--describe", "sm86", "--ampere-plus")
    assert "no bundle here" in _error(capsys, bare / "weights", "--describe", "sm86")
    with pytest.raises(SystemExit) as e:
        main(["build", "--bundle", str(bare), "--stage", "decoder"])
    assert e.value.code == 2
    capsys.readouterr()
    monkeypatch.setenv("PATH", "")
    assert "--describe sm86: needs a C compiler (cc, gcc, clang)" in _error(capsys, bare, "--describe", "sm86")
    assert not (bare / "engines").exists()


def test_without_a_gpu(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        gpus = list_gpus()
    except VesselError:
        assert "--describe sm86" in _error(capsys, bare)
    else:
        pytest.skip(f"there is a GPU here: {gpus[0].name}")


@pytest.mark.skipif(builder_version("tensorrt") is not None, reason="TensorRT is installed")
def test_without_tensorrt(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "pip install 'vessel-rt[tensorrt]'" in _error(capsys, bare, "--builder", "tensorrt")


def test_no_space(bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1 << 20))
    assert "0.0 GB free, its engines take about 0.1; free some" in _error(capsys, bare, "--describe", "sm86")
    assert not (bare / "engines").exists()


def _attention(**attributes: object) -> onnx.ModelProto:
    """Attention over 4 heads of 64."""
    shape = ["batch", 4, "tokens", 64]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in ("q", "k", "v", "y")]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], **attributes)
    graph = helper.make_graph([node], "attention", values[:3], values[3:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def _attention_profile() -> Profile:
    shapes = [dict.fromkeys("qkv", (size, 4, 16 * size, 64)) for size in (1, 2, 4)]
    return Profile(*shapes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_a_stub_gpu(tmp_path: Path, architecture: str) -> None:
    with stub_provider(architecture) as provider:
        compiled = compile_graph(tmp_path, architecture, provider, _attention(), _attention_profile(), tmp_path / "a.engine", lambda: None)
    assert compiled.context.attributes["ep_cache_context"] == "a.engine"
    assert [path.name for path in tmp_path.iterdir()] == ["a.engine"]


def test_a_graph_that_does_not_compile(tmp_path: Path) -> None:
    graph, profile = _attention(softmax_precision=int(TensorProto.FLOAT)), _attention_profile()
    with stub_provider("sm86") as provider, pytest.raises(EngineError) as e:
        compile_graph(tmp_path, "sm86", provider, graph, profile, tmp_path / "a.engine", lambda: None)
    assert re.match(r"a: TensorRT-RTX cannot compile it for sm86: .*Setting softmax precision is not supported", str(e.value))
    assert "\n" not in str(e.value)


def test_the_properties_of_a_device_are_where_cuda_has_them(tmp_path: Path) -> None:
    """stub_gpu.c writes to CUDA's struct without its header. If the header is installed, the two are compared."""
    include = Path("/usr/local/cuda/include")
    if not (include / "cuda_runtime_api.h").exists():
        pytest.skip("CUDA's headers are not installed")
    if not re.search(r"#define CUDART_VERSION +13", (include / "cuda_runtime_api.h").read_text()):
        pytest.skip("CUDA here is not 13, which the provider is built with")
    source = (ROOT / "export" / "vessel_export" / "engines" / "stub_gpu.c").read_text()
    constants = dict(re.findall(r"#define PROPERTIES_(\w+) (\d+)", source))
    (tmp_path / "check.c").write_text(
        "#include <stddef.h>\n#include <driver_types.h>\n"
        f'_Static_assert(sizeof(struct cudaDeviceProp) == {constants["BYTES"]}, "size");\n'
        f'_Static_assert(offsetof(struct cudaDeviceProp, major) == {constants["MAJOR"]}, "major");\n'
        f'_Static_assert(offsetof(struct cudaDeviceProp, minor) == {constants["MINOR"]}, "minor");\n'
    )
    compiler = shutil.which("cc") or shutil.which("gcc") or "clang"
    subprocess.run([compiler, "-fsyntax-only", f"-I{include}", str(tmp_path / "check.c")], check=True)


def test_the_next_checkpoint_takes_over_what_training_froze(
    bundle: Path, tiny: Tiny, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """Next to a bundle with engines: the frozen weights are not written again, and the frozen stage's engine is not built again."""
    checkpoint = bundle.with_name("iter_1100.pth")
    state = {name: tensor * 1.01 for name, tensor in open_checkpoint(tiny.checkpoint).tensors.items()}
    torch.save({"state_dict": state, "meta": {"iter": 1100}}, checkpoint)
    out = bundle.with_name("iter_1100-fp16")
    arguments = [
        "export",
        "--no-golden",
        "--ckpt",
        str(checkpoint),
        "--base",
        str(tiny.base),
        "--sam2",
        str(tiny.sam2),
        "--lora-alpha",
        "16",
    ]
    assert main([*arguments, "--recipe", str(RECIPE), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"reused: (\S+),", printed) == list(FROZEN)
    assert "reused: engine rtx-sm86/sam2_image_encoder" in printed
    assert "none built" in printed or (out / "engines").exists()
    files = Bundle.load(out).files
    written = sum(record.bytes for name, record in files.items() if name not in FROZEN)
    assert f"({written / 1e6:.1f} MB written)" in printed
    builds = build_engines(_request(out, recipe))
    assert [build.engine.stage for build in builds if build.seconds is None] == ["sam2_image_encoder", *CINE_STAGES[:2]]
    assert len(builds) == len((*STAGES, *CINE_STAGES))
    frozen = "engines/rtx-sm86/sam2_image_encoder.engine"
    assert (out / frozen).samefile(bundle / frozen)
    EngineSet.open(Bundle.load(out), _target()).verify()


@pytest.mark.full_width
def test_every_stage_compiles_whole_at_full_width(full_width: ExportRequest, recipe: Recipe) -> None:
    full_width_bundle = full_width.out
    build_engines(_request(full_width_bundle, recipe))
    engines = EngineSet.open(Bundle.load(full_width_bundle), _target())
    _check_whole(full_width_bundle, engines)
    assert len(engines.engines["language_model"].files) == 3  # two partitions and the model that chains them
    weights = sum(
        int(np.prod(tensor.dims)) * 2
        for stage in (*STAGES, *CINE_STAGES)
        for tensor in onnx.load(full_width_bundle / f"{stage}.onnx", load_external_data=False).graph.initializer
    )
    assert 0.9 < sum(record.bytes for record in engines.files.values()) / weights < 1.2


@pytest.mark.full_width
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_stages_compile_whole_at_full_width(full_width: ExportRequest, weights: str) -> None:
    recipe = _quantized(weights)
    bundle = export_bundle(dataclasses.replace(full_width, out=full_width.out.with_name(weights), recipe=recipe)).bundle
    assert recipe.engines is not None
    for most in (recipe.engines.max_batch, 1):  # other forms of int8 become FP16 if all batches have one image
        engine_recipe = msgspec.structs.replace(recipe.engines, max_batch=most)
        build_engines(_request(bundle.folder, msgspec.structs.replace(recipe, engines=engine_recipe), rebuild=True))
        engines = EngineSet.open(bundle, _target())
        _check_whole(bundle.folder, engines)
        for stage in ("vision_encoder", "language_model"):
            size = sum(record.bytes for record in engines.engines[stage].files.values())
            assert 0 <= size - bundle.weight_bytes(stage) < 32 << 20, f"{stage}: the engine does not have the integers"
    shutil.rmtree(bundle.folder)


@pytest.mark.full_width
def test_the_stages_of_cines_compile_whole_at_full_width(full_width_cines: ExportRequest, recipe: Recipe, tmp_path: Path) -> None:
    """Without the language model, which takes gigabytes: SAM2's memory behind a small trunk."""
    bundle = export_bundle(dataclasses.replace(full_width_cines, out=tmp_path / "bundle")).bundle
    builds = build_engines(_request(bundle.folder, recipe, *CINE_STAGES))
    engines = {build.engine.stage: build.engine for build in builds}
    _check_whole(bundle.folder, EngineSet(_engines(bundle.folder), engines))
    for stage in CINE_STAGES:
        size = sum(record.bytes for record in engines[stage].files.values())
        assert 0 < size - bundle.weight_bytes(stage) < 16 << 20, stage

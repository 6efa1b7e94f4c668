from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from tests.support.engine_files import write_engines
from vessel_rt.device.cuda_driver import list_gpus
from vessel_rt.device.deployment import AUTO, Deployment, check_bundle, deploy, deploy_on, deployment_fault
from vessel_rt.device.providers import PROVIDERS, Device
from vessel_rt.errors import BundleError, EngineError, VesselError
from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle, Quantization
from vessel_rt.io import checked_files
from vessel_rt.io.checked_files import sha256_of

CPU = Device("cpu")


def has_gpu() -> bool:
    try:
        return bool(list_gpus())
    except VesselError:
        return False


NO_GPU = pytest.mark.skipif(has_gpu(), reason="there is a GPU here")


@pytest.fixture
def copy(standin: Bundle, tmp_path: Path) -> Bundle:
    """A bundle that may be damaged."""
    return Bundle.load(Path(shutil.copytree(standin.folder, tmp_path / "bundle")))


def test_a_stage_is_loaded_from_its_graph(standin: Bundle) -> None:
    deployment = deploy(standin, CPU)
    assert deployment.device == CPU
    assert deployment.graphs == {name: standin.folder / stage.file for name, stage in standin.stages.items()}
    with deployment.session("sam2_image_encoder", threads=1) as session:
        assert session.run({"pixel_values": np.ones((1, 3, 64, 64), np.float32)})["fpn_0"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("kind", ["cuda", "rtx", "tensorrt"])
def test_matrices_in_a_form_for_cpus_are_not_for_gpus(standin: Bundle, kind: str) -> None:
    quantized = msgspec.structs.replace(standin, quantization=Quantization("int8", {}, {}))
    with pytest.raises(BundleError, match=r"form for CPUs: take --device cpu"):
        deploy_on(quantized, Device(kind))


def test_every_byte_is_read_once_and_told(standin: Bundle) -> None:
    told: list[tuple[int, int]] = []
    deploy(standin, CPU, lambda read, total: told.append((read, total)))
    assert {total for _, total in told} == {sum(record.bytes for record in standin.files.values())}
    assert sum(read for read, _ in told) == told[0][1]


def test_a_changed_file_is_never_loaded(copy: Bundle) -> None:
    graph = copy.folder / "language_model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(BundleError, match=r"language_model\.onnx has"):
        deploy(copy, CPU)


def test_files_that_another_process_has_checked_are_not_hashed_again(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    files = check_bundle(copy, [CPU, CPU], None)
    monkeypatch.setattr(checked_files, "_sha256", lambda *_: pytest.fail("hashed again"))
    deployment = deploy_on(copy, CPU, lambda *_: pytest.fail("read again"), files=files)
    with deployment.guarded() as verify_unchanged:
        verify_unchanged()
    os.utime(copy.folder / "tokenizer.json")
    with pytest.raises(BundleError, match=r"tokenizer\.json was changed"), deployment.guarded():
        pytest.fail("loaded")


def test_files_that_were_checked_for_other_graphs_are_not_enough(copy: Bundle) -> None:
    files = copy.verify_files(graphs=False)
    with pytest.raises(VesselError, match="not checked"):
        deploy_on(copy, CPU, files=files)


@pytest.mark.parametrize("leases", [True, False])
def test_a_file_that_is_changed_in_use_is_named(copy: Bundle, monkeypatch: pytest.MonkeyPatch, leases: bool) -> None:
    if not leases:
        monkeypatch.setattr(checked_files, "_take_lease", no_lease)
    with deploy(copy, CPU).guarded() as verify_unchanged:
        verify_unchanged()
        path = copy.folder / "weights" / "embed_tokens.safetensors"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except BlockingIOError:
            assert leases
        else:
            os.pwrite(descriptor, b"\0", path.stat().st_size - 1)
            os.close(descriptor)
        with pytest.raises(BundleError, match=r"\A.*weights/embed_tokens\.safetensors .*\Z"):
            verify_unchanged()


def no_lease(descriptor: int) -> None:
    raise OSError


def test_a_graph_whose_inputs_are_not_those_of_the_bundle_is_not_run(copy: Bundle) -> None:
    path = copy.folder / "vision_encoder.onnx"
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 224
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 224
    path.write_bytes(model.SerializeToString())
    document = json.loads((copy.folder / BUNDLE_FILE).read_text())
    document["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (copy.folder / BUNDLE_FILE).write_text(json.dumps(document))
    with pytest.raises(VesselError, match=r"vision_encoder\.onnx"):
        deploy(Bundle.load(copy.folder), CPU).session("vision_encoder")


def test_a_bundle_whose_files_are_gone(standin: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        deploy(msgspec.structs.replace(standin, folder=tmp_path), CPU)


def test_what_engines_replace_is_not_read(copy: Bundle) -> None:
    """Where engines run, the graphs may even be gone; the tokenizer and the embeddings are of every device."""
    (copy.folder / "vision_encoder.onnx").unlink()
    read: list[int] = []
    copy.verify_files(read.append, graphs=False)
    used = ("tokenizer.json", "weights/embed_tokens.safetensors")
    assert sum(read) == sum(copy.files[name].bytes for name in used)
    (copy.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json has 2 bytes"):
        copy.verify_files(graphs=False)


@NO_GPU
@pytest.mark.parametrize("kind", sorted(PROVIDERS.keys() - {"cpu"}))
def test_a_gpu_asked_for_and_absent_is_an_error_whatever_engines_there_are(copy: Bundle, kind: str) -> None:
    write_engines(copy)
    with pytest.raises(VesselError, match=f"--device {kind}:0: "):
        deploy(copy, Device(kind))
    assert deployment_fault(copy, Device(kind))


@NO_GPU
def test_auto_takes_the_cpu_where_there_is_nothing_better(copy: Bundle) -> None:
    write_engines(copy)
    assert deploy(copy, Device("auto")).device == CPU


def test_auto_ends_with_what_is_always_there() -> None:
    assert AUTO[-1] == "cpu"
    assert set(AUTO) <= PROVIDERS.keys()


def test_tensorrts_engines_are_kept_for_this_user_and_this_bundle(
    standin: Bundle, copy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    changed = copy.folder / "bundle.json"
    changed.write_text(changed.read_text().replace("iter_1.pth", "iter_2.pth"))
    deployments = [Deployment(bundle, Device("tensorrt"), {}) for bundle in (standin, Bundle.load(copy.folder))]
    caches = [cache for deployment in deployments if (cache := deployment._cache("vision_encoder"))]
    assert caches[0].folder != caches[1].folder
    assert caches[0].folder.is_relative_to(tmp_path / ".cache")
    assert caches[0].profile.max["pixel_values"] == (13, 3, 448, 448)
    assert caches[0].folder.stat().st_mode & 0o077 == 0
    caches[0].folder.chmod(0o777)
    with pytest.raises(EngineError, match="anyone may write"):
        deployments[0]._cache("vision_encoder")


def test_where_no_home_can_be_written_nothing_is_kept(standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "file"))
    assert Deployment(standin, Device("rtx"), {})._cache("vision_encoder") is None

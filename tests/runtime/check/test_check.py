"""The whole check: on a good bundle, and with each fault that it is there to find."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import pytest

from tests.support.checks import TILES, Check
from tests.support.engine_files import TARGET, write_engines
from tests.support.fake_gpu import install_gpu
from tests.support.tampering import change_tensor, rehash
from vessel_rt.check import check as check_module
from vessel_rt.check.cine import check_cine
from vessel_rt.check.loading import LoadedDeployment
from vessel_rt.check.record import Record
from vessel_rt.check.schema import CHECK_FILE, GRADES, CheckFile, CheckLine
from vessel_rt.device import host_memory, providers
from vessel_rt.device.deployment import Deployment
from vessel_rt.device.memory_plan import make_plan
from vessel_rt.device.providers import PROVIDERS, Device
from vessel_rt.device.session import Session
from vessel_rt.errors import GraphError, LoadMemoryError, OutOfMemory, VesselError
from vessel_rt.formats.bundle import BUNDLE_FILE, STAGES, Bundle
from vessel_rt.formats.golden import CINE_SKETCHED, GOLDEN_ARRAYS, GOLDEN_FILE, Golden
from vessel_rt.formats.schema import decode
from vessel_rt.measure import memory
from vessel_rt.model.result import Pixels
from vessel_rt.model.segmenter import Segmenter


def of(found: CheckFile, outcome: str) -> set[str]:
    """The checks with an outcome: `grade: name`."""
    return {f"{line.grade}: {line.name}" for line in found.lines if line.outcome == outcome}


def line(found: CheckFile, grade: str, name: str) -> CheckLine:
    return next(each for each in found.lines if (each.grade, each.name) == (grade, name))


@pytest.fixture
def copy(golden_tiny: Path, tmp_path: Path) -> Path:
    """A bundle with goldens that may be damaged."""
    return Path(shutil.copytree(golden_tiny, tmp_path / "bundle"))


def test_a_good_bundle_passes(golden_tiny: Path, run_check: Check, tmp_path: Path) -> None:
    found = run_check(golden_tiny)
    assert of(found, "fail") == set()
    assert of(found, "skip") == {"machine: gpu", "speed: batches", "endurance: soak"}
    assert (found.passed, found.finished) == (True, True)
    assert found.verdict.startswith("PASS: ")
    seen = list(dict.fromkeys(each.grade for each in found.lines))
    assert seen == list(GRADES)
    assert {each.name for each in found.lines if each.grade == "parity"} == {*STAGES, "answers", "masks"}
    assert {each.name for each in found.lines if each.grade == "cines"} == {*CINE_SKETCHED, "answer", "masks"}
    assert line(found, "cines", "masks").figure == "7 frames: least IoU 1.0000 (at least 1), of the last frame 1.0000"
    assert line(found, "parity", "answers").figure == "8 of 8 identical"  # 2 cases, alone and in batches, with drafts and without
    assert {each.error for each in found.stages} == {0.0}
    assert {(each.tiles, each.step) for each in found.times} >= {(1, "total"), (5, "total"), (5, "vision_encoder")}
    written = json.loads((tmp_path / "out" / CHECK_FILE).read_text())
    assert decode(written, CheckFile, 1) == found
    assert "PASS" in (tmp_path / "out" / "check.html").read_text()


def test_neither_file_tells_where_it_was_made(
    golden_standin: Path, run_check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.node", lambda: "quokka-ward-3")
    copied = Path(shutil.copytree(golden_standin, tmp_path / "of quokka" / "bundle"))
    (copied / "tokenizer.json").unlink()
    found = run_check(copied)
    assert line(found, "bundle", "files").reason.startswith("bundle: damaged bundle: tokenizer.json is missing")
    for path in (tmp_path / "out").iterdir():
        text = path.read_text()
        assert "quokka" not in text
        assert str(tmp_path) not in text


# ---- the bundle ------------------------------------------------------------------------------------------------------------------------


def _scaled(values: npt.NDArray[Any]) -> None:
    values *= 1.05


@pytest.mark.parametrize(
    ("grade", "stage", "file", "tensor"),
    [
        ("parity", "vision_encoder", "projector", "projector.linear_2.weight"),
        ("parity", "language_model", "language_model", "layers.2.mlp.down_proj.weight"),
        ("parity", "sam2_image_encoder", "sam2_image_encoder", "sam2_image_encoder.image_encoder.trunk.blocks.8.norm2.bias"),
        ("parity", "sam2_mask_decoder", "sam2_mask_decoder", "sam2_mask_decoder.mask_decoder.conv_s0.weight"),
        ("cines", "sam2_memory_encoder", "sam2_memory_encoder", "sam2_memory_encoder.memory_encoder.out_proj.weight"),
        ("cines", "sam2_memory_attention", "sam2_memory_attention", "sam2_memory_attention.norm.weight"),
        ("cines", "sam2_tracking_decoder", "sam2_tracking_decoder", "sam2_tracking_decoder.cat_1"),
    ],
)
def test_a_weight_changed_and_rehashed_is_found_in_its_stage(
    copy: Path, run_check: Check, grade: str, stage: str, file: str, tensor: str
) -> None:
    change_tensor(copy, f"weights/{file}.safetensors", tensor, _scaled)
    found = run_check(copy)
    assert line(found, "bundle", "files").outcome == "pass"
    first = next(each for each in found.lines if each.outcome == "fail")
    assert (first.grade, first.name) == (grade, stage)
    assert "the first stage that is off" in first.reason
    assert ("of the cine" in first.reason) == (grade == "cines")
    stages = [*STAGES, *CINE_SKETCHED]
    for each in found.lines:
        if each.outcome == "fail" and each is not first and each.name in stages:
            assert "its inputs are off already (" in each.reason
            assert stages.index(each.name) > stages.index(stage)
            if each.name in STAGES:
                assert f"its inputs are off already ({stage}" in each.reason
    assert found.verdict.startswith(f"FAIL: {grade}: {stage} on cpu")
    assert {"determinism: twice", "memory: peak"} <= of(found, "pass")  # it goes on


def test_a_stage_of_cines_that_cannot_be_loaded(copy: Path, run_check: Check) -> None:
    shutil.copyfile(copy / "sam2_mask_decoder.onnx", copy / "sam2_memory_encoder.onnx")
    _record_anew(copy, "sam2_memory_encoder.onnx")
    found = run_check(copy)
    assert of(found, "fail") == {"cines: run"}
    assert "sam2_memory_encoder.onnx: its inputs and outputs are not those of bundle.json" in line(found, "cines", "run").reason


def test_a_bundle_or_goldens_from_before_cines(golden_tiny: Path, tmp_path: Path, run_check: Check) -> None:
    copied = Path(shutil.copytree(golden_tiny, tmp_path / "bundle"))
    golden = Golden.load(Bundle.load(copied))
    assert golden
    dataclasses.replace(golden, file=msgspec.structs.replace(golden.file, cine=None), cine=None).save(Bundle.load(copied))
    found = run_check(copied)
    assert found.passed
    assert "there is no golden cine" in line(found, "cines", "run").reason
    lines: list[CheckLine] = []
    older = msgspec.structs.replace(Bundle.load(copied), cine=None)
    check_cine(Record(str, lines.append, lambda _: None), LoadedDeployment.of(Deployment(older, Device("cpu"), {}, 1), {}), golden)
    assert [(each.outcome, each.reason.split(":")[0]) for each in lines] == [("skip", "the bundle has no graphs for cines")]


@pytest.mark.parametrize(("method", "error"), [("run", OutOfMemory), ("__init__", LoadMemoryError)])
def test_no_memory_left_for_the_stages_of_cines(
    golden_tiny: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch, method: str, error: type[VesselError]
) -> None:
    unchanged = getattr(Session, method)

    def full(self: Session, *arguments: Any, **options: Any) -> Any:
        path = arguments[0] if method == "__init__" else self._path
        if path.stem == "sam2_memory_attention":
            raise error("sam2_memory_attention fails on cuda:0: out of memory")
        return unchanged(self, *arguments, **options)

    monkeypatch.setattr(Session, method, full)
    found = run_check(golden_tiny)
    assert found.passed
    assert "no memory is left for it" in line(found, "cines", "run").reason


def test_a_graph_replaced_by_one_that_computes_something_else(copy: Path, run_check: Check) -> None:
    path = copy / "vision_encoder.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(each for each in model.graph.node if each.op_type == "Gelu")
    node.op_type = "Relu"
    del node.attribute[:]
    path.write_bytes(model.SerializeToString())
    assert line(run_check(copy), "bundle", "files").reason.startswith("bundle: damaged bundle: vision_encoder.onnx")
    _record_anew(copy, path.name)
    found = run_check(copy)
    assert "the first stage that is off" in line(found, "parity", "vision_encoder").reason


def test_a_graph_replaced_by_another_stages(copy: Path, run_check: Check) -> None:
    shutil.copyfile(copy / "sam2_mask_decoder.onnx", copy / "vision_encoder.onnx")
    _record_anew(copy, "vision_encoder.onnx")
    found = run_check(copy)
    assert of(found, "fail") == {"loading: vision_encoder"}
    assert (
        "bundle/vision_encoder.onnx: its inputs and outputs are not those of bundle.json" in line(found, "loading", "vision_encoder").reason
    )
    assert line(found, "parity", "parity").reason == "not checked, since loading: vision_encoder failed"


def _record_anew(folder: Path, file: str) -> None:
    """Let bundle.json have the size and hash of a file that was replaced."""
    bundle = Bundle.load(folder)
    files = bundle.files | {file: msgspec.structs.replace(bundle.files[file], bytes=(folder / file).stat().st_size)}
    (folder / BUNDLE_FILE).write_text(msgspec.structs.replace(bundle, files=files).to_json())
    rehash(folder, file)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), lambda path: path.unlink()])
def test_files_that_are_not_the_exported_ones_are_not_loaded(
    copy: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    damage(copy / "weights" / "language_model.safetensors")
    monkeypatch.setattr(Session, "_load", lambda *_: pytest.fail("loaded"))
    found = run_check(copy)
    assert of(found, "fail") == {"bundle: files"}
    assert "weights/language_model.safetensors" in line(found, "bundle", "files").reason
    assert {each.grade for each in found.lines if each.outcome == "skip"} >= set(GRADES[2:])


def test_a_bundle_that_cannot_be_read(tmp_path: Path, run_check: Check) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / BUNDLE_FILE).write_text("{}")
    for device in ("cpu", "auto"):
        found = run_check(tmp_path / "bundle", device)
        assert of(found, "fail") == {"bundle: bundle.json"}
        assert found.bundle is None
        assert {each.grade for each in found.lines} == set(GRADES)


def test_without_goldens_parity_is_skipped_with_what_to_do(standin: Bundle, run_check: Check) -> None:
    found = run_check(standin.folder)
    assert found.passed
    assert {"bundle: goldens", "parity: goldens"} <= of(found, "skip")
    assert "vessel-export verify --record" in line(found, "parity", "goldens").reason
    assert "goldens" in found.verdict


def test_goldens_of_another_bundle(copy: Path, run_check: Check) -> None:
    bundle = Bundle.load(copy)
    other = msgspec.structs.replace(bundle, provenance=msgspec.structs.replace(bundle.provenance, checkpoint_sha256="0" * 64))
    (copy / BUNDLE_FILE).write_text(other.to_json())
    found = run_check(copy)
    assert of(found, "fail") == {"bundle: goldens"}
    assert "of another checkpoint" in line(found, "bundle", "goldens").reason
    assert line(found, "parity", "goldens").outcome == "skip"


@pytest.mark.parametrize("name", [GOLDEN_FILE, GOLDEN_ARRAYS])
def test_goldens_that_were_changed(golden_standin: Path, tmp_path: Path, run_check: Check, name: str) -> None:
    copied = Path(shutil.copytree(golden_standin, tmp_path / "bundle"))
    (copied / name).write_bytes((copied / name).read_bytes() + b" ")
    found = run_check(copied)
    assert of(found, "fail") == {"bundle: goldens"}
    assert f"bundle/{name}: was changed" in line(found, "bundle", "goldens").reason


# ---- the machine -----------------------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_told_before_anything_is_loaded(
    golden_tiny: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:  400 kB\nSwapFree:  100 kB\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(Session, "_load", lambda *_: pytest.fail("loaded"))
    found = run_check(golden_tiny)
    assert of(found, "fail") == {"machine: memory"}
    assert "0.0 GB are available" in line(found, "machine", "memory").reason
    assert {"bundle: files", "bundle: goldens"} <= of(found, "pass")


@pytest.mark.parametrize("kind", sorted(PROVIDERS.keys() - {"cpu"}))
def test_a_missing_library_is_named_with_how_to_install_it(
    golden_standin: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    install_gpu(monkeypatch)
    missing = "libcudnn.so.9: cannot open shared object file: No such file or directory"

    def probe(device: object) -> None:
        raise RuntimeError(f"Failed to load library /home/quokka/venv/lib/{missing}")

    provider = dataclasses.replace(PROVIDERS[kind], package=None, name="CPUExecutionProvider", probe=probe)
    monkeypatch.setitem(PROVIDERS, kind, provider)
    found = run_check(golden_standin, kind)
    assert of(found, "fail") == {"machine: device"}
    reason = line(found, "machine", "device").reason
    assert "libcudnn.so.9" in reason
    assert "pip " in reason
    assert "quokka" not in reason
    assert line(found, "speed", "speed").reason == "not checked, since machine: device failed"


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX 1.7.1 on an RTX 3090, up to the point where an engine is loaded."""
    install_gpu(monkeypatch)
    monkeypatch.setitem(
        PROVIDERS, "rtx", dataclasses.replace(PROVIDERS["rtx"], package=None, name="CPUExecutionProvider", probe=lambda _: None)
    )
    monkeypatch.setattr("vessel_rt.device.deployment.builder_version", lambda builder: TARGET.version)
    monkeypatch.setattr(Session, "_load", lambda *_: pytest.fail("loaded"))


def _sidecars(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    for path in folder.glob("*.json"):
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda folder: _sidecars(folder, lambda each: each["sources"].update({f"{each['stage']}.onnx": "0" * 64})),
            "another language_model.onnx",
        ),
        (lambda folder: _sidecars(folder, lambda each: each.update(architecture="sm89")), "for sm89, not by rtx for sm86"),
        (lambda folder: _sidecars(folder, lambda each: each["versions"].update(rtx="1.6.0")), "by rtx 1.6.0, and 1.7.1 is installed"),
        (lambda folder: folder.joinpath("vision_encoder_0.engine").write_bytes(b"another engine!!!!!!!!"), "vision_encoder_0.engine"),
        (lambda folder: shutil.rmtree(folder), "no engine of vision_encoder"),
    ],
    ids=["stale", "another architecture", "another version", "changed", "none"],
)
def test_engines_that_may_not_be_loaded(copy: Path, run_check: Check, damage: Callable[[Path], object], says: str) -> None:
    damage(write_engines(Bundle.load(copy)))
    found = run_check(copy, "rtx")
    assert of(found, "fail") == {"bundle: target"}
    reason = line(found, "bundle", "target").reason
    assert says in reason
    assert "vessel-export build" in reason
    assert line(found, "loading", "loading").reason == "not checked, since bundle: target failed"


# ---- the device ------------------------------------------------------------------------------------------------------------------------


def test_a_gpu_that_works(golden_tiny: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch)
    found = run_check(golden_tiny, "cuda", minutes=0.001)
    assert of(found, "fail") == set()
    assert of(found, "skip") == set()
    told = line(found, "machine", "gpu").figure
    assert told == "NVIDIA GeForce RTX 3090, sm86, 23.0 of 24.0 GiB free, driver 580.65.06 (CUDA 13.0)"
    assert line(found, "providers", "language_model").figure.endswith("nodes on CUDAExecutionProvider")
    assert [(each.tiles, each.batch) for each in found.batches] == [(tiles, batch) for tiles in TILES for batch in (1, 2)]
    assert "planned for 2 images at once" in line(found, "memory", "peak").figure
    assert "60 to 60 °C, 1700 to 1700 MHz, 300 to 300 W" in line(found, "endurance", "soak").figure


def test_a_batch_that_does_not_fit(golden_tiny: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch)
    run = Segmenter.run

    def full(self: Segmenter, batch: Sequence[Pixels], questions: Sequence[str]) -> Any:
        if len(batch) > 1:
            raise OutOfMemory("sam2_image_encoder fails on cuda:0: out of memory")
        return run(self, batch, questions)

    monkeypatch.setattr(Segmenter, "run", full)
    found = run_check(golden_tiny, "cuda")
    assert of(found, "fail") == {"parity: run", "speed: batches, 1 tile", "speed: batches, 5 tiles"}
    assert line(found, "speed", "batches, 1 tile").reason == "2 images at once: sam2_image_encoder fails on cuda:0: out of memory"
    assert [each.batch for each in found.batches] == [1, 1]


def test_slow_operators_left_to_the_cpu(golden_tiny: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch, on_the_cpu=True)
    found = run_check(golden_tiny, "cuda")
    assert of(found, "fail") == {f"providers: {stage}" for stage in STAGES}
    reason = line(found, "providers", "language_model").reason
    assert "has no kernel on cuda:0 for " in reason
    assert {"Attention", "MatMul"} <= set(re.findall(r"\w+", reason))
    assert line(found, "loading", "loading").reason == "not checked, since providers: vision_encoder failed"


def test_the_floor_is_shown_where_a_cards_rates_are_known(fp16_bundle: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch)
    found = run_check(fp16_bundle, "cuda")
    assert found.passed
    for tiles in TILES:
        of_tiles = {each.step: each for each in found.times if each.tiles == tiles}
        floors = [of_tiles[stage].floor_ms or 0.0 for stage in STAGES]
        assert min(floors) > 0
        assert of_tiles["total"].floor_ms == pytest.approx(sum(floors), abs=1e-2)
        assert all(0 < (of_tiles[stage].mbu or 0) < 1 for stage in STAGES)
    assert "runs, floor " in line(found, "speed", "5 tiles").figure


def test_more_memory_than_planned(golden_tiny: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    library = install_gpu(monkeypatch)
    run = Session.run

    def hungry(self: Session, *arguments: Any, **options: Any) -> Any:
        library.used = 20 << 30
        return run(self, *arguments, **options)

    monkeypatch.setattr(Session, "run", hungry)
    monkeypatch.setattr(memory, "_INTERVAL", 0.001)
    found = run_check(golden_tiny, "cuda")
    assert of(found, "fail") == {"memory: peak"}
    assert "20.40 GB of" in line(found, "memory", "peak").figure


def test_a_card_that_is_too_small(golden_tiny: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch)
    monkeypatch.setattr(check_module, "make_plan", lambda bundle, batch, memory: make_plan(bundle, batch, 1 << 20))
    found = run_check(golden_tiny, "cuda")
    assert of(found, "fail") == {"machine: memory"}
    assert "vessel-rt plan" in line(found, "machine", "memory").reason


@pytest.mark.parametrize("stage", STAGES)
def test_a_provider_that_fails_mid_run(golden_standin: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    run, runs = Session.run, 0

    def failing(self: Session, *arguments: Any, **options: Any) -> Any:
        nonlocal runs
        runs += self._path.stem == stage
        if self._path.stem == stage and runs > 3:
            raise GraphError(f"{stage} fails on cpu: CUDA failure 700: illegal access ; hostname=quokka-ward-3 ; file=/src/a.cc")
        return run(self, *arguments, **options)

    monkeypatch.setattr(Session, "run", failing)
    found = run_check(golden_standin, minutes=0.001)
    assert not found.passed
    failed = of(found, "fail")
    assert {"parity: run", "determinism: twice", "endurance: soak"} <= failed
    assert "memory: peak" in of(found, "pass")
    reason = line(found, "parity", "run").reason
    assert f"{stage} fails on cpu: CUDA failure 700" in reason
    assert "so the device is at fault" in reason
    assert "quokka" not in reason


def test_a_device_that_computes_something_else_each_time(golden_standin: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    run, number = Session.run, 0

    def unsteady(self: Session, *arguments: Any, **options: Any) -> Any:
        nonlocal number
        outputs = run(self, *arguments, **options)
        if "low_res_logits" in outputs:
            number += 1
            outputs["low_res_logits"] = outputs["low_res_logits"] + np.float32(1e-7 * number)
        return outputs

    monkeypatch.setattr(Session, "run", unsteady)
    found = run_check(golden_standin, minutes=0.001)
    assert of(found, "fail") == {"determinism: twice", "endurance: soak"}
    assert "0 of 2 images give the same bytes" in line(found, "determinism", "twice").figure
    assert "results differ from the first" in line(found, "endurance", "soak").reason


def test_memory_that_grows(golden_standin: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    held = 0

    def growing() -> int:
        nonlocal held
        held += 50 << 20
        return held

    monkeypatch.setattr(memory, "anonymous_memory", growing)
    found = run_check(golden_standin, minutes=0.001)
    assert "endurance: soak" in of(found, "fail")
    assert "grows" in line(found, "endurance", "soak").reason


def test_a_bug_is_a_line_and_a_traceback(
    golden_standin: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> Mapping[str, int]:
        raise KeyError("a bug")

    monkeypatch.setattr(check_module, "check_parity", broken)
    found = run_check(golden_standin)
    assert of(found, "fail") == {"parity: run"}
    assert "KeyError: 'a bug'; this is a bug of vessel-rt" in line(found, "parity", "run").reason
    assert "Traceback" in capsys.readouterr().err


def test_what_was_found_is_left_by_a_process_that_dies(
    golden_standin: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(Deployment, "session", killed)
    with pytest.raises(SystemExit):
        run_check(golden_standin)
    left = decode(json.loads((tmp_path / "out" / CHECK_FILE).read_text()), CheckFile, 1)
    assert (left.finished, left.passed) == (False, False)
    assert left.verdict == "NOT FINISHED: the last check was bundle: target"


def test_results_that_cannot_be_written_end_it_at_once(golden_standin: Path, run_check: Check, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(VesselError, match=r"out/check\.json: cannot be written"):
        run_check(golden_standin)


def test_several_devices_one_after_the_other(golden_standin: Path, run_check: Check) -> None:
    found = run_check(golden_standin, "cpu:2")
    assert [each.device for each in found.lines if each.grade == "determinism"] == ["cpu"]  # the same device once


def test_packages_that_overwrite_each_other(golden_standin: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.0"}
    monkeypatch.setattr("vessel_rt.measure.machine._versions", lambda: installed)
    found = run_check(golden_standin)
    assert of(found, "fail") == {"machine: software"}
    assert "overwrite each other: pip uninstall -y onnxruntime onnxruntime-gpu" in line(found, "machine", "software").reason


def test_a_runtime_that_is_too_old(golden_standin: Path, run_check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers.onnxruntime(), "__version__", "1.9.0")
    monkeypatch.setattr("vessel_rt.check.machine._needed_runtime", lambda: "1.24")
    assert "onnxruntime 1.9.0 is older than 1.24" in line(run_check(golden_standin), "machine", "software").reason

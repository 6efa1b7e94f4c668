"""A bundle that does not fit is refused before it is loaded, by a system whose files say that it has little memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from PIL import Image

from vessel_rt.cli import main
from vessel_rt.device import host_memory
from vessel_rt.device.host_memory import available_memory, make_host_plan, require_memory
from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle import Bundle

KIB = 1024


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 400 kB of free memory and 100 kB of swap, without a container."""
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:  400 kB\nSwapFree:  100 kB\nHugePages_Total:  0\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    return tmp_path


def limit(system: Path, maximum: str, current: int, cached: int = 0) -> None:
    (system / "memory.max").write_text(f"{maximum}\n")
    (system / "memory.current").write_text(f"{current}\n")
    (system / "memory.stat").write_text(f"anon {current - cached}\nactive_file {cached}\ninactive_file 0\n")


def test_memory_is_that_of_the_system_or_of_its_container(system: Path) -> None:
    assert available_memory() == 500 * KIB
    limit(system, "max", 10)
    assert available_memory() == 500 * KIB
    limit(system, str(300 * KIB), 100 * KIB)
    assert available_memory() == 200 * KIB
    limit(system, str(300 * KIB), 200 * KIB, cached=100 * KIB)  # by files that were read, such as the bundle's
    assert available_memory() == 200 * KIB
    limit(system, str(900 * KIB), 100 * KIB)
    assert available_memory() == 500 * KIB


@pytest.mark.parametrize("content", ["", "MemAvailable: 400 kB\n", "MemAvailable: x kB\nSwapFree: 0 kB\n"])
def test_a_system_that_does_not_tell_refuses_nothing(system: Path, content: str, fp32_bundle: Path) -> None:
    (system / "meminfo").write_text(content)
    assert available_memory() is None
    require_memory(Bundle.load(fp32_bundle))


def test_fp16_takes_as_much_as_fp32_and_int8_less(fp32_bundle: Path, fp16_bundle: Path, int8_bundle: Path) -> None:
    fp32, fp16, int8 = (make_host_plan(Bundle.load(folder)).total for folder in (fp32_bundle, fp16_bundle, int8_bundle))
    assert fp16 == pytest.approx(fp32, rel=0.3)  # FP32 maps SAM2's matrices
    assert int8 < fp32


def test_a_bundle_that_does_not_fit_is_one_line(system: Path, fp16_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "a.png").touch()
    command = ["infer", str(tmp_path / "frames"), "--bundle", str(fp16_bundle), "--device", "cpu", "-o", str(tmp_path / "out")]
    assert main(command) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert str(fp16_bundle) in line
    assert "0.0 GB are available" in line
    assert "cpu-int8" in line


def test_each_process_needs_its_own(system: Path, fp32_bundle: Path) -> None:
    bundle = Bundle.load(fp32_bundle)
    limit(system, str(10**9), 10**9 - make_host_plan(bundle).total - 1)
    (system / "meminfo").write_text("MemAvailable: 999999999 kB\nSwapFree: 0 kB\n")
    require_memory(bundle)
    with pytest.raises(BundleError, match="fewer streams or processes"):
        require_memory(bundle, processes=2)
    with pytest.raises(BundleError, match="fewer streams or processes"):
        require_memory(bundle, streams=2)


def test_older_bundles_without_weights_are_not_refused(system: Path, fp32_bundle: Path) -> None:
    bundle = Bundle.load(fp32_bundle)
    require_memory(replace(bundle, stages={name: replace(stage, weights=()) for name, stage in bundle.stages.items()}))


def sizes(bundle: Bundle, **options: Any) -> dict[str, int]:
    return {item.name: item.bytes for item in make_host_plan(bundle, **options).items}


def test_streams_share_the_weights_and_processes_do_not(int8_bundle: Path) -> None:
    bundle = Bundle.load(int8_bundle)
    one, streams, processes = sizes(bundle), sizes(bundle, streams=3), sizes(bundle, processes=3)
    assert {name: size * 3 for name, size in one.items()} == processes
    for name, size in one.items():
        assert streams[name] == (3 * size if name in ("cache", "activations") else size)


def test_matrices_of_sam2_are_mapped_in_fp32_and_converted_in_fp16(fp32_bundle: Path, fp16_bundle: Path) -> None:
    mapped, converted = sizes(Bundle.load(fp32_bundle)), sizes(Bundle.load(fp16_bundle))
    assert mapped["weights: sam2_image_encoder"] == 0 < converted["weights: sam2_image_encoder"]


def test_cines_take_their_stages_and_the_scores_of_attention(fp32_bundle: Path, fp16_bundle: Path) -> None:
    """examples/tiny: 1024 positions with 16 channels, and pointers of 64, so of 4 tokens; in FP16, attention is not one operator there."""
    for folder, copies in ((fp32_bundle, 1), (fp16_bundle, 2)):
        bundle = Bundle.load(folder)
        frames, best, sa2va = (sizes(bundle, propagate=way) for way in (None, "best-frame", "sa2va"))
        assert {name: best[name] for name in frames if name != "process"} == {name: frames[name] for name in frames if name != "process"}
        added = best.keys() - frames.keys()
        assert added == {
            *(f"weights: {name}" for name in bundle.all_stages if name not in bundle.stages),
            "memory bank",
            "attention to memories",
        }
        assert best["attention to memories"] == copies * 4 * 1024 * (9 * 1024 + 18 * 4)
        assert sa2va["attention to memories"] == copies * 4 * 1024 * (11 * 1024 + 20 * 4)
        assert best["memory bank"] == 4 * (9 * 16 * 1024 + 18 * 64)


def test_scores_of_a_large_frame_are_kept_once(fp16_bundle: Path) -> None:
    """SAM2 Hiera-L: 4096 positions, so the exporter writes attention as one operator."""
    bundle = Bundle.load(fp16_bundle)
    assert bundle.cine is not None
    attention = bundle.cine.stages["sam2_memory_attention"]
    inputs = tuple(replace(spec, shape=(*spec.shape[:2], 64, 64)) if spec.name == "memories" else spec for spec in attention.inputs)
    large = replace(
        bundle, cine=replace(bundle.cine, stages={**bundle.cine.stages, attention.file[:-5]: replace(attention, inputs=inputs)})
    )
    assert sizes(large, propagate="sa2va")["attention to memories"] == 4 * 4096 * (11 * 4096 + 20 * 4)


def test_a_cine_that_does_not_fit_is_refused_before_it_is_loaded(
    system: Path, fp32_bundle: Path, standin: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its frames alone would fit."""
    bundle, cine = Bundle.load(fp32_bundle), tmp_path / "cine.tif"
    Image.new("L", (64, 64)).save(cine, save_all=True, append_images=[Image.new("L", (64, 64))] * 2)
    kilobytes = (make_host_plan(bundle).total + make_host_plan(bundle, propagate="best-frame").total) // 2 // KIB
    (system / "meminfo").write_text(f"MemAvailable: {kilobytes} kB\nSwapFree: 0 kB\n")
    require_memory(bundle)
    with pytest.raises(BundleError, match=r"needs about 0\.\d GB"):
        require_memory(bundle, propagate="sa2va")
    command = ["infer", str(cine), "--bundle", str(fp32_bundle), "--device", "cpu", "-o", str(tmp_path / "out"), "--propagate"]
    assert main(command) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert f"{kilobytes * KIB / 1e9:.1f} GB are available" in line
    assert not (tmp_path / "out" / "results.jsonl").exists()
    require_memory(standin, propagate="best-frame")  # of an older version: told when it is loaded


def test_a_plan_for_the_cpu(int8_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--device", "cpu", "--bundle", str(int8_bundle), "--streams", "2"]
    assert main([*command, "--memory", "8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["of", "8.0", "GiB", "8.590", "GB"]
    assert main([*command, "--memory", "0.01"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "use fewer streams or processes" in line
    assert main([*command, "--memory", "8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["batch"], document["fits"]) == (2, True)


def test_a_plan_for_cines_on_the_cpu(fp32_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--device", "cpu", "--bundle", str(fp32_bundle), "--memory", "8", "--json", "--propagate"]
    totals = []
    for way in ([], ["sa2va"]):
        assert main([*command, *way]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["cines"]
        totals.append(document["total"])
    assert totals[0] < totals[1]
    with pytest.raises(SystemExit) as e:
        main([*command, "sa2va", "--streams", "2"])
    assert e.value.code == 2


def test_options_of_gpus_are_refused_for_the_cpu(int8_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--bundle", str(int8_bundle)]
    for extra, named in (
        (["--device", "cpu", "--recipe", "rtx3090"], "--recipe"),
        (["--device", "cpu", "--batch", "2"], "--batch"),
        (["--streams", "2"], "--streams"),
    ):
        with pytest.raises(SystemExit) as e:
            main([*command, *extra])
        assert e.value.code == 2
        assert named in capsys.readouterr().err.splitlines()[-1]

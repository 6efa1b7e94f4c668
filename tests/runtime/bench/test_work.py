"""What one process does, in this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checks import once
from tests.support.fake_gpu import install_gpu
from vessel_rt.bench import work as module
from vessel_rt.bench.work import Failed, Measured, Message, Peaks, Ready, Work, measure
from vessel_rt.device import host_memory
from vessel_rt.device.deployment import deploy_on
from vessel_rt.device.memory_plan import make_plan
from vessel_rt.device.providers import Device
from vessel_rt.errors import EngineError, VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.measure.frames import draw_angiogram

QUESTION = "Please segment vessel in this image."


def messages(bundle: Bundle, device: Device, *batches: int, frames: int = 1, every_frame: bool = True) -> list[Message]:
    found: list[Message] = []
    drawn = {i: draw_angiogram(64, 64, i) for i in range(frames)}
    measure(Work(bundle, device, {1: drawn}, QUESTION, batches, 1, every_frame), found.append)
    return found


@pytest.mark.parametrize(("frames", "batch", "runs"), [(1, 1, 1), (5, 1, 4), (5, 2, 2), (2, 4, 1)])
def test_every_frame_is_segmented_and_every_batch_is_full(
    standin: Bundle, monkeypatch: pytest.MonkeyPatch, frames: int, batch: int, runs: int
) -> None:
    once(monkeypatch)
    [measured] = [each for each in messages(standin, Device("cpu"), batch, frames=frames) if isinstance(each, Measured)]
    assert measured.masks.keys() == set(range(frames))
    assert len(measured.times) == runs


def test_in_later_rounds_a_few_frames_are_enough(standin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    once(monkeypatch)
    [measured] = [each for each in messages(standin, Device("cpu"), 1, frames=9, every_frame=False) if isinstance(each, Measured)]
    assert (len(measured.times), measured.masks) == (1, {})


def test_what_does_not_fit_by_the_plan_is_not_loaded(fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:  400 kB\nSwapFree:  100 kB\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    found = [each for each in messages(Bundle.load(fp32_bundle), Device("cpu"), 1, 2) if isinstance(each, Ready | Failed)]
    failed = [each for each in found if isinstance(each, Failed)]
    assert [each.batch for each in failed] == [1, 2]
    for each, images in zip(failed, ("one image", "2 images"), strict=True):
        assert each.reason.startswith("not run: needs about ")
        assert each.reason.endswith(f"GB of memory with {images} at once; there are 0.5 MB")
    assert len(found) == 2


def test_only_the_batches_that_fit_run_on_a_gpu(fp16_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch)
    once(monkeypatch)
    bundle = Bundle.load(fp16_bundle)
    monkeypatch.setattr(module, "list_gpus", lambda: (type("Card", (), {"memory": make_plan(bundle, 2, 0).total}),))
    found = messages(bundle, Device("cuda"), 1, 4)
    assert [(each.batch, each.reason[:7]) for each in found if isinstance(each, Failed)] == [(4, "not run")]
    assert [each.batch for each in found if isinstance(each, Measured)] == [1]
    [peaks] = [each for each in found if isinstance(each, Peaks)]
    assert peaks.device == 0  # the card's memory in use does not change
    [ready] = [each for each in found if isinstance(each, Ready)]
    assert ready.device == "cuda:0"


def test_engines_for_fewer_images_refuse_the_larger_batches_only(standin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    once(monkeypatch)

    def built_for_two(*arguments: object, batch: int, **more: object) -> object:
        if batch > 2:
            raise EngineError(f"built for 2 images at once, not {batch}")
        return deploy_on(*arguments, batch=batch, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "deploy_on", built_for_two)
    found = messages(standin, Device("cpu"), 1, 2, 4, 8)
    assert [(each.batch, each.reason) for each in found if isinstance(each, Failed)] == [
        (8, "built for 2 images at once, not 8"),
        (4, "built for 2 images at once, not 4"),
    ]
    assert [each.batch for each in found if isinstance(each, Measured)] == [1, 2]
    monkeypatch.setattr(module, "deploy_on", lambda *_, batch, **__: built_for_two(batch=batch + 2))
    with pytest.raises(VesselError, match="not 3"):
        messages(standin, Device("cpu"), 1, 2)


def test_the_files_of_an_earlier_process_are_not_hashed_again(standin: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    once(monkeypatch)
    [ready] = [each for each in messages(standin, Device("cpu"), 1) if isinstance(each, Ready)]
    monkeypatch.setattr(Bundle, "verify_files", lambda *_, **__: pytest.fail("hashed"))
    found: list[Message] = []
    measure(Work(standin, Device("cpu"), {1: {0: draw_angiogram(64, 64, 0)}}, QUESTION, [1], 1, True, ready.files), found.append)
    assert any(isinstance(each, Measured) for each in found)

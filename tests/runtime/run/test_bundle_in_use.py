"""A bundle that is changed while real processes run it: one line, exit code 1, and no result of changed weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.frames import make_frame
from tests.support.leases import has_leases
from tests.support.runs import lines, options
from vessel_rt.device.providers import Device
from vessel_rt.errors import BundleError, ImageError
from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle
from vessel_rt.model.result import Answer, Pixels
from vessel_rt.model.segmenter import Segmenter
from vessel_rt.run.infer import infer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a file in use can be written to as on Linux")

COMMAND = "import sys; from vessel_rt.cli import main; sys.exit(main())"
FRAMES = 60
WEIGHTS = "weights/sam2_mask_decoder.safetensors"


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x7f" * 10_000)


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def replace(path: Path) -> None:
    shutil.copy2(path, path.with_name("new"))
    os.replace(path.with_name("new"), path)


def remove_all(path: Path) -> None:
    shutil.rmtree(path.parents[1])


def lines_of(out: Path) -> set[str]:
    """The lines of results.jsonl, without the study codes, which depend on the key."""
    return {json.dumps(line).replace(line["code"], "code") for line in lines(out)}


@pytest.fixture
def copy(fp32_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp32_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def many_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for seed in range(FRAMES):
        make_frame(seed=seed).save(folder / f"frame{seed}.png")
    return folder


@pytest.fixture(scope="module")
def results(fp32_bundle: Path, many_frames: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """As lines_of, of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    infer(Bundle.load(fp32_bundle), options(many_frames, out))
    return lines_of(out)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [("--device", "cpu"), ("--devices", "cpu:2")], ids=["one", "two"])
@pytest.mark.parametrize("change", [overwrite, truncate, replace, remove_all])
def test_the_run_ends_in_order(
    copy: Path, many_frames: Path, results: set[str], tmp_path: Path, change: Callable[[Path], None], devices: tuple[str, str]
) -> None:
    if change is truncate and not has_leases(copy / WEIGHTS):
        pytest.skip("no leases on this file system: a truncation cannot be held back")
    out = tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, "infer", str(many_frames), "--bundle", str(copy), "-o", str(out), "--threads", "1", *devices]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not (out / "journal.jsonl").exists() or len((out / "journal.jsonl").read_bytes().splitlines()) < 4:
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        change(copy / WEIGHTS)
        _, said = run.communicate()
    errors = [line for line in said.splitlines() if "error" in line]
    assert (run.returncode, len(errors)) == (1, 1), said
    assert "Traceback" not in said
    assert str(copy) in errors[0]
    assert not (out / "run.json").exists()
    found = lines_of(out)
    assert 3 <= len(found) < FRAMES
    assert found <= results


def test_a_link_that_another_export_makes_is_no_change(copy: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Segmenter.run

    def run_and_link(self: Segmenter, batch: list[Pixels], questions: list[str]) -> list[list[Answer]]:
        os.link(copy / WEIGHTS, copy / f"link{len(list(copy.iterdir()))}")
        return run(self, batch, questions)

    monkeypatch.setattr(Segmenter, "run", run_and_link)
    assert infer(Bundle.load(copy), options(frames, tmp_path / "out")).failed == 0


def test_a_failure_under_changed_weights_is_no_result(copy: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that fails is noted as failed for good: not where the weights may be why."""
    monkeypatch.setattr(Segmenter, "_run", _touch_and_fail(copy))
    with pytest.raises(BundleError, match="sam2_mask_decoder"):
        infer(Bundle.load(copy), options(frames, tmp_path / "out"))
    assert (tmp_path / "out" / "results.jsonl").read_text() == ""


def _touch_and_fail(folder: Path) -> Callable[..., None]:
    def fail(*_: object) -> None:
        os.utime(folder / WEIGHTS)
        raise ImageError("not finite")

    return fail


def test_bundle_json_is_read_once(copy: Path, frames: Path, tmp_path: Path) -> None:
    """What was read is what is run and what run.json tells of, whatever becomes of the file."""
    bundle = Bundle.load(copy)
    (copy / BUNDLE_FILE).write_text("{}")
    infer(bundle, options(frames, tmp_path / "out", devices=(Device("cpu"), Device("cpu"))))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["bundle"]["sha256"] == bundle.sha256

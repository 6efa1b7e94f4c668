"""The whole bench: on good bundles, and with each fault that a row has to tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.benches import Bench
from tests.support.frames import make_frame
from tests.support.paths import Tiny
from tests.support.runs import lines, options
from vessel_rt.bench import bench as module
from vessel_rt.bench.bench import _Scorer
from vessel_rt.bench.compare import read_bench
from vessel_rt.bench.frames import FrameSet
from vessel_rt.bench.masks import PackedMask
from vessel_rt.bench.schema import BENCH_FILE, BenchFile, BenchRow
from vessel_rt.errors import VesselError
from vessel_rt.evaluation.evaluate import evaluate
from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle
from vessel_rt.run.infer import infer


def rows(found: BenchFile) -> dict[tuple[int, str, int | None, int | None], BenchRow]:
    [run] = found.runs
    return {(row.bundle, row.device, row.batch, row.tiles): row for row in run.rows}


def test_batches_and_tiles_each_have_a_row(golden_standin: Path, run_bench: Bench, tmp_path: Path) -> None:
    found = run_bench(golden_standin, batches=(1, 2), rounds=2)
    measured = rows(found)
    assert measured.keys() == {(0, "cpu", batch, tiles) for batch in (1, 2) for tiles in (1, 5)}
    for (_, _, batch, tiles), row in measured.items():
        assert (row.fault, row.provider, row.runs) == ("", "CPUExecutionProvider", 2)  # one in each round
        assert row.steps[-1].step == "total"
        assert row.images_per_second == pytest.approx(1e3 / row.steps[-1].p50_ms, abs=2e-3)
        assert {"vision_encoder", "language_model", "sam2_mask_decoder"} <= {step.step for step in row.steps}
        assert (row.host_peak_bytes or 0) > 10_000_000
        assert (row.device_peak_bytes, row.dice, row.masks) == (None, None, 1)
        assert row.least_iou == (None if batch == 1 else 1.0), (batch, tiles)  # those of batch 1 are the reference
    [run] = found.runs
    assert (run.finished, run.source, [(each.tiles, each.count) for each in run.frames]) == (True, "goldens", [(1, 1), (5, 1)])
    assert read_bench(tmp_path / "out" / BENCH_FILE) == found


def test_dice_and_overlap_are_those_of_evaluate(tiny: Tiny, fp32_bundle: Path, fp16_bundle: Path, run_bench: Bench, tmp_path: Path) -> None:
    paths = sorted(tiny.frames.glob("*.jpg"))[:2]
    found = rows(run_bench(fp16_bundle, fp32_bundle, inputs=tuple(map(str, paths)), truth=tiny.annotations))
    for path in paths:
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "in")
    infer(Bundle.load(fp32_bundle), options(tmp_path / "in", tmp_path / "run"))
    evaluation = evaluate(tmp_path / "run", tiny.annotations)
    dices = {comparison.index: comparison.values["dice"] for comparison in evaluation.comparisons}
    assert len(lines(tmp_path / "run")) == len(dices) == 2
    weighted = sum((row.dice or 0.0) * row.masks for (bundle, *_), row in found.items() if bundle == 1)
    assert weighted / 2 == pytest.approx(sum(dices.values()) / 2, abs=1e-5)
    assert {row.least_iou for (bundle, *_), row in found.items() if bundle == 1} == {None}
    assert all(0.95 < (row.least_iou or 0.0) <= 1 for (bundle, *_), row in found.items() if bundle == 0)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / BUNDLE_FILE).write_text("{}"), "missing key"),
        (lambda folder: (folder / BUNDLE_FILE).unlink(), "no bundle here"),
        (lambda folder: (folder / "language_model.onnx").write_bytes(b"no graph"), "language_model.onnx"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
    ids=["bundle.json", "no bundle", "another graph", "a file is missing"],
)
def test_a_bundle_that_fails_has_a_row_and_the_others_go_on(
    golden_standin: Path, run_bench: Bench, tmp_path: Path, damage: Any, says: str
) -> None:
    folder = Path(shutil.copytree(golden_standin, tmp_path / "of quokka" / "bundle"))
    damage(folder)
    found = rows(run_bench(folder, golden_standin, rounds=2))
    fault = found[0, "cpu", None, None].fault
    assert says in fault
    assert "quokka" not in fault
    assert found[1, "cpu", 1, 1].fault == ""


def test_a_device_that_is_absent_has_a_row(golden_standin: Path, run_bench: Bench) -> None:
    found = rows(run_bench(golden_standin, devices="tensorrt,cpu"))
    assert "tensorrt" in found[0, "tensorrt:0", None, None].fault
    assert found[0, "cpu", 1, 5].fault == ""


def test_a_batch_without_memory_ends_that_bundle_and_device_only(golden_standin: Path, run_bench: Bench, plant: Any) -> None:
    plant(
        "from vessel_rt.errors import OutOfMemory; from vessel_rt.model.segmenter import Segmenter\n"
        "run = Segmenter.run\n"
        "def short(self, batch, questions):\n"
        "    if len(batch) > 1: raise OutOfMemory('sam2_image_encoder fails on cuda:0: out of memory')\n"
        "    return run(self, batch, questions)\n"
        "Segmenter.run = short"
    )
    found = rows(run_bench(golden_standin, batches=(1, 2, 4), rounds=2))
    assert found[0, "cpu", 1, 5].fault == ""
    assert found[0, "cpu", 2, None].fault == "sam2_image_encoder fails on cuda:0: out of memory"
    assert found[0, "cpu", 4, None].fault == "not tried, since there is no memory for 2 images at once"


def test_a_process_that_dies_has_a_row(golden_standin: Path, run_bench: Bench, plant: Any) -> None:
    plant(
        "import os; from vessel_rt.model.segmenter import Segmenter\n"
        "run = Segmenter.run\n"
        "Segmenter.run = lambda self, batch, questions: os._exit(3) if len(batch) > 1 else run(self, batch, questions)"
    )
    found = rows(run_bench(golden_standin, batches=(1, 2, 4), rounds=2))
    assert [found[0, "cpu", 1, tiles].runs for tiles in (1, 5)] == [2, 2]
    assert found[0, "cpu", 2, None].fault == "its process died (exit code 3)"
    assert found[0, "cpu", 4, None].fault == "not tried, since with 2 images at once its process died (exit code 3)"
    plant("import os; os._exit(4)")
    assert rows(run_bench(golden_standin))[0, "cpu", None, None].fault == "its process died (exit code 4)"


def test_a_bug_in_a_process_is_told_without_names(
    standin: Bundle, run_bench: Bench, tmp_path: Path, plant: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    make_frame().save(folder / "Study-Quokka-B.png")
    plant("from vessel_rt.bench import work\ndef read(frame): raise RuntimeError(f'no way with {frame.path}')\nwork.read = read")
    found = rows(run_bench(standin.folder, inputs=(str(folder),)))
    fault = found[0, "cpu", None, None].fault
    assert "this is a bug of vessel-rt" in fault
    err = capfd.readouterr().err
    assert "Traceback" in err
    for text in (fault, err, *(path.read_text() for path in (tmp_path / "out").iterdir())):
        assert "Quokka" not in text


def test_neither_file_tells_of_frames_folders_and_hosts(
    standin: Bundle, run_bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.node", lambda: "quokka-ward-3")
    folder = tmp_path / "quokka's"
    folder.mkdir()
    make_frame().save(folder / "quokka_4711.png")
    bundle = Path(shutil.copytree(standin.folder, folder / "bundle"))
    found = run_bench(bundle, folder / "none", inputs=(str(folder / "quokka_4711.png"),))
    assert rows(found)[0, "cpu", 1, 7].fault == ""
    for path in (tmp_path / "out").iterdir():
        text = path.read_text()
        assert "quokka" not in text.lower()
        assert "4711" not in text
        assert str(tmp_path) not in text


# ---- what is refused -------------------------------------------------------------------------------------------------------------------


def test_without_any_bundle_nothing_is_measured(tmp_path: Path, run_bench: Bench) -> None:
    with pytest.raises(VesselError, match="no bundle here"):
        run_bench(tmp_path)
    assert not (tmp_path / "out").exists()


def test_without_frames_and_goldens_it_says_what_to_do(standin: Bundle, run_bench: Bench) -> None:
    with pytest.raises(VesselError, match="no bundle has goldens"):
        run_bench(standin.folder)


def test_a_frame_that_cannot_be_read_is_found_before_anything_is_measured(standin: Bundle, run_bench: Bench, frames: Path) -> None:
    (frames / "b_quokka.png").write_text("no image")
    with pytest.raises(VesselError, match=r"frame 3 of 4 \(\w+\): ") as caught:
        run_bench(standin.folder, inputs=(str(frames),))
    assert "quokka" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "gt.json"),
        ("[", "gt.json"),
        ('[{"image": "other.png", "text": ["vessel"], "mask": [[[1, 1, 9, 1, 9, 9]]]}]', "no ground truth for any of the frames"),
        ('[{"image": "a.jpg", "text": ["stent"], "mask": [[[1, 1, 9, 1, 9, 9]]]}]', "no concept that the question names"),
    ],
    ids=["missing", "no JSON", "of other frames", "of other concepts"],
)
def test_ground_truth_that_cannot_be_used(
    standin: Bundle, run_bench: Bench, frames: Path, tmp_path: Path, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "gt.json").write_text(content)
    with pytest.raises((VesselError, OSError)) as caught:
        run_bench(standin.folder, inputs=(str(frames),), truth=tmp_path / "gt.json")
    assert says in f"{caught.value}{getattr(caught.value, 'filename', '')}"


def test_ground_truth_that_lacks_a_concept_gives_no_dice_and_a_warning() -> None:
    class Lacking:
        def concepts(self, question: str) -> list[str | None]:
            return ["vessel"]

        def mask(self, line: Any, concept: str | None) -> None:
            return None

    warned: list[str] = []
    scorer = _Scorer(FrameSet("given", (), ()), "vessel and stent", (Path("gt.json"), Lacking()), warned.append)

    class Configuration:
        is_reference = False

    two = [PackedMask((1, 1), b"\x80")] * 2
    for _ in range(2):
        assert scorer.score({0: two}, 1, Configuration()) == (None, None)  # type: ignore[arg-type]
    [warning] = warned
    assert "it has only 'vessel', but answers have 2 masks" in warning


def test_a_stopped_bench_leaves_what_it_measured(
    golden_standin: Path, run_bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, real = [], module.measure_apart

    def interrupted(work: Any, hear: Any) -> str | None:
        if measured:
            raise KeyboardInterrupt
        measured.append(work)
        return real(work, hear)

    monkeypatch.setattr(module, "measure_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_bench(golden_standin, rounds=2)
    found = json.loads((tmp_path / "out" / BENCH_FILE).read_text())
    assert found["runs"][0]["finished"] is False
    assert len(found["runs"][0]["rows"]) == 2
    assert "NOT FINISHED" in (tmp_path / "out" / "bench.html").read_text()

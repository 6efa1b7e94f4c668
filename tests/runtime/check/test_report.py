"""check.html: the same as check.json, in one page that loads nothing."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from vessel_rt.check.report import page, write_check
from vessel_rt.check.schema import BatchSpeed, CheckedBundle, CheckFile, CheckLine, StageError, StepTime
from vessel_rt.errors import VesselError
from vessel_rt.measure.schema import MachineFacts, MachineGpu


def found_on(*devices: str) -> CheckFile:
    """What was found on some devices: every outcome, and every kind of figure."""
    gpus, versions = (MachineGpu("Card", "sm86", 24 << 30),), {"onnxruntime": "1.32.0"}
    lines, stages, times, batches = [CheckLine("machine", "software", None, "pass", "vessel-rt 0.1.0")], [], [], []
    for device in devices:
        lines.append(CheckLine("parity", "vision_encoder", device, "fail", "image_embeds 1.0e+00", "<off> & 'wrong'"))
        lines.append(CheckLine("endurance", "soak", device, "skip", "", "give --minutes"))
        stages += [StageError(device, "vision_encoder", "image_embeds", error, 0.02, 1) for error in (0.0, 1e-3, 1.0, None)]
        for tiles in (1, 10):
            times += [StepTime(device, tiles, "read_it", 3, 1.0, 2.0), StepTime(device, tiles, "total", 3, 10.0, 12.0, 5.0)]
        batches += [BatchSpeed(device, 1, batch, 3.5 * batch) for batch in (1, 2)]
    return CheckFile(
        verdict="FAIL: parity: vision_encoder on cuda:0",
        passed=False,
        finished=True,
        started="2026-01-02T03:04:05+00:00",
        seconds=12.3,
        machine=MachineFacts("Linux x86_64", "A <processor>", 8, ("avx2",), 32 << 30, gpus, "580.65", versions),
        bundle=CheckedBundle("0" * 64, "fp16", "int8", "iter_1.pth", 28, 6),
        lines=tuple(lines),
        stages=tuple(stages),
        times=tuple(times),
        batches=tuple(batches),
    )


def test_it_shows_everything_and_no_text_is_markup() -> None:
    text = page(found_on("cuda:0"))
    for part in (
        "FAIL: parity: vision_encoder on cuda:0",
        "iter_1.pth, fp16, int8 weights, 28 layers",
        "2026-01-02 03:04:05 UTC",
        "&lt;off&gt; &amp; &#x27;wrong&#x27;",
        "A &lt;processor&gt;",
        "not a number",
        "1 tile<",
        "10 tiles<",
        "read it",
        "2 at once",
        "24.0 GiB",
    ):
        assert part in text
    assert "<off>" not in text
    assert text.count("<u ") == 2  # marks of the floors
    assert text.count('class=fail style="width:100.00%"') == 2  # errors beyond the tolerance, or none


def test_it_loads_and_runs_nothing() -> None:
    text = page(found_on("cuda:0", "cuda:1"))
    assert "default-src 'none'" in text
    assert not re.search(r"<script|<link|<img|src=|https?:|url\(", text)


def test_devices_are_told_apart_where_there_are_several() -> None:
    assert page(found_on("cuda:0", "cuda:1")).count("cuda:1") > page(found_on("cuda:0")).count("cuda:0") > 1


def test_the_same_content_gives_the_same_bytes() -> None:
    assert page(found_on("cpu")) == page(found_on("cpu"))


@pytest.mark.parametrize(("finished", "passed", "outcome"), [(True, True, "pass"), (True, False, "fail"), (False, False, "skip")])
def test_the_outcome_is_in_the_title(finished: bool, passed: bool, outcome: str) -> None:
    found = msgspec.structs.replace(found_on("cpu"), finished=finished, passed=passed)
    assert f"<title>vessel-rt check: {outcome}</title>" in page(found)


def test_a_check_that_only_began_is_a_page_too() -> None:
    assert "<h2>Checks</h2>" in page(msgspec.structs.replace(found_on(), machine=None, bundle=None, lines=()))


def test_both_files_are_replaced_whole(tmp_path: Path, read_only: Path) -> None:
    for _ in range(2):
        write_check(tmp_path / "a" / "b", found_on("cpu"))
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"check.json", "check.html"}
    with pytest.raises(VesselError, match=r"check\.json: cannot be written \(Permission denied\)"):
        write_check(read_only, found_on("cpu"))

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vessel_rt
from tests.support.benches import ONCE
from tests.support.checks import once
from tests.support.disks import SmallDisk
from tests.support.frames import make_frame
from tests.support.paths import ROOT
from vessel_rt.cli import main
from vessel_rt.formats.bundle import BUNDLE_FILE, SCHEMA, Bundle
from vessel_rt.inputs.pseudonyms import StudyCodes

TOLD = ("run.json", "timings.jsonl", "report.html")  # of the run, not of the frames


def infer(*arguments: str | Path) -> int:
    return main(["infer", *map(str, arguments), "--threads", "1", "--device", "cpu"])


@pytest.fixture
def engines(standin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two bundles under engines/, of which `new` is the newer, and one that is not complete."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VESSEL_BUNDLE", raising=False)
    for age, name in ((100, "old"), (50, "new"), (0, ".newest.partial")):
        folder = shutil.copytree(standin.folder, tmp_path / "engines" / name)
        os.utime(folder / BUNDLE_FILE, (time.time() - age, time.time() - age))
    (tmp_path / "engines" / "unfinished").mkdir()
    return tmp_path / "engines"


def test_the_newest_complete_bundle_is_taken_and_named(engines: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer(frames) == 0
    out, err = capsys.readouterr()
    assert "bundle engines/new" in err
    assert "images: 3, failed: 0, masks: 3" in out
    assert "images/s" in out
    assert out.splitlines()[-1] == "results: out/new"
    assert {path.name for path in Path("out/new").iterdir()} == {
        "masks",
        "overlays",
        "previews",
        "report.html",
        "results.jsonl",
        "run.json",
        "timings.jsonl",
    }


def test_the_environment_names_a_bundle_and_the_option_goes_before_it(
    engines: Path, frames: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VESSEL_BUNDLE", str(engines / "old"))
    assert infer(frames) == 0
    assert Path("out/old/run.json").exists()
    assert f"bundle {engines / 'old'}" in capsys.readouterr().err
    assert infer(frames, "--bundle", engines / "new", "-o", "here", "--num-images", "1", "--prompt", "Where?") == 0
    run = json.loads(Path("here/run.json").read_text())
    assert (run["bundle"]["name"], run["counts"]["images"], run["options"]["questions"]) == ("new", 1, ["Where?"])


def test_no_bundle(tmp_path: Path, frames: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VESSEL_BUNDLE", raising=False)
    assert infer(frames) == 1
    assert capsys.readouterr().err.startswith("vessel-rt: error: no bundle: name one with --bundle")


def test_failed_images_make_the_exit_code_1(engines: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (frames / "b_empty.jpg").write_bytes(b"")
    assert infer(frames) == 1
    out, err = capsys.readouterr()
    assert "images: 4, failed: 1, masks: 3" in out
    assert f"vessel-rt: error: frame 3 of 4 ({StudyCodes.load().code('b_empty')}): an empty file" in err
    assert infer(frames, "--show-names", "--overwrite") == 1
    assert f"vessel-rt: error: {frames / 'b_empty.jpg'}: an empty file" in capsys.readouterr().err


def test_a_bench_prints_a_table_and_its_files_can_be_compared(
    engines: Path, frames: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vessel_rt.bench.process._PROGRAM", f"{ONCE}from vessel_rt.bench.process import serve; serve()")
    assert main(["bench", str(frames), "--device", "cpu", "--threads", "1", "--rounds", "1", "--batch", "1", "2"]) == 0
    out, err = capsys.readouterr()
    assert "bundle engines/new" in err
    head, one, two, machine, report = out.splitlines()
    assert head.split()[:5] == ["bundle", "device", "tiles", "batch", "images/s"]
    assert [line.split()[:4] for line in (one, two)] == [["fp32", "cpu", "7", batch] for batch in "12"]
    assert machine.startswith("machine: ")
    assert report == "report: out/bench/bench.html"
    assert main(["bench", "--compare", "out/bench/bench.json", "out/bench/bench.json", "-o", "both"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [head, one, two]  # the same run, once
    assert Path("both/bench.json").read_bytes() == Path("out/bench/bench.json").read_bytes()
    assert main(["bench", "--compare", "out/bench/bench.html"]) == 1
    assert "bench.html: not a bench.json" in capsys.readouterr().err
    assert main(["bench", str(frames), "--device", "tensorrt"]) == 1  # nothing could be measured
    assert "fp32 on tensorrt:0: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gt", "a.json"], "--gt needs IMAGES"),
        (["--compare", "a.json", "--bundle", "b"], "--compare measures nothing"),
        (["--compare"], "--compare"),
        (["--batch", "0"], "not a positive number"),
        (["--device", "toaster"], "not a device"),
        (["--rounds", "1000"], "too many"),
    ],
)
def test_a_bench_with_options_that_do_not_agree(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_a_check_prints_a_line_for_each_and_the_verdict(
    engines: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    once(monkeypatch)
    assert main(["check", "--device", "cpu", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert "bundle engines/new" in err
    lines = out.splitlines()
    assert [line for line in lines[:-2] if not line.startswith(" ")] == [
        "machine", "bundle", "providers", "loading", "parity", "determinism", "speed", "memory", "cines", "endurance"
    ]  # fmt: skip
    assert lines[-2].startswith("PASS: ")
    assert lines[-1] == "report: out/check-new/check.html"
    flipped = engines / "new" / "tokenizer.json"
    flipped.write_text("{}")
    assert main(["check", "--device", "cpu", "--bundle", str(engines / "new"), "-o", "here", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["verdict"]) == (False, "FAIL: bundle: files; 6 passed")
    assert found == json.loads(Path("here/check.json").read_text())


def test_user_errors_are_one_line(engines: Path, frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    newer = engines / "old" / BUNDLE_FILE
    newer.write_text(json.dumps(json.loads(newer.read_text()) | {"schema": SCHEMA + 1}))
    flipped = engines / "new" / "weights" / "embed_tokens.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    for arguments, message in [
        ((tmp_path / "empty", "--bundle", engines / "new"), "holds no image"),
        ((frames, "--bundle", engines / "new", "-o", tmp_path / "full"), "--overwrite"),
        ((frames, "--bundle", engines / "old"), f"schema {SCHEMA + 1} is newer"),
        ((frames, "--bundle", engines / "new"), "embed_tokens.safetensors was changed"),
        ((frames, "--bundle", tmp_path / "none"), "no bundle here"),
    ]:
        assert infer(*arguments) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("vessel-rt: error: ")
        assert message in line


@pytest.mark.parametrize("devices", ["--devices=cpu:1", "--devices=cpu:2"])
def test_a_folder_that_cannot_be_written_to(
    engines: Path, frames: Path, read_only: Path, devices: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in (read_only, read_only / "out"):
        assert main(["infer", str(frames), "-o", str(output), "-q", devices]) == 1
        assert capsys.readouterr().err == f"vessel-rt: error: {output}: cannot be written (Permission denied)\n"


@pytest.mark.parametrize("devices", ["--devices=cpu:1", "--devices=cpu:2"])
def test_a_disk_that_fills_up_keeps_what_is_done(
    engines: Path, tmp_path: Path, small_disk: SmallDisk, devices: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(40):
        make_frame(seed=number).resize((200, 140)).save(tmp_path / "in" / f"{number:02}.png")
    out = small_disk.folder / "out"
    run = ["infer", str(tmp_path / "in"), "-o", str(out), "-q", devices]
    with small_disk.full(20_000):  # bytes: more than any file of a frame, fewer than the journal of 40 frames
        assert main(run) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"vessel-rt: error: {out}")
    assert line.endswith(f"cannot be written ({small_disk.message})")
    files = {path.relative_to(out).as_posix() for path in out.rglob("*.*")}
    listed = {file for line in _lines_so_far(out) for file in line["files"]}
    assert 0 < len(listed) < 3 * 40
    assert files - {"journal.jsonl", "results.jsonl", "timings.jsonl"} == listed
    shutil.copytree(out, tmp_path / "out")
    assert main([*run[:3], str(tmp_path / "out"), devices]) == 0
    assert f"images: 40, {len(listed) // 3} of them done before, failed: 0" in capfd.readouterr().out


def _lines_so_far(output: Path) -> list[Any]:
    """Of the journal, unless what was cut short left room for the results that are made of it."""
    if not (output / "journal.jsonl").exists():
        return [json.loads(text) for text in (output / "results.jsonl").read_text().splitlines()]
    return [line for text in (output / "journal.jsonl").read_text().splitlines()[1:] for line in json.loads(text)["lines"]]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["infer"],
        ["infer", "x", "--device", "tpu"],
        ["infer", "x", "--num-images", "0"],
        ["infer", "x", "--threads", "-1"],
        ["infer", "x", "--devices", "cpu,0"],
        ["infer", "x", "--devices", "0,0"],
        ["infer", "x", "--device", "cpu", "--devices", "cpu:2"],
        ["infer", "x", "--frames", "1:2:0"],
        ["infer", "x", "--num-shards", "2"],
        ["infer", "x", "--num-shards", "2", "--shard-id", "2"],
        ["infer", "x", "--shard-id", "1"],
        ["infer", "x", "--shard-id", "0"],
        ["infer", "x", "--num-shards", "2", "--shard-id", "-1"],
        ["infer", "x", "--prompt", "caf\udce9"],
        ["--print-completion", "cmd.exe"],
        ["plan", "--memory", "none"],
        ["check", "--minutes", "-1"],
        ["check", "--minutes", "soon"],
        ["check", "--device", "cpu", "--devices", "cpu:2"],
        ["fly"],
    ],
)
def test_bad_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "vessel-rt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-shards", "4", "--shard-id", "4"], "from 0 to 3"),
        (["--num-shards", "4"], "from 0 to 3"),
        (["--num-shards", "1", "--shard-id", "7"], "from 0 to 0"),
        (["--shard-id", "0"], "needs --num-shards"),
    ],
)
def test_parts_out_of_range_name_the_range(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["infer", "x", *options])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_an_argument_that_is_no_utf8_is_bad_usage() -> None:
    program = "import sys; from vessel_rt.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, "infer", "x", "--prompt", b"caf\xe9"], capture_output=True)
    assert done.returncode == 2
    assert b"argument --prompt" in done.stderr.splitlines()[-1]
    assert b"is not UTF-8 text" in done.stderr.splitlines()[-1]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit) as caught:
            main([option])
        assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"vessel-rt {vessel_rt.__version__}" in out
    assert "examples:" in out


@pytest.mark.parametrize("command", ["infer", "evaluate", "check-data", "report", "merge-shards", "devices", "plan", "check"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "usage: vessel-rt" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
@pytest.mark.parametrize("program", ["vessel-rt", "vessel-export"])
def test_completion(shell: str, program: str, capsys: pytest.CaptureFixture[str]) -> None:
    from vessel_export.cli import main as export_main

    with pytest.raises(SystemExit) as caught:
        (main if program == "vessel-rt" else export_main)(["--print-completion", shell])
    assert caught.value.code == 0
    assert program in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_bash_completes_commands_options_and_paths(frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    for words, wanted in (
        (["inf"], "infer"),
        (["infer", "--dev"], "--devices"),
        (["infer", f"{frames}/"], f"{frames}/a.jpg"),
        (["infer", "--bundle", f"{frames}/b"], f"{frames}/b.png"),
    ):
        typed = f"COMP_WORDS=(vessel-rt {' '.join(words)}); COMP_CWORD={len(words)}; _shtab_vessel_rt"
        asked = f"{script}\n{typed}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
        assert wanted in done.stdout.splitlines(), words


def test_json_is_the_last_line(engines: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer(frames, "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["output"], found["images"], found["kept"], found["exit_code"], found["stopped"]) == ("out/new", 3, 0, 0, None)
    assert infer(frames, "--json", "-q") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["kept"] == 3
    assert err == ""
    assert infer("none", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["error"].startswith("input 1 of 1: no such file or folder")
    assert found["exit_code"] == 1


def test_shards_of_a_run_merge_into_what_one_run_leaves(engines: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in ("0", "1"):
        assert infer(frames, "-o", f"shard{shard}", "--num-shards", "2", "--shard-id", shard) == 0
    assert infer(frames, "-o", "whole") == 0
    assert main(["merge-shards", "shard1", "shard0", "-o", "merged"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "results: merged"
    whole = {path.relative_to("whole"): path.read_bytes() for path in Path("whole").rglob("*.*") if path.name not in TOLD}
    assert whole == {path.relative_to("merged"): path.read_bytes() for path in Path("merged").rglob("*.*") if path.name not in TOLD}
    assert json.loads(Path("merged/run.json").read_text())["counts"]["images"] == 3


def test_a_bug_shows_its_traceback_without_names(
    engines: Path, frames: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(path: Path) -> None:
        raise RuntimeError(f"no way with {path}")

    (frames / "a.jpg").rename(frames / "Study-Quokka.jpg")
    monkeypatch.setattr("vessel_rt.inputs.frames.input_sha256", broken)
    assert infer(frames) == 1
    out, err = capsys.readouterr()
    assert "Traceback" in err
    assert "no way with" in err
    assert "Quokka" not in out + err


def test_a_bug_with_short_names_keeps_its_numbers(
    engines: Path, frames: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(path: Path) -> None:
        raise RuntimeError(f"no way with {path}, {path.name}: 1 of 78 at line 86")

    for number, name in (("1", "a.jpg"), ("86", "b.png"), ("78", "c.tif")):
        (frames / name).rename(frames / f"{number}{Path(name).suffix}")
    monkeypatch.setattr("vessel_rt.inputs.frames.input_sha256", broken)
    assert infer(frames) == 1
    err = capsys.readouterr().err
    assert ": 1 of 78 at line 86" in err
    assert not re.search(r"\b(1|86|78)\.(jpg|png|tif)", err)
    assert "/frames.py" in err or "/worker.py" in err


def test_evaluate_prints_the_mean_dice_last(engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "frames").mkdir()
    make_frame(96, 64).save(tmp_path / "frames" / "a.png")
    bar = [0, 20, 96, 20, 96, 32, 0, 32]  # make_frame's bar, as the stand-in finds it
    gt = tmp_path / "annotations.json"
    gt.write_text(json.dumps([{"image": "a.png", "mask": [[bar]], "text": ["vessel"]}]))
    assert infer("frames") == 0
    assert main(["evaluate", "out/new", "--gt", str(gt)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "mean Dice vessel: 1.000 over 1 images"
    assert main(["evaluate", "out/nothing", "--gt", str(gt)]) == 1


def test_devices_lists_every_kind(standin: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--bundle", str(standin.folder)]) == 0
    types, *lines = capsys.readouterr().out.splitlines()
    assert types == f"{standin.folder}: fp32, with fp32 weights"
    assert lines[-1].split() == ["cpu", "-", "usable"]
    assert main(["devices", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["device"] for entry in entries] == [line.split()[0] for line in lines]
    assert main(["devices", "--bundle", str(standin.folder / "none")]) == 1


def test_plan_prints_and_refuses_what_does_not_fit(fp16_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "--bundle", str(fp16_bundle)]
    assert main([*plan, "--memory", "24", "--batch", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("of 24.0 GiB")
    assert main([*plan, "--memory", "0.9", "--batch", "4", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["fits"] is False
    assert err.startswith(f"vessel-rt: error: {fp16_bundle}: takes ")
    assert "lower engines.max_batch (--batch) to 1" in err
    recipe = tmp_path / "small.toml"
    text = (ROOT / "engines" / "rtx3090.toml").read_text()
    recipe.write_text(re.sub(r"memory_gib = [\d.]+", "memory_gib = 0.5", text))
    assert main([*plan, "--recipe", str(recipe)]) == 1
    assert "no batch or capacity is small enough" in capsys.readouterr().err
    recipe.write_text(re.sub(r"capacity = \d+", "capacity = 5120", text))
    assert main([*plan, "--recipe", str(recipe)]) == 1
    assert "language_model.capacity is 5120, the bundle's is 4096" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["infer", "x" * 300],
        ["infer", "frames", "-o", "y" * 300],
        ["evaluate", "out/none", "--gt", "z" * 300],
        ["check-data", "nothing.json", "--images", "frames"],
        ["check-data", "deep.json", "--images", "frames"],
        ["check-data", "long.json", "--images", "frames"],
        ["report", "frames"],
        ["merge-shards", "frames", "-o", "merged"],
    ],
)
def test_whatever_is_given_an_error_is_one_line(
    arguments: list[str], engines: Path, frames: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("deep.json").write_text("[" * 100_000)
    Path("long.json").write_text(json.dumps([{"image": "w" * 300, "mask": [[[1, 1, 9, 1, 9, 9]]], "text": ["vessel"]}]))
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if "long.json" not in arguments:  # a fault of an item, and no error
        assert len([line for line in err.splitlines() if line.startswith("vessel-rt: error: ")]) == 1


def test_texts_that_are_no_unicode(engines: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item = {"image": "a\ud800.png", "mask": [[[1, 1, 9, 1, 9, 9]]], "text": ["vessel\udc80"]}
    Path("odd.json").write_text(json.dumps([item, item | {"image": "a.jpg"}]))
    assert main(["check-data", "odd.json", "--images", str(frames), "--fix", "fixed.json"]) == 1
    assert json.loads(Path("fixed.json").read_text()) == [item | {"image": "a.jpg"}]
    (frames / "a.jpg").rename(frames / os.fsdecode(b"caf\xe9.jpg"))
    assert infer(frames, "--show-names") == 0
    assert "caf\\udce9.jpg" in Path("out/new/report.html").read_text()


def test_a_reader_that_goes_away_is_no_error() -> None:
    program = "import sys; from vessel_rt.cli import main; sys.exit(main(['devices', '--json']))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A frame of 16-bit gray, in no file's range but its own."""
    gray = np.asarray(make_frame().convert("L")).astype(np.uint16)
    (tmp_path / "deep").mkdir()
    Image.fromarray(gray * np.uint16(100) + np.uint16(5000)).save(tmp_path / "deep" / "a.png")
    return tmp_path / "deep"


def test_deep_gray_is_an_error_until_it_is_rescaled(engines: Path, deep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer(deep, "-o", "plain", "-q") == 1
    assert "16-bit gray" in (said := capsys.readouterr().err)
    assert "--rescale" in said
    assert infer(deep, "-o", "scaled", "--rescale") == 0
    assert infer(deep, "-o", "window", "--rescale", "8000:27000") == 0
    gray = np.asarray(Image.open(deep / "a.png")).astype(float)
    for folder, low, high in (("scaled", gray.min(), gray.max()), ("window", 8000, 27000)):
        eight = np.rint(np.clip((gray - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        Path(folder + "-8").mkdir()
        Image.fromarray(eight).save(f"{folder}-8/a.png")
        assert infer(f"{folder}-8", "-o", f"{folder}-out", "-q") == 0
        assert Path(folder, "masks", "a.png").read_bytes() == Path(f"{folder}-out", "masks", "a.png").read_bytes()
    options = {folder: json.loads(Path(folder, "run.json").read_text())["options"]["rescale"] for folder in ("plain", "scaled", "window")}
    assert options == {"plain": None, "scaled": {"low": None, "high": None}, "window": {"low": 8000.0, "high": 27000.0}}


def test_results_of_another_range_are_not_mixed(engines: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer(frames, "-o", "plain") == 0
    assert infer(frames, "-o", "plain") == 0
    assert infer(frames, "-o", "plain", "--rescale") == 1
    assert "results of another" in capsys.readouterr().err
    assert infer(frames, "-o", "window", "--rescale=0:9") == 0
    assert infer(frames, "-o", "window", "--rescale=0:8") == 1


@pytest.mark.parametrize("text", ["--rescale=9:1", "--rescale=x"])
def test_a_range_that_is_none_is_bad_usage(engines: Path, frames: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        infer(frames, text)
    assert caught.value.code == 2
    assert "LOW:HIGH" in capsys.readouterr().err


def test_pages_are_frames_when_frames_are_asked_for(engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [make_frame(seed=seed) for seed in range(4)]
    pages[0].save(tmp_path / "cine.tif", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    assert infer("cine.tif", "-o", "whole", "-q") == 1
    assert "4 pages" in (said := capsys.readouterr().err)
    assert "--frames" in said
    assert infer("cine.tif", "-o", "out", "--frames", "1:4:2", "-q") == 0
    lines = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert [(line["image"], line["name"], line["frame"]) for line in lines] == [
        ("cine.tif", "cine_frame_000001", 1),
        ("cine.tif", "cine_frame_000003", 3),
    ]
    with Image.open("out/cines/cine.tif") as cine:
        assert cine.n_frames == 2
    pages[3].save(tmp_path / "single.png")
    assert infer("single.png", "-o", "single", "-q") == 0
    assert Path("single/masks/single.png").read_bytes() == Path("out/masks/cine_frame_000003.png").read_bytes()
    told = {name: json.loads(Path(name, "run.json").read_text())["options"]["frames"] for name in ("single", "out")}
    assert told == {"single": None, "out": [1, 4, 2]}


def test_what_is_not_taken_is_told_in_a_line(engines: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (frames / "notes.txt").write_text("")
    (frames / "deeper").mkdir()
    assert infer(frames, "-o", "out") == 0
    assert "skipped in input 1 of 1: 1 .txt, 1 subfolder\n" in capsys.readouterr().err
    assert json.loads(Path("out/run.json").read_text())["skipped"] == {"input 1 of 1": {".txt": 1, "subfolder": 1}}
    assert infer(frames, "-o", "quiet", "-q") == 0
    assert capsys.readouterr().err == ""


def test_a_link_to_nothing_fails_by_its_code_and_the_others_go_on(engines: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (frames / "Study-Quokka").symlink_to("nowhere")
    (frames / "Study-Quokka-2").symlink_to("Study-Quokka-2")
    os.mkfifo(frames / "Study-Quokka-3.dcm")
    for output in ("out", "out"):  # again: what failed is tried again
        assert infer(frames, "-o", output, "-q") == 1
        said = capsys.readouterr().err
        assert said.count("error:") == 3
        assert said.count("\n") == 3
        assert "Quokka" not in said
    lines = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["error"] * 3 + ["ok"] * 3


def test_libtiff_says_nothing(engines: Path, frames: Path, tmp_path: Path) -> None:
    Image.new("1", (96, 64)).save(tmp_path / "whole.tif", compression="group4")
    make_frame().convert("1").save(tmp_path / "whole.tif", compression="group4")
    content = bytearray((tmp_path / "whole.tif").read_bytes())
    for place in range(20, 300, 7):
        content[place] ^= 0xFF
    (frames / "d.tif").write_bytes(content)
    for devices in ("--device=cpu", "--devices=cpu:2"):
        program = "import sys; from vessel_rt.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, "infer", frames, "-o", "out" + devices[-1], "-q", devices, "--threads", "2"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("vessel-rt: error: frame 4 of 4")
        assert done.stderr.count("\n") == 1


def test_names_do_not_control_the_terminal(engines: Path, frames: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(frames / "a.jpg", frames / "a\x1b[2J\r\n.jpg")
    (frames / "b\x1b]0;title\x07.png").write_bytes(b"")
    assert infer(frames, "-o", "out", "--show-names", "-v") == 1
    assert infer(frames / "none\x1b.png", "-o", "none", "--show-names") == 1
    assert infer(frames, "-o", "out\x1b[2J\n.txt", "--show-names") == 1
    out, err = capfd.readouterr()
    assert not {"\x1b", "\x07", "\r"} & {*out, *err}
    assert r"\x1b[2J\r\n.jpg" in err

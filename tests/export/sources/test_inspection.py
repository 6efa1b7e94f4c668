"""`vessel-export inspect`: what it tells of good checkpoints, and of those that an export would refuse."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.paths import Tiny
from vessel_export.cli import main
from vessel_export.errors import CheckpointError
from vessel_export.sources.checkpoint import open_checkpoint
from vessel_export.sources.inspection import inspect_checkpoint, inspect_folder
from vessel_export.sources.inspection_report import print_report
from vessel_export.sources.mmengine_config import UNKNOWN
from vessel_export.sources.names import LORA_PREFIX


def saved(tiny: Tiny, path: Path, change: Any = lambda tensors: None, meta: Any = None) -> Path:
    """The tiny checkpoint without mmengine's records, changed."""
    tensors = dict(open_checkpoint(tiny.checkpoint).tensors)
    change(tensors)
    torch.save({"state_dict": tensors, "meta": meta or {}}, path)
    return path


def test_the_tiny_checkpoint(tiny: Tiny) -> None:
    report = inspect_checkpoint(tiny.checkpoint)
    assert {group.name: group.tensors for group in report.groups} == {
        "LoRA": 42,
        "modules_to_save": 2,
        "projector": 6,
        "prompt head": 4,
        "SAM2 mask decoder": 131,
    }
    assert {
        key: report.training[key] for key in ("epoch", "iteration", "iterations in all", "optimiser", "learning rate", "weight decay")
    } == {
        "epoch": 0,
        "iteration": 1000,
        "iterations in all": 1000,
        "optimiser": "AdamW",
        "learning rate": 0.001,
        "weight decay": 0.05,
    }
    assert (report.lora["rank"], report.lora["alpha"], report.lora["dropout"], len(report.lora["targets"])) == (8, 16.0, 0.05, 7)
    assert report.losses == (("loss_dice", "DiceLoss", 1.0), ("loss_mask", "CrossEntropyLoss", 3.0))
    assert report.problems == ()
    assert any(line.startswith("merge 21 pairs") and "W + 2 B A" in line for line in report.export)


def test_what_a_plain_state_dict_does_not_tell_is_unknown(tiny: Tiny, tmp_path: Path) -> None:
    report = inspect_checkpoint(saved(tiny, tmp_path / "plain.pth"))
    assert report.training["optimiser"] == report.training["iteration"] == report.lora["alpha"] == UNKNOWN
    assert report.losses == ()
    [problem] = report.problems
    assert "--lora-alpha" in problem
    assert "2 r = 16" in problem


def test_everything_that_would_stop_an_export_is_a_problem(tiny: Tiny, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[LORA_PREFIX + "model.layers.1.mlp.up_proj.lora_B.weight"]
        del tensors["text_hidden_fcs.2.bias"]
        for name in [name for name in tensors if "sam_mask_decoder" in name]:
            del tensors[name]
        tensors["mllm.extra"] = torch.ones(1)
        tensors["mllm.model.mlp1.0.bias"] = torch.ones(0)

    found = " ".join(inspect_checkpoint(saved(tiny, tmp_path / "bad.pth", damage, {"cfg": "a = dict(lora_alpha=16)"})).problems)
    assert "--skip mllm.extra" in found
    assert "LoRA: 1 of 42 tensors" in found
    assert "prompt head: 1 of 4 tensors are missing, the first is text_hidden_fcs.2.bias" in found
    assert "SAM2 mask decoder" in found
    assert "mllm.model.mlp1.0.bias is empty" in found


def test_a_folder_tells_the_latest_and_how_far_it_is(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = {"iter": 250, "cfg": "train_cfg = dict(max_iters=1000)"}
    for number in (250, 500, 1500):
        saved(tiny, tmp_path / f"iter_{number}.pth", meta=meta)
    report = inspect_folder(tmp_path)
    assert [row[::2] for row in report.checkpoints] == [("iter_250.pth", 250), ("iter_500.pth", 500), ("iter_1500.pth", 1500)]
    assert (report.latest, report.latest_by) == ("iter_1500.pth", "the highest number")
    (tmp_path / "last_checkpoint").write_text("/somewhere/else/work_dirs/iter_250.pth\n")
    report = inspect_folder(tmp_path)
    assert (report.latest, report.latest_by, report.iteration, report.iterations) == ("iter_250.pth", "last_checkpoint", 250, 1000)
    print_report(report)
    assert "250 of 1000, 25 %" in capsys.readouterr().out


def test_a_last_checkpoint_that_is_gone_or_damaged_is_a_problem(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copy(tiny.checkpoint, tmp_path / "iter_10.pth")
    (tmp_path / "last_checkpoint").write_text("work_dirs/iter_20.pth")
    assert "iter_20.pth" in inspect_folder(tmp_path).problems[0]
    os.truncate(tmp_path / "iter_10.pth", 1000)
    assert str(tmp_path / "iter_10.pth") in inspect_folder(tmp_path).problems[1]


def test_a_folder_without_checkpoints_names_the_one_inside(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: no iter_*.pth")):
        inspect_folder(tmp_path)
    (tmp_path / "run_a").mkdir()
    shutil.copy(tiny.checkpoint, tmp_path / "run_a" / "iter_10.pth")
    with pytest.raises(CheckpointError, match=re.escape(f"inspect {tmp_path / 'run_a'}")):
        inspect_folder(tmp_path)


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_command(tiny: Tiny, capsys: pytest.CaptureFixture[str], form: list[str]) -> None:
    assert main(["inspect", str(tiny.checkpoint.parent), *form]) == 0
    out = capsys.readouterr().out
    assert "LoRA" in out
    if form == ["--json"]:
        assert json.loads(out)["checkpoint"]["training"]["iteration"] == 1000


def test_a_checkpoint_without_a_tensor_that_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "iter_1.pth")
    for form in ([], ["--json"]):
        assert main(["inspect", str(tmp_path / "iter_1.pth"), *form]) == 0
        assert "a is unknown" in capsys.readouterr().out


def test_tensors_that_cannot_be_exported_are_problems(tiny: Tiny, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["steps"] = torch.ones(1, dtype=torch.int64)
        tensors["mask"] = torch.ones(2, 2).to_sparse()

    problems = inspect_checkpoint(saved(tiny, tmp_path / "c.pth", change)).problems
    assert any(line.startswith("steps is int64") and "--skip steps" in line for line in problems)
    assert any(line.startswith("mask is sparse") for line in problems)

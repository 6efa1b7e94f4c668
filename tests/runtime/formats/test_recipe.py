from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from tests.support.paths import ROOT
from vessel_rt.errors import RecipeError
from vessel_rt.formats.recipe import load_recipe, recipe_names

TEXT = (ROOT / "engines" / "rtx3090.toml").read_text(encoding="utf-8")


def test_the_projects_recipes() -> None:
    cpu, gpu = (load_recipe(ROOT / "engines" / f"{name}.toml") for name in ("cpu", "rtx3090"))
    assert (cpu.name, cpu.precision, cpu.engines) == ("cpu", "fp32", None)
    assert gpu.engines
    for plain in (cpu, gpu):  # the quantized recipes differ in their weights only
        small = load_recipe(ROOT / "engines" / f"{plain.name}-int8.toml")
        assert small == msgspec.structs.replace(plain, name=small.name, weights="int8", keep=small.keep)
        assert small.keep[0] == "*.self_attn.k_proj.weight"
    assert (gpu.engines.architecture, gpu.engines.max_batch, gpu.language_model.capacity) == ("sm86", 4, 4096)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("capacity = 4096", "capacity = 0", "language_model.capacity"),
        ("capacity = 4096", "capacity = 99999999", "language_model.capacity"),
        ("capacity = 4096", "capacity = 0x" + "f" * 9000, ""),
        ("capacity = 4096", "capacity = " + "9" * 5000, ""),
        ("capacity = 4096", "capacity = true", "language_model.capacity"),
        ("capacity = 4096", "", "missing key language_model.capacity"),
        ("capacity = 4096", "capacity = 4096\ncapacities = 1", "unknown key language_model.capacities"),
        ("memory_gib = 23.7", "memory_gib = nan", "engines.memory_gib"),
        ("memory_gib = 23.7", "memory_gib = inf", "engines.memory_gib"),
        ("memory_gib = 23.7", "memory_gib = '24'", "engines.memory_gib"),
        ("max_batch = 4", "max_batch = 1000000", "engines.max_batch"),
        ("opt_batch = 1", "opt_batch = 5", "engines.opt_batch"),
        ('"sm86"', '"sm8\\u0000"', "engines.architecture"),
        ('"sm86"', '"../sm86"', "engines.architecture"),
        ('"fp16"', '"fp17"', "precision"),
        ('"fp16"', '"fp16"\nweights = "int3"', "weights is 'int3'"),
        ('"fp16"', '"fp16"\nweights = 8', "weights"),
        ('"fp16"', '"fp16"\nkeep = ["lm_head.weight"]', "keep"),
        ('precision = "fp16"', 'name = "x"\nprecision = "fp16"', "unknown key name"),
        ('precision = "fp16"', "precision = " + "[" * 50_000, ""),
        ('precision = "fp16"', "\ufeffprecision = 'fp16'", ""),
        ('precision = "fp16"', "precision = 'fp16'\0", ""),
    ],
)
def test_what_is_wrong_is_named_with_the_file_in_one_line(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = tmp_path / "odd.toml"
    assert old in TEXT
    path.write_text(TEXT.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "rtx3090.toml").write_text(TEXT, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "rtx3090.toml") == load_recipe("rtx3090")


def test_a_recipe_that_is_no_file_of_text(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "nowhere.toml", tmp_path, tmp_path / "bytes.toml", Path(os.devnull)):
        with pytest.raises(RecipeError, match=str(path)):
            load_recipe(path)


def test_the_projects_recipes_go_by_their_names_wherever_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_names() == ("cpu", "cpu-int8", "rtx3090", "rtx3090-int8")
    for name in recipe_names():
        assert load_recipe(name) == load_recipe(ROOT / "engines" / f"{name}.toml")
    with pytest.raises(RecipeError, match="cpu or cpu-int8 or rtx3090"):
        load_recipe("a100")

"""SAM2's yaml and .pt: only what SAM 2.0's own configurations name is built, and only whole tensors are read."""

from __future__ import annotations

import importlib.resources
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.support.paths import Tiny
from vessel_export.errors import BaseModelError
from vessel_export.sources.base_model import open_sam2
from vessel_export.sources.sam2_files import build_sam2, find_sam2_yaml, parse_sam2_config, read_sam2_config, read_sam2_state

SAM2 = importlib.resources.files("sam2").joinpath("configs", "sam2")
TEXT = SAM2.joinpath("sam2_hiera_t.yaml").read_text(encoding="utf-8")
CALL = "shutil.copyfile"


@pytest.mark.parametrize("size", ["t", "s", "b+", "l"])
def test_sam2s_own_configurations_are_built_as_hydra_builds_them(size: str) -> None:
    path = Path(str(SAM2.joinpath(f"sam2_hiera_{size}.yaml")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = build_sam2(read_sam2_config(path)).state_dict()
        torch.manual_seed(0)
        theirs = instantiate(OmegaConf.load(path).model, _recursive_=True).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_configurations_are_found_beside_the_weights_and_by_metas_names(tiny: Tiny) -> None:
    assert find_sam2_yaml(tiny.sam2) == tiny.sam2.with_suffix(".yaml")
    for name in ("sam2_hiera_large.pt", "sam2_hiera_tiny.pt"):
        assert find_sam2_yaml(Path(name)).is_file()
    with pytest.raises(BaseModelError, match=r"other\.yaml"):
        find_sam2_yaml(Path("other.pt"))


def edited(edit: Any) -> str:
    document = yaml.safe_load(TEXT.replace("1e-6", "1.0e-6"))
    edit(document["model"])
    return yaml.safe_dump(document)


HOSTILE_TEXTS = {
    "a quoted key": TEXT.replace("    scalp: 1", f'    scalp: 1\n    x: {{"_target_": {CALL}, src: a, dst: b}}'),
    "a quoted key in place of the class": TEXT.replace("_target_: sam2.modeling.backbones.hieradet.Hiera", f'"_target_": {CALL}'),
    "an escaped key": TEXT.replace("_target_: sam2.modeling.backbones.hieradet.Hiera", f'"\\x5ftarget_": {CALL}'),
    "a flow mapping": TEXT.replace("    scalp: 1", f"    scalp: {{_target_: {CALL}}}"),
    "in a list": TEXT.replace("stages: [1, 2, 7, 2]", f"stages: [1, {{_target_: {CALL}}}]"),
    "in a list of lists": TEXT.replace("stages: [1, 2, 7, 2]", f"stages: [[[{{_target_: {CALL}}}]]]"),
    "a multi-line key": TEXT.replace("    scalp: 1", f"    ? _target_\n    : {CALL}\n    scalp: 1"),
    "a merge key": TEXT.replace("    scalp: 1", f"    scalp: 1\n    <<: {{x: {{_target_: {CALL}}}}}"),
    "a merge key that takes the class's place": TEXT.replace(
        "      _target_: sam2.modeling.backbones.hieradet.Hiera", f"      <<: {{_target_: {CALL}}}"
    ),
    "an anchor and an alias": TEXT.replace("scalp: 1", "scalp: &a 1").replace("num_maskmem: 7", "num_maskmem: *a"),
    "an interpolation": TEXT.replace("scalp: 1", "scalp: ${oc.env:HOME}"),
    "an interpolation as a class": TEXT.replace("_target_: sam2.modeling.backbones.hieradet.Hiera", "_target_: ${model._target_}"),
    "an interpolation in a key": TEXT.replace("scalp: 1", "${oc.env:HOME}: 1"),
    "a tag": TEXT.replace("scalp: 1", f"scalp: !!python/object/apply:{CALL} [a, b]"),
    "a class that is a number": TEXT.replace("_target_: sam2.modeling.backbones.hieradet.Hiera", "_target_: 5"),
    "a class that is a list": TEXT.replace("_target_: sam2.modeling.backbones.hieradet.Hiera", "_target_: [a]"),
    "a class that is missing": TEXT.replace("_target_: sam2.modeling.backbones.hieradet.Hiera", "x: 1"),
    "a billion laughs": "a: &a [x, x]\n" + "".join(f"{n}: &{n} [*{p}, *{p}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)) + TEXT,
    "great depth": "model: " + "[" * 5000 + "]" * 5000,
    "great length": TEXT + "# x\n" * 20_000,
    "a key twice": TEXT + "\n  image_size: 5\n",
    "two documents": TEXT + "\n---\nmodel: 1\n",
    "no YAML": "model: [",
    "a NUL": "model: \0",
    "nothing": "",
    "a list": "- 1",
    "no model": "x: 1",
    "a missing value": TEXT.replace("scalp: 1", "scalp: ???"),
    "a relative infinity": TEXT.replace("scalp: 1", "scalp: .inf"),
    "a date": TEXT.replace("scalp: 1", "scalp: 2001-01-01"),
}
HOSTILE_EDITS = {
    "another class of sam2": lambda m: m.update(_target_="sam2.modeling.sam2_utils.MLP"),
    "another function of sam2": lambda m: m["image_encoder"].update(_target_="sam2.modeling.backbones.hieradet.torch.load"),
    "a class that is not the model": lambda m: m.update(m.pop("image_encoder")),
    "an unknown argument": lambda m: m["image_encoder"]["trunk"].update(weights_path="/etc/passwd"),
    "hydra's _args_": lambda m: m.update(_args_=[1]),
    "hydra's _partial_": lambda m: m.update(_partial_=True),
    "hydra's _recursive_": lambda m: m["image_encoder"].update(_recursive_=False),
    "hydra's _convert_": lambda m: m.update(_convert_="all"),
    "compilation": lambda m: m.update(compile_image_encoder=True),
    "a huge size": lambda m: m["image_encoder"]["trunk"].update(embed_dim=10**9),
    "a text for a number": lambda m: m["image_encoder"]["trunk"].update(embed_dim="eval"),
    "no image size": lambda m: m.pop("image_size"),
    "an image size that is a list": lambda m: m.update(image_size=[1]),
    "an image size of 0": lambda m: m.update(image_size=0),
    "an argument that is a number": lambda m: m.update({"5": 5}),
    "a mapping without a class": lambda m: m.update(image_encoder={"neck": {"d_model": 5}}),
}


@pytest.mark.parametrize("name", [*HOSTILE_TEXTS, *HOSTILE_EDITS])
def test_hostile_configurations_are_refused_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def built(*_: object, **__: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr("vessel_export.sources.sam2_files._built", built)
    monkeypatch.setattr("hydra.utils.instantiate", built)
    text = HOSTILE_TEXTS[name] if name in HOSTILE_TEXTS else edited(HOSTILE_EDITS[name])
    (tmp_path / "sam2.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(BaseModelError, match=r"sam2\.yaml") as refused:
        read_sam2_config(tmp_path / "sam2.yaml")
    assert str(refused.value).isprintable()


def test_values_that_do_not_go_together_are_one_line(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copy(tiny.sam2, tmp_path / "s.pt")
    text = tiny.sam2.with_suffix(".yaml").read_text(encoding="utf-8")
    for old, new in (("num_heads: 1", "num_heads: 0"), ("d_model: 64", "d_model: 63"), ("stages: [2, 3, 3, 1]", "stages: []")):
        (tmp_path / "s.yaml").write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(BaseModelError, match=r"s\.pt"):
            open_sam2(str(tmp_path / "s.pt")).build()


def test_a_configuration_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert read_sam2_config(tmp_path / "s.yaml") == parse_sam2_config(TEXT)


def test_damaged_weights(tiny: Tiny, tmp_path: Path) -> None:
    data = bytearray(tiny.sam2.read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "s.pt").write_bytes(data)
    with pytest.raises(BaseModelError, match=r"s\.pt: .*CRC-32"):
        read_sam2_state(tmp_path / "s.pt")


@pytest.mark.parametrize(
    "document",
    [{"model": {}}, {}, [1], {"model": {"a": torch.ones(2, dtype=torch.int64)}}, {"model": {"a": 5}}, {"model": torch.ones(2)}],
)
def test_weights_that_are_not_sam2s(tmp_path: Path, document: Any) -> None:
    torch.save(document, tmp_path / "s.pt")
    with pytest.raises(BaseModelError, match=r"s\.pt: not a SAM2 checkpoint"):
        read_sam2_state(tmp_path / "s.pt")

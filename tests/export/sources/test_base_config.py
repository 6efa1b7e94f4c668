"""InternVL3's config.json and index: nonsense in them is one line that names the file, whatever command reads them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.paths import Tiny
from vessel_export.cli import main
from vessel_export.errors import BaseModelError
from vessel_export.sources.base_config import read_config_json
from vessel_export.sources.base_model import open_base
from vessel_export.sources.tokenizer import extend_tokenizer

NONSENSE = [0, -1, -14, 1.5, 10**30, "14", [], {}, None, True, [14, 28], [14]]
SIZES = [
    *(
        ("vision_config", key)
        for key in ("patch_size", "image_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    ),
    *(
        ("llm_config", key)
        for key in (
            "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
            "max_position_embeddings",
        )
    ),
]  # fmt: skip


def config_of(tiny: Tiny) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((tiny.base / "config.json").read_text(encoding="utf-8"))
    config.pop("force_image_size", None)
    return config


def refused(folder: Path, config: object) -> str:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BaseModelError) as error:
        read_config_json(folder / "config.json")
    assert "config.json" in str(error.value)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(("part", "key"), SIZES)
def test_sizes_that_are_none(tiny: Tiny, tmp_path: Path, part: str, key: str) -> None:
    for value in NONSENSE:
        config = config_of(tiny)
        config[part][key] = value
        assert key in refused(tmp_path, config), value


@pytest.mark.parametrize(
    ("part", "key"),
    [("vision_config", "layer_norm_eps"), ("llm_config", "rms_norm_eps"), ("llm_config", "rope_theta"), (None, "downsample_ratio")],
)
def test_numbers_that_are_none(tiny: Tiny, tmp_path: Path, part: str | None, key: str) -> None:
    for value in (0, -1e-6, 1e400, float("nan"), "1e6", [], {}, True, 1e35):
        config = config_of(tiny)
        (config[part] if part else config)[key] = value
        assert key in refused(tmp_path, config), value


@pytest.mark.parametrize("part", ["vision_config", "llm_config"])
@pytest.mark.parametrize("value", [None, [], "x", 5, {}, [[{}]]])
def test_parts_that_are_none(tiny: Tiny, tmp_path: Path, part: str, value: object) -> None:
    refused(tmp_path, config_of(tiny) | {part: value})
    config = config_of(tiny)
    del config[part]
    refused(tmp_path, config)


@pytest.mark.parametrize("config", [[], None, 5, "x", {}, {"vision_config": {"vision_config": {}}}])
def test_documents_that_are_none(tmp_path: Path, config: object) -> None:
    refused(tmp_path, config)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b'{"a": ' * 100_000, b"[" * 100_000, b"9" * 5000])
def test_files_that_are_no_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(BaseModelError, match=r"config\.json"):
        read_config_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vision_config", {"patch_size": 15}),
        ("vision_config", {"num_attention_heads": 7}),
        ("llm_config", {"num_key_value_heads": 5}),
        ("llm_config", {"head_dim": 1 << 20}),
        ("llm_config", {"head_dim": 7}),
        ("llm_config", {"rope_scaling": [1]}),
        ("llm_config", {"rope_scaling": {"type": "yarn"}}),
    ],
)
def test_values_that_do_not_go_together(tiny: Tiny, tmp_path: Path, part: str, change: dict[str, Any]) -> None:
    config = config_of(tiny)
    config[part] |= change
    refused(tmp_path, config)


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Path:
    shutil.copytree(tiny.base, tmp_path / "base")
    return tmp_path / "base"


def test_a_byte_order_mark(tiny: Tiny, base: Path) -> None:
    for name in ("config.json",):
        (base / name).write_bytes(b"\xef\xbb\xbf" + (base / name).read_bytes())
    (base / "model.safetensors.index.json").write_bytes(b'\xef\xbb\xbf{"weight_map": {"a": "model.safetensors"}}')
    assert open_base(str(base)).vision == open_base(str(tiny.base)).vision
    tokenizer = extend_tokenizer(tiny.base, open_base(str(tiny.base)).language.vocabulary, ["[SEG]"])
    (base / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + tokenizer.to_str().encode())
    assert extend_tokenizer(base, tokenizer.get_vocab_size(), ["<p>"]).get_vocab_size() == tokenizer.get_vocab_size() + 1


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 5}}, {"weight_map": {"a": "../x"}},
              {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": "."}}, {"weight_map": {"a": ""}}, {"weight_map": {"a": "none"}}],
)  # fmt: skip
def test_an_index_that_is_none(base: Path, index: object) -> None:
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(BaseModelError):
        open_base(str(base))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _offsets(file: Path) -> None:
    """A tensor that begins where another does."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _huge_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])


def _of_integers(file: Path) -> None:
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)


def _of_other_dimensions(file: Path) -> None:
    save_file({name: tensor.reshape(-1) for name, tensor in load_file(file).items()}, file)


def _gone(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [_cut, _offsets, _huge_header, _of_integers, _of_other_dimensions, _gone])
def test_damaged_weights_are_one_line(
    tiny: Tiny, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    damage(base / "model.safetensors")
    arguments = ["--ckpt", str(tiny.checkpoint), "--base", str(base), "--sam2", str(tiny.sam2), "--recipe", "engines/cpu.toml"]
    assert main(["export", *arguments, "--out", str(tmp_path / "b")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert str(base) in line
    assert not (tmp_path / "b").exists()

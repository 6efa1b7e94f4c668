"""Reading checkpoints: every spelling of a name, nothing in a pickle ever run, one clear line for what cannot be read."""

from __future__ import annotations

import pickle
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.paths import Tiny
from vessel_export.errors import CheckpointError
from vessel_export.sources.checkpoint import canonical_name, faults_in, open_checkpoint, survey_checkpoint
from vessel_export.sources.names import LORA_PREFIX

A = LORA_PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight"
STATE = {A: torch.ones(4, 8, dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("module.module.mllm.model.mlp1.0.weight", "mllm.model.mlp1.0.weight"),
        (A.replace("lora_A", "lora_A.default"), A),
        (LORA_PREFIX + "lm_head.modules_to_save.default.weight", LORA_PREFIX + "lm_head.weight"),
        (LORA_PREFIX + "model.embed_tokens.modules_to_save.weight", LORA_PREFIX + "model.embed_tokens.weight"),
    ],
)
def test_every_spelling_has_one_name(key: str, name: str) -> None:
    assert canonical_name(key) == name


def test_reads_the_tiny_checkpoint_as_mmengine_saved_it(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny.checkpoint)
    assert (checkpoint.lora_rank, checkpoint.lora_alpha) == (8, 16.0)
    assert checkpoint.iteration is not None
    assert checkpoint.iteration > 0
    assert all(tensor.dtype is torch.bfloat16 for tensor in checkpoint.tensors.values())
    assert "mmengine" not in sys.modules


def test_a_plain_state_dict_tells_no_alpha(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "plain.pth")
    checkpoint = open_checkpoint(tmp_path / "plain.pth")
    assert checkpoint.lora_alpha is None
    assert checkpoint.iteration is None
    assert list(checkpoint.tensors) == [A]


def test_copies_that_peft_leaves_behind_are_explained(tmp_path: Path) -> None:
    copy = LORA_PREFIX + "lm_head.original_module.weight"
    torch.save({"state_dict": STATE | {copy: torch.ones(2, 2)}}, tmp_path / "c.pth")
    assert list(open_checkpoint(tmp_path / "c.pth").skipped) == [copy]


@pytest.fixture
def mmengine() -> Iterator[type]:
    """A module of mmengine's name whose log buffer pickles a bound method and NumPy arrays, as the real one does."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history = np.arange(3.0)
            self.last = np.float64(3)
            self.methods = {"mean": self.mean}

        def mean(self) -> float:
            return float(self.history.mean())

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    modules = {name: types.ModuleType(name) for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")}
    modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    sys.modules.update(modules)
    yield HistoryBuffer
    for name in modules:
        del sys.modules[name]


def test_log_buffers_are_read_as_nothing(tmp_path: Path, mmengine: type) -> None:
    document = {"state_dict": STATE, "message_hub": {"log_scalars": {"loss": mmengine()}}, "meta": {"cfg": "lora_alpha=8", "iter": 7}}
    torch.save(document, tmp_path / "c.pth")
    checkpoint = open_checkpoint(tmp_path / "c.pth")
    assert (checkpoint.lora_alpha, checkpoint.iteration) == (8.0, 7)


class _RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    trace = tmp_path / "was_run"
    torch.save({"state_dict": STATE, "meta": _RunsCode(trace)}, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"evil\.pth: refused: .*system"):
        open_checkpoint(tmp_path / "evil.pth")
    assert not trace.exists()


def test_getattr_is_not_given_out(tmp_path: Path) -> None:
    """Allowing builtins.getattr would let a pickle walk from any allowed class to code."""

    class Walks:
        def __reduce__(self) -> tuple[object, tuple[object, str]]:
            return getattr, (np.ndarray, "__subclasses__")

    torch.save({"state_dict": STATE, "meta": {"iter": Walks()}}, tmp_path / "c.pth")
    assert open_checkpoint(tmp_path / "c.pth").iteration is None


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"iter_1\.pth: no such checkpoint"):
        open_checkpoint(tmp_path / "iter_1.pth")


def test_a_deepspeed_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="zero_to_fp32"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_truncated(tmp_path: Path, tiny: Tiny, keep: int) -> None:
    data = tiny.checkpoint.read_bytes()
    (tmp_path / "half.pth").write_bytes(data[:keep] if keep >= 0 else data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"half\.pth: .*(copy it again|are read)"):
        open_checkpoint(tmp_path / "half.pth")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "c.pth").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "c.pth")
    torch.save({"meta": {}}, tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match=r"d\.pth: has no tensors"):
        open_checkpoint(tmp_path / "d.pth")


def test_two_adapters_clash(tmp_path: Path) -> None:
    torch.save(STATE | {A.replace("lora_A", "lora_A.default"): torch.ones(4, 8)}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj\.lora_A\.weight appears twice"):
        open_checkpoint(tmp_path / "c.pth")


def test_two_ranks(tmp_path: Path) -> None:
    torch.save(STATE | {A.replace("q_proj", "k_proj"): torch.ones(2, 8)}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"ranks \[2, 4\]"):
        open_checkpoint(tmp_path / "c.pth")


def test_another_kind_of_lora(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "meta": {"cfg": "llm_lora=dict(use_rslora=True, lora_alpha=8)"}}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="rsLoRA"):
        open_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("text", "alpha"),
    [
        ("model = dict(llm_lora=dict(lora_alpha=1e2))", 100.0),
        ("model = {'llm_lora': {'lora_alpha': 16}}", 16.0),
        ("lora_alpha = 1", 1.0),
        ("alpha = 8\nmodel = dict(lora_alpha=alpha)", 8.0),
        ("a = dict(lora_alpha=16)\nb = dict(lora_alpha=16.0)", 16.0),
        ("lora_alpha = 2 * 64", None),
        ("a = dict(lora_alpha=16)\nb = dict(lora_alpha=2 * 8)", None),
        ("a = dict(lora_alpha=16)\nb = dict(lora_alpha=32)", None),
        ("lora_alpha = '16'", None),
        ("lora_alpha = True", None),
        ("lora_alpha = 0", None),
        ("lora_alpha = -16", None),
        ("lora_alpha = 1e999", None),
        ("lora_alpha = [16]", None),
        ("# lora_alpha = 16", None),
        ("text = 'lora_alpha = 16'", None),
        ("lora_alpha = 16 (", None),
    ],
)
def test_alpha_is_a_plain_number_or_unknown(tmp_path: Path, text: str, alpha: float | None) -> None:
    torch.save({"state_dict": STATE, "meta": {"cfg": text}}, tmp_path / "c.pth")
    assert open_checkpoint(tmp_path / "c.pth").lora_alpha == alpha


@pytest.mark.parametrize(
    "text", ["use_dora=True", "use_rslora=1", "use_rslora=not False", "alpha_pattern={'q_proj': 2}", "rank_pattern=dict(q=2)"]
)
def test_lora_that_scales_otherwise(tmp_path: Path, text: str) -> None:
    torch.save({"state_dict": STATE, "meta": {"cfg": f"llm_lora = dict(lora_alpha=8, {text})"}}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=text.partition("=")[0]):
        open_checkpoint(tmp_path / "c.pth")
    torch.save(
        {"state_dict": STATE, "meta": {"cfg": "llm_lora = dict(lora_alpha=8, use_dora=False, alpha_pattern={})"}}, tmp_path / "c.pth"
    )
    assert open_checkpoint(tmp_path / "c.pth").lora_alpha == 8


def test_a_state_dict_of_parameters(tmp_path: Path) -> None:
    torch.save({A: torch.nn.Parameter(STATE[A])}, tmp_path / "c.pth")
    assert torch.equal(open_checkpoint(tmp_path / "c.pth").tensors[A], STATE[A])


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):
        return torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.qint8)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (lambda: torch.ones(4, 4).to_sparse(), "sparse"),
        (lambda: torch.ones(4, 4).to_sparse_csr(), "sparse"),
        (lambda: torch.ones(4).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (_quantized, "quantized"),
        (lambda: torch.ones(4, device="meta"), "meta"),
        (lambda: torch.ones(4, dtype=torch.int64), "int64"),
        (lambda: torch.ones(4, dtype=torch.uint16), "uint16"),
        (lambda: torch.ones(4, dtype=torch.bool), "bool"),
        (lambda: torch.ones(4, dtype=torch.complex64), "complex64"),
        (lambda: torch.ones(4, dtype=torch.complex64).conj(), "conjugated"),
        (lambda: torch.nested.nested_tensor([torch.ones(2)]), "nested"),
    ],
)
def test_tensors_that_are_not_dense_floats(tmp_path: Path, tensor: Callable[[], torch.Tensor], kind: str) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.save(STATE | {"odd.one": tensor()}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=rf"c\.pth: odd\.one is {kind}.*--skip"):
        open_checkpoint(tmp_path / "c.pth")
    assert list(open_checkpoint(tmp_path / "c.pth", skip=["odd.one"]).tensors) == [A]
    assert survey_checkpoint(tmp_path / "c.pth").unusable["odd.one"].startswith(kind)


@pytest.mark.parametrize("name", [5, None, 1.5, True, b"a", "a\nb", "\x1b[2J", "\ud800", "x" * 10_000])
def test_names_that_are_none(tmp_path: Path, name: object) -> None:
    torch.save({"state_dict": {name: torch.ones(2)}}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path / "c.pth")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("shape", [(0, 8), (8,), (2, 2, 2), ()])
def test_adapters_that_are_no_matrices(tmp_path: Path, shape: tuple[int, ...]) -> None:
    torch.save({A: torch.ones(shape)}, tmp_path / "c.pth")
    for read in (open_checkpoint, survey_checkpoint):
        with pytest.raises(CheckpointError, match=r"lora_A\.weight has shape"):
            read(tmp_path / "c.pth")


def test_records_that_cannot_be_shown_are_left_out(tmp_path: Path) -> None:
    meta = {"epoch": 2, "seed": 10**500, "time": "\x1b[2J", "experiment_name": "x" * 10_000, "iter": True, "mmengine_version": [1], 5: 5}
    torch.save({"state_dict": STATE, "meta": meta, "message_hub": [1]}, tmp_path / "c.pth")
    checkpoint = survey_checkpoint(tmp_path / "c.pth")
    assert {key: checkpoint.meta.get(key) for key in meta if isinstance(key, str)} == dict.fromkeys(meta.keys() - {5}) | {
        "epoch": 2,
        "iter": True,
    }
    assert checkpoint.iteration is None


def test_faults() -> None:
    tensors = {"fine": torch.ones(3), "empty": torch.ones(0), "nan": torch.tensor([1.0, float("nan")]), "inf": torch.tensor([float("inf")])}
    assert [fault.split()[0] for fault in faults_in(tensors)] == ["empty", "nan", "inf"]


def test_a_copied_name_with_spaces_and_brackets(tmp_path: Path, tiny: Tiny) -> None:
    path = tmp_path / "iter 12192 (1).pth"
    shutil.copy(tiny.checkpoint, path)
    assert open_checkpoint(path).lora_rank == 8

"""Reads a fine-tuned checkpoint (`iter_*.pth`) safely, with one spelling of every tensor name.

Sa2VA's checkpoints are mmengine's: a pickle `{"state_dict", "meta", "message_hub", ...}`. `torch_file` and `pickle_reader` read it as data,
so nothing in the file can run, and neither torch.load nor mmengine is needed. Does not know the model: which tensors there must be, and
their shapes, is up to `merge_lora`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from vessel_export.errors import CheckpointError
from vessel_export.sources.mmengine_config import find_all, read_config
from vessel_export.sources.pickle_reader import PickleRefused, StoredTensor, UnusableTensor
from vessel_export.sources.torch_file import FLOATS, DamagedFile, TorchFile, read_torch_file
from vessel_rt.errors import first_line

__all__ = ["Checkpoint", "canonical_name", "faults_in", "open_checkpoint", "survey_checkpoint"]

Scalar = str | int | float

_OTHER_LORA = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "alpha_pattern": "several alphas", "rank_pattern": "several ranks"}
_SHOWN = 12  # of many faults
_LONGEST_NAME = 1000

# Copies that some versions of peft and transformers save along with the trained tensors. They are not used.
_HARMLESS = (
    (re.compile(r"\.original_module\.weight$"), "peft's copy of a module that training replaced"),
    (re.compile(r"\.rotary_emb\.inv_freq$"), "a table that the graphs compute from rope_theta"),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a fine-tuned checkpoint.

    `tensors` maps canonical names (`canonical_name`) to CPU tensors of the file's floating-point dtype, memory-mapped if possible.
    `unusable` gives the kind of every other tensor ("int64"), `skipped` the reason why an entry is in neither. `lora_alpha` and `iteration`
    are None if the file does not record them. `config` is the training configuration (`read_config`), `meta` mmengine's other records of
    the run, and `runtime_info` those of its message hub, all as plain values.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor]
    unusable: Mapping[str, str]
    skipped: Mapping[str, str]
    lora_rank: int
    lora_alpha: float | None
    iteration: int | None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    meta: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    runtime_info: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)


def open_checkpoint(path: Path, skip: Collection[str] = ()) -> Checkpoint:
    """Read the checkpoint at `path` without running anything in it and without the tensors named in `skip` (canonical names).

    All values are checked against the file's CRC-32. The format of torch before 1.6 has none; a warning on stderr says so.

    Raises:
        CheckpointError: missing, a folder, not a complete torch file, damaged, a pickle with code or unknown classes, no tensors, two
            tensors of one name, a tensor that is not dense or not floating-point, an unknown name in `skip`, or LoRA tensors of rank 0 or
            of several ranks.
    """
    checkpoint = _read(path, skip, check_values=True)
    unusable = checkpoint.unusable
    if unusable:
        shown = [f"{name} is {kind}" for name, kind in list(unusable.items())[:_SHOWN]]
        more = f"; and {len(unusable) - _SHOWN} more" if len(unusable) > _SHOWN else ""
        raise CheckpointError(
            f"{path}: {'; '.join(shown)}{more}; only dense floating-point tensors can be exported (--skip NAME leaves out one)"
        )
    return checkpoint


def survey_checkpoint(path: Path) -> Checkpoint:
    """As `open_checkpoint`, but values are neither read nor checked, and unusable tensors are only listed."""
    return _read(path, (), check_values=False)


def _read(path: Path, skip: Collection[str], *, check_values: bool) -> Checkpoint:
    file = _load(path, check_values)
    state = file.document.get("state_dict", file.document)
    if not isinstance(state, dict) or not any(isinstance(value, StoredTensor | UnusableTensor) for value in state.values()):
        raise CheckpointError(f"{path}: has no tensors; give an iter_*.pth of Sa2VA's fine-tuning")
    tensors, unusable, skipped = _sort_entries(path, file, state)
    for name in skip:
        if tensors.pop(name, None) is None and unusable.pop(name, None) is None:
            raise CheckpointError(f"{path}: has no tensor {name}; correct --skip")
        skipped[name] = "left out by request"
    recorded, hub = _table(file.document, "meta"), _table(file.document, "message_hub")
    text, iteration = recorded.get("cfg"), recorded.get("iter")
    config = read_config(text if isinstance(text, str) else "")
    return Checkpoint(
        path=path,
        tensors=tensors,
        unusable=unusable,
        skipped=skipped,
        lora_rank=_lora_rank(path, tensors),
        lora_alpha=_lora_alpha(path, config),
        iteration=iteration if type(iteration) is int and 0 <= iteration < 1 << 53 else None,
        config=config,
        meta=_scalars(recorded),
        runtime_info=_scalars(_table(hub, "runtime_info")),
    )


def _sort_entries(path: Path, file: TorchFile, state: Mapping[Any, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, str]]:
    """The tensors, unusable and skipped entries of a state dict, as in `Checkpoint`."""
    tensors: dict[str, torch.Tensor] = {}
    unusable: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not key.isprintable() or len(key) > _LONGEST_NAME:
            raise CheckpointError(f"{path}: the name of a tensor is not printable text; give an iter_*.pth of Sa2VA's fine-tuning")
        reason = next((reason for pattern, reason in _HARMLESS if pattern.search(key)), None)
        if not isinstance(value, StoredTensor | UnusableTensor):
            reason = "not a tensor"
        if reason:
            skipped[key] = reason
            continue
        name = canonical_name(key)
        if name in tensors or name in unusable:
            raise CheckpointError(f"{path}: {name} appears twice, once as {key}; save the checkpoint again with one adapter")
        if isinstance(value, UnusableTensor):
            unusable[name] = value.kind
        elif value.dtype not in FLOATS:
            unusable[name] = value.dtype
        else:
            tensors[name] = _tensor(path, file, name, value)
    return tensors, unusable, skipped


def _tensor(path: Path, file: TorchFile, name: str, stored: StoredTensor) -> torch.Tensor:
    try:
        return file.tensor(stored)
    except DamagedFile as e:
        raise CheckpointError(f"{path}: {name}: {e}; copy it again") from e


def _table(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The dictionary at `key`; an empty one if there is none."""
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _scalars(table: Mapping[str, Any]) -> dict[str, Scalar]:
    """The entries of `table` that can be printed in one line."""
    found = {}
    for key, value in table.items():
        if not isinstance(key, str):
            continue
        small = isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)
        if small or (isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST_NAME):
            found[key] = value
    return found


def canonical_name(key: str) -> str:
    """A tensor's name without leading `module.`, adapter name and `modules_to_save`."""
    while key.startswith("module."):
        key = key.removeprefix("module.")
    key = re.sub(r"\.(lora_[AB])\.default\.", r".\1.", key)
    return re.sub(r"\.modules_to_save\.(default\.)?", ".", key)


def faults_in(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """A phrase for each tensor that is empty or has NaN or infinity."""
    faults = []
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            faults.append(f"{name} is empty")
        elif tensor.is_floating_point() and not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):  # NaN propagates
            faults.append(f"{name} has NaN or infinity")
    return faults


def _load(path: Path, check_values: bool) -> TorchFile:
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, not a checkpoint file; convert a DeepSpeed folder with its zero_to_fp32.py first")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give the path of an iter_*.pth")
    try:
        file = read_torch_file(path, check_values=check_values)
    except PickleRefused as e:
        raise CheckpointError(f"{path}: refused: {e}; give an iter_*.pth with only tensors and mmengine's records") from e
    except DamagedFile as e:
        raise CheckpointError(f"{path}: not a complete torch checkpoint: {e}; copy it again") from e
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({first_line(e)}); check its permissions, or copy it again") from e
    if not isinstance(file.document, dict):
        raise CheckpointError(f"{path}: is a {type(file.document).__name__}, not a checkpoint's dictionary; give an iter_*.pth")
    if check_values and not file.checksums:
        print(
            f"vessel-export: warning: {path}: the format of torch before 1.6 has no checksums, so values are not checked for damage;"
            " save it again with a newer torch to add them",
            file=sys.stderr,
        )
    return file


def _lora_rank(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """The rank of all `lora_A` [rank, in]; 0 without any."""
    adapter = {name: tensor for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
    for name, tensor in adapter.items():
        if tensor.ndim != 2 or len(tensor) == 0:
            raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)}, not [rank, in]; save the checkpoint again")
    ranks = {len(tensor) for tensor in adapter.values()}
    if len(ranks) > 1:
        raise CheckpointError(f"{path}: LoRA tensors have ranks {sorted(ranks)}; only one rank can be exported")
    return next(iter(ranks), 0)


def _lora_alpha(path: Path, config: Mapping[str, Any]) -> float | None:
    """alpha, if the training configuration has exactly one value for it, a plain positive number."""
    for key, kind in _OTHER_LORA.items():
        if any(value not in (False, None, {}) for value in find_all(config, key)):
            raise CheckpointError(f"{path}: trained with {kind} ({key}), which scales differently; only plain LoRA can be exported")
    match find_all(config, "lora_alpha"):
        case [int() | float() as alpha, *others] if 0 < alpha < math.inf and others.count(alpha) == len(others) and alpha is not True:
            return float(alpha)
    return None

"""Reading a fine-tuned checkpoint (`iter_*.pth`): safely, and under one spelling of every name.

Sa2VA's checkpoints are mmengine's: a pickle `{"state_dict", "meta", "message_hub", ...}`. It is read with `weights_only=True`; the few
classes that mmengine adds to the pickle are replaced by inert stand-ins, so nothing in the file can run and mmengine is not needed.
This module does not know the model: which tensors must be there, and with what shapes, is `merge`'s business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vessel_export.errors import CheckpointError
from vessel_rt.errors import first_line

__all__ = ["LORA_PREFIX", "Checkpoint", "canonical_name", "faults_in", "open_checkpoint"]

LORA_PREFIX = "mllm.model.language_model.base_model.model."  # what peft and Sa2VA put before a language-model module's own name

# Copies that some versions of peft and transformers save beside the trained tensors: explained, and left alone.
_HARMLESS = (
    (re.compile(r"\.original_module\.weight$"), "peft's untouched copy of a module that training replaced"),
    (re.compile(r"\.rotary_emb\.inv_freq$"), "a table that the graphs compute from rope_theta"),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A fine-tuned checkpoint, read.

    `tensors` maps canonical names (`canonical_name`) to CPU tensors of the file's own dtype, memory-mapped where the file allows it;
    `skipped` says why a tensor of the file is not among them. `lora_alpha` and `iteration` are None where the file does not tell.
    `meta` is what mmengine recorded of the run (its `cfg` is the training configuration's text), `runtime_info` what its message hub did.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor]
    skipped: Mapping[str, str]
    lora_rank: int
    lora_alpha: float | None
    iteration: int | None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    runtime_info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def open_checkpoint(path: Path, skip: Collection[str] = ()) -> Checkpoint:
    """Read the checkpoint at `path` without running anything in it, and without the tensors named in `skip` (canonical names).

    Raises:
        CheckpointError: not there, a folder, not a whole torch file, a pickle with code or unknown classes in it, no tensors,
            two tensors of one name, a name to skip that is not there, or LoRA tensors of more than one rank.
    """
    document = _load(path)
    state = document.get("state_dict", document)
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no tensors; expected an iter_*.pth of Sa2VA's fine-tuning")
    tensors: dict[str, torch.Tensor] = {}
    skipped: dict[str, str] = {}
    for key, value in state.items():
        reason = next((reason for pattern, reason in _HARMLESS if pattern.search(str(key))), None)
        if not isinstance(value, torch.Tensor):
            reason = "not a tensor"
        if reason:
            skipped[str(key)] = reason
            continue
        name = canonical_name(key)
        if name in tensors:
            raise CheckpointError(f"{path}: {name} is there twice, once as {key}; save the checkpoint again with one adapter")
        tensors[name] = value
    for name in skip:
        if tensors.pop(name, None) is None:
            raise CheckpointError(f"{path}: has no {name} to skip")
        skipped[name] = "left out by request"
    meta, hub = _table(document, "meta"), _table(document, "message_hub")
    config = meta.get("cfg")
    iteration = meta.get("iter")
    return Checkpoint(
        path=path,
        tensors=tensors,
        skipped=skipped,
        lora_rank=_lora_rank(path, tensors),
        lora_alpha=_lora_alpha(path, config if isinstance(config, str) else ""),
        iteration=iteration if isinstance(iteration, int) else None,
        meta=meta,
        runtime_info=_table(hub, "runtime_info"),
    )


def _table(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What stands under `key`, if it is a dictionary; else an empty one."""
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def canonical_name(key: str) -> str:
    """The one spelling of a tensor's name: no leading `module.`, no adapter's name, no `modules_to_save`."""
    while key.startswith("module."):
        key = key.removeprefix("module.")
    key = re.sub(r"\.(lora_[AB])\.default\.", r".\1.", key)
    return re.sub(r"\.modules_to_save\.(default\.)?", ".", key)


def faults_in(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """A line for each tensor that is empty or holds NaN or infinity."""
    faults = []
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            faults.append(f"{name} is empty")
        elif tensor.is_floating_point() and not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):  # NaN passes through
            faults.append(f"{name} holds NaN or infinity")
    return faults


def _load(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, not a checkpoint file; a DeepSpeed folder is collected with its zero_to_fp32.py first")
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint there; give the path of an iter_*.pth")
    try:
        with _mmengine_as_inert():
            document = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"{path}: refused: {_refusal(path, e)}; only tensors and mmengine's own records are read") from e
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as e:
        raise CheckpointError(f"{path}: not a whole torch checkpoint ({first_line(e)}); copy it again") from e
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds a {type(document).__name__}, not a checkpoint's dictionary")
    return document


def _refusal(path: Path, error: Exception) -> str:
    """What the file wanted to call, in a phrase. (torch's own message advises to load it unsafely.)"""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the listing reads only zip files, and this one may be broken: its failure must not hide the first one
        names = re.findall(r"GLOBAL (\S+)", str(error))
    foreign = sorted(set(names) - {reference for _, reference in _inert_globals()})
    return "its pickle calls " + ", ".join(foreign) if foreign else "its pickle holds more than tensors and plain values"


class _Inert:
    """Stands for a class of mmengine's: takes whatever the pickle gives it and does nothing."""

    def __new__(cls, *_args: object, **_keywords: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, _state: object) -> None: ...


def _nothing(*_args: object, **_keywords: object) -> None:
    """Stands for `getattr`, by which mmengine's log buffers pickle their bound methods."""


def _inert_globals() -> list[tuple[Any, str]]:
    """(stand-in, name in the pickle): what mmengine's checkpoints hold beside tensors."""
    multiarray = importlib.import_module("numpy._core.multiarray")
    named: list[tuple[Any, str]] = [
        (_Inert, "mmengine.logging.history_buffer.HistoryBuffer"),
        (_nothing, "builtins.getattr"),
        (np.dtype, "numpy.dtype"),
        (np.ndarray, "numpy.ndarray"),
    ]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # NumPy 1 and 2 pickle under different names
        named += [(getattr(multiarray, name), f"{module}.{name}") for name in ("_reconstruct", "scalar")]
    return named


@contextlib.contextmanager
def _mmengine_as_inert() -> Iterator[None]:
    dtypes = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    with torch.serialization.safe_globals([*_inert_globals(), *dtypes]):
        yield


def _lora_rank(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """The rank all `lora_A` [rank, in] share; 0 without any."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight") and tensor.ndim == 2}
    if len(ranks) > 1:
        raise CheckpointError(f"{path}: LoRA tensors of ranks {sorted(ranks)}; one rank is expected")
    return next(iter(ranks), 0)


def _lora_alpha(path: Path, config: str) -> float | None:
    """alpha from the training configuration's text, if it gives one value."""
    if re.search(r"use_(rslora|dora)\s*=\s*True", config):
        raise CheckpointError(f"{path}: trained with rsLoRA or DoRA, which scale differently; only plain LoRA is exported")
    alphas = {float(value) for value in re.findall(r"\blora_alpha\s*=\s*([0-9.]+)", config)}
    return alphas.pop() if len(alphas) == 1 else None

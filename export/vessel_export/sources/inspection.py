"""Inspection: what a checkpoint or a folder of checkpoints holds, and what an export would do with it.

Reads a checkpoint's pickle as data; tensor values are not read (`export` and `verify` check them). Does not know the base model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vessel_export.errors import CheckpointError
from vessel_export.sources.checkpoint import Checkpoint, survey_checkpoint
from vessel_export.sources.mmengine_config import UNKNOWN, find
from vessel_export.sources.names import LORA_TARGETS, NEW_TOKENS, TRAINED_GROUPS, expected_tensors, group_of, lora_layer

__all__ = ["CheckpointReport", "FolderReport", "Group", "inspect_checkpoint", "inspect_folder"]

_FILE_NAME = re.compile(r"(?:iter|epoch)_(\d+)\.pth")
_FOREIGN = "unknown"
_GROUPS = {**TRAINED_GROUPS, _FOREIGN: "not part of the model that vessel-rt exports"}


@dataclasses.dataclass(frozen=True)
class Group:
    """The tensors of one part of the model: their number, the number of their values, and their dtypes."""

    name: str
    part: str
    tensors: int
    values: int
    dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint records; "unknown" stands for what it does not.

    `training` and `lora` are names and values to read; `losses` are (name, type, weight). `export` lists what an export would do,
    `problems` what would stop it, each with its fix. Neither takes tensor values or the base model's shapes into account.
    """

    name: str
    bytes: int
    groups: tuple[Group, ...]
    training: dict[str, Any]
    lora: dict[str, Any]
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    losses: tuple[tuple[str, str, Any], ...]
    export: tuple[str, ...]
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FolderReport:
    """The checkpoints of a folder as (name, bytes, iteration), ordered by iteration; the latest one and its training's progress."""

    name: str
    checkpoints: tuple[tuple[str, int, int], ...]
    latest: str
    latest_by: str
    iteration: int
    iterations: int | str
    checkpoint: CheckpointReport | None
    problems: tuple[str, ...]


def inspect_folder(folder: Path) -> FolderReport:
    """The checkpoints in `folder`, and a report on the latest.

    Raises:
        CheckpointError: the folder has no iter_*.pth and no epoch_*.pth.
    """
    found = {path: int(match[1]) for path in folder.iterdir() if (match := _FILE_NAME.fullmatch(path.name))}
    if not found:
        inner = sorted(path.parent.name for path in folder.glob("*/*.pth") if _FILE_NAME.fullmatch(path.name))
        fix = f"inspect {folder / inner[0]}, which has some" if inner else "give a work_dirs folder, or the path of an iter_*.pth"
        raise CheckpointError(f"{folder}: no iter_*.pth in this folder; {fix}")
    ordered = sorted(found, key=lambda path: found[path])
    latest, latest_by, problems = ordered[-1], "the highest number", []
    record = folder / "last_checkpoint"
    if record.is_file():
        named = folder / re.split(r"[/\\]", record.read_text(encoding="utf-8", errors="replace").strip())[-1]
        if named in found:
            latest, latest_by = named, "last_checkpoint"
        else:
            problems.append(f"last_checkpoint names {named.name}, which is missing: it was moved, or is still being written")
    report = None
    try:
        report = inspect_checkpoint(latest)
    except CheckpointError as e:
        problems.append(str(e))
    return FolderReport(
        name=folder.resolve().name,
        checkpoints=tuple((path.name, path.stat().st_size, found[path]) for path in ordered),
        latest=latest.name,
        latest_by=latest_by,
        iteration=found[latest],
        iterations=report.training["iterations in all"] if report else UNKNOWN,
        checkpoint=report,
        problems=tuple(problems),
    )


def inspect_checkpoint(path: Path) -> CheckpointReport:
    """What the checkpoint at `path` holds.

    Raises:
        CheckpointError: the file is not a checkpoint, is damaged, or would run code (see `survey_checkpoint`).
    """
    checkpoint = survey_checkpoint(path)
    config = checkpoint.config
    members: dict[str, list[str]] = {name: [] for name in _GROUPS}
    for name in checkpoint.tensors:
        members[group_of(name) or _FOREIGN].append(name)
    present = [name for name in TRAINED_GROUPS if members[name]]
    return CheckpointReport(
        name=path.name,
        bytes=path.stat().st_size,
        groups=tuple(_summed(name, [checkpoint.tensors[member] for member in members[name]]) for name in _GROUPS if members[name]),
        training=_training(checkpoint, config),
        lora=_lora(checkpoint, config),
        trained=tuple(f"{name}: {_GROUPS[name]}" for name in present),
        frozen=_frozen(present, config),
        losses=tuple(_losses(config)),
        export=tuple(_export(checkpoint, members)),
        problems=tuple(_problems(checkpoint, members)),
    )


def _summed(name: str, tensors: Sequence[torch.Tensor]) -> Group:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    return Group(name, _GROUPS[name], len(tensors), sum(tensor.numel() for tensor in tensors), tuple(dtypes))


def _training(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    meta, optimizer = checkpoint.meta, find(config, "optimizer")
    optimizer = optimizer if isinstance(optimizer, Mapping) else {}
    iterations = checkpoint.runtime_info.get("max_iters", find(config, "max_iters"))
    return {
        "epoch": meta.get("epoch", UNKNOWN),
        "iteration": UNKNOWN if checkpoint.iteration is None else checkpoint.iteration,
        "iterations in all": iterations if isinstance(iterations, int) else UNKNOWN,
        "experiment": meta.get("experiment_name", UNKNOWN),
        "saved at": meta.get("time", UNKNOWN),
        "seed": meta.get("seed", UNKNOWN),
        "mmengine": meta.get("mmengine_version", UNKNOWN),
        "base model": find(config, "model_path"),
        "SAM2": find(config, "ckpt_path"),
        "template": config.get("template", UNKNOWN),
        "optimiser": _kind(optimizer.get("type", UNKNOWN)),
        "learning rate": optimizer.get("lr", UNKNOWN),
        "weight decay": optimizer.get("weight_decay", UNKNOWN),
    }


def _lora(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    given = find(config, "llm_lora")
    given = given if isinstance(given, Mapping) else {}
    adapted = [found for name in checkpoint.tensors if (found := lora_layer(name))]
    return {
        "rank": checkpoint.lora_rank or UNKNOWN,
        "alpha": UNKNOWN if checkpoint.lora_alpha is None else checkpoint.lora_alpha,
        "dropout": given.get("lora_dropout", UNKNOWN),
        "layers": len({layer for layer, _ in adapted}),
        "targets": [target for target in LORA_TARGETS if target in {module for _, module in adapted}],
        "saved whole": given.get("modules_to_save", UNKNOWN),
    }


def _frozen(trained: Sequence[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the checkpoint does not hold is taken from the base models unchanged."""
    flags = {"InternViT": "freeze_visual_encoder", "the language model's own weights": "freeze_llm"}
    models = [f"{name} ({flag} = {find(config, flag)})" for name, flag in flags.items()]
    return (*models, "SAM2's image encoder", *(about for name, about in TRAINED_GROUPS.items() if name not in trained))


def _losses(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    model = config.get("model")
    for name, value in model.items() if isinstance(model, Mapping) else ():
        if name.startswith("loss") and isinstance(value, Mapping):
            yield name, _kind(value.get("type", UNKNOWN)), value.get("loss_weight", UNKNOWN)


def _kind(value: Any) -> str:
    return str(value).rpartition(".")[2]


def _export(checkpoint: Checkpoint, members: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What the exporter would do, in order."""
    pairs = len(members["LoRA"]) // 2
    if pairs:
        rank, alpha = checkpoint.lora_rank, checkpoint.lora_alpha
        scale = UNKNOWN if alpha is None else f"{alpha / rank:g}"
        yield f"merge {pairs} pairs of LoRA matrices of rank {rank} into the language model, W + {scale} B A, in FP32, rounded once"
    if members["modules_to_save"]:
        rows = max(len(checkpoint.tensors[name]) for name in members["modules_to_save"])
        saved = " and ".join(map(_short, members["modules_to_save"]))
        yield f"replace {saved}: {rows:,} rows, the last {len(NEW_TOKENS)} new tokens"
    for group in ("projector", "prompt head", "SAM2 mask decoder"):
        if members[group]:
            yield f"replace {_GROUPS[group]}: {len(members[group])} tensors"
    yield "take the rest from the base models: InternViT, the language model's weights under the adapter, SAM2's image encoder"
    for name, reason in checkpoint.skipped.items():
        yield f"leave out {name}: {reason}"


def _problems(checkpoint: Checkpoint, members: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What would stop an export, judged by names and shapes."""
    if checkpoint.lora_alpha is None and members["LoRA"]:
        yield f"LoRA's alpha is not recorded; give it with --lora-alpha (Sa2VA trains with 2 r = {2 * checkpoint.lora_rank})"
    for name, kind in checkpoint.unusable.items():
        yield f"{name} is {kind}, not a dense floating-point tensor; leave it out with --skip {name}"
    for name in members[_FOREIGN]:
        yield f"{name} is unknown; leave it out with --skip {name}"
    layers = [found[0] for name in members["LoRA"] if (found := lora_layer(name))]
    for group, names in expected_tensors(max(layers, default=-1) + 1).items():
        missing = [name for name in names if name not in checkpoint.tensors]
        if missing:
            yield f"{group}: {len(missing)} of {len(names)} tensors are missing, the first is {missing[0]}; save the whole checkpoint again"
    if not members["LoRA"]:
        yield "LoRA: the checkpoint has no adapter; vessel-rt exports models trained with one"
    if not members["SAM2 mask decoder"]:
        yield "SAM2 mask decoder: not in the checkpoint; train with frozen_sam2_decoder=False"
    for name, tensor in checkpoint.tensors.items():
        if tensor.numel() == 0:
            yield f"{name} is empty; copy the checkpoint again"


def _short(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]

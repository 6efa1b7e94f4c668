"""`vessel-export inspect`: what a checkpoint, or a folder of them, holds, and what an export would make of it.

Reads the pickle of a checkpoint, never its tensors' values (`export` and `verify` check those), and runs nothing of it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vessel_export.bundle.merge_lora import NEW_TOKENS
from vessel_export.errors import CheckpointError
from vessel_export.sources.checkpoint import LORA_PREFIX, Checkpoint, survey_checkpoint
from vessel_export.sources.mmengine_config import UNKNOWN, find

__all__ = ["CheckpointReport", "FolderReport", "Group", "inspect_checkpoint", "inspect_folder", "markdown", "show", "to_json"]

_LORA = re.compile(re.escape(LORA_PREFIX) + r"model\.layers\.(\d+)\.((?:self_attn|mlp)\.\w+)\.lora_([AB])\.weight")
_TARGETS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
_SAVED = tuple(LORA_PREFIX + name for name in ("model.embed_tokens.weight", "lm_head.weight"))
_PROJECTOR = tuple(f"mllm.model.mlp1.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias"))
_PROMPT_HEAD = tuple(f"text_hidden_fcs.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))
_DECODER = "grounding_encoder.sam2_model.sam_mask_decoder."
_NAMES = re.compile(r"(?:iter|epoch)_(\d+)\.pth")

# Group -> (what of the model it is, the names that belong to it)
_GROUPS = {
    "LoRA": "the language model's adapter",
    "modules_to_save": "embed_tokens and lm_head, whole",
    "projector": "mlp1, from image tokens to the language model",
    "prompt head": "text_hidden_fcs, from [SEG] to SAM2",
    "SAM2 mask decoder": "sam_mask_decoder",
    "unknown": "no part of the model that vessel-rt knows",
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors of one part of the model: how many, how many values, and of which dtypes."""

    name: str
    part: str
    tensors: int
    values: int
    dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint tells; "unknown" where it does not.

    `training` and `lora` are names and values to be read; `losses` are (name, type, weight). `export` says what would be done with it,
    `problems` what would stop it; each has its mend. Neither looks at values, nor at the base model's shapes.
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
    """The checkpoints of a folder, (name, bytes, iteration), by iteration; the latest, and how far its training came."""

    name: str
    checkpoints: tuple[tuple[str, int, int], ...]
    latest: str
    latest_by: str
    iteration: int
    iterations: int | str
    checkpoint: CheckpointReport | None
    problems: tuple[str, ...]


def inspect_folder(folder: Path) -> FolderReport:
    """The checkpoints in `folder`, and a report of the latest.

    Raises:
        CheckpointError: it holds no iter_*.pth and no epoch_*.pth.
    """
    found = {path: int(match[1]) for path in folder.iterdir() if (match := _NAMES.fullmatch(path.name))}
    if not found:
        inner = sorted(path.parent.name for path in folder.glob("*/*.pth") if _NAMES.fullmatch(path.name))
        mend = f"those of {inner[0]} are in {folder / inner[0]}" if inner else "give a work_dirs folder, or the path of an iter_*.pth"
        raise CheckpointError(f"{folder}: holds no iter_*.pth; {mend}")
    ordered = sorted(found, key=lambda path: found[path])
    latest, latest_by, problems = ordered[-1], "the highest number", []
    record = folder / "last_checkpoint"
    if record.is_file():
        named = folder / re.split(r"[/\\]", record.read_text(encoding="utf-8", errors="replace").strip())[-1]
        if named in found:
            latest, latest_by = named, "last_checkpoint"
        else:
            problems.append(f"last_checkpoint names {named.name}, which is not there: was it moved, or is it still being written?")
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
        CheckpointError: as `survey_checkpoint`: not a checkpoint, damaged, or one that would run code.
    """
    checkpoint = survey_checkpoint(path)
    config = checkpoint.config
    members: dict[str, list[str]] = {name: [] for name in _GROUPS}
    for name in checkpoint.tensors:
        members[_group(name)].append(name)
    present = [name for name in _GROUPS if members[name] and name != "unknown"]
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


def _group(name: str) -> str:
    if _LORA.fullmatch(name):
        return "LoRA"
    if name in _SAVED:
        return "modules_to_save"
    if name in _PROJECTOR:
        return "projector"
    if name in _PROMPT_HEAD:
        return "prompt head"
    return "SAM2 mask decoder" if name.startswith(_DECODER) else "unknown"


def _summed(name: str, tensors: Sequence[torch.Tensor]) -> Group:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    return Group(name, _GROUPS[name], len(tensors), sum(tensor.numel() for tensor in tensors), tuple(dtypes))


def _training(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    told, optimizer = checkpoint.meta, find(config, "optimizer")
    optimizer = optimizer if isinstance(optimizer, Mapping) else {}
    iterations = checkpoint.runtime_info.get("max_iters", find(config, "max_iters"))
    return {
        "epoch": told.get("epoch", UNKNOWN),
        "iteration": UNKNOWN if checkpoint.iteration is None else checkpoint.iteration,
        "iterations in all": iterations if isinstance(iterations, int) else UNKNOWN,
        "experiment": told.get("experiment_name", UNKNOWN),
        "saved at": told.get("time", UNKNOWN),
        "seed": told.get("seed", UNKNOWN),
        "mmengine": told.get("mmengine_version", UNKNOWN),
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
    matches = [match for name in checkpoint.tensors if (match := _LORA.fullmatch(name))]
    layers = {int(match[1]) for match in matches}
    return {
        "rank": checkpoint.lora_rank or UNKNOWN,
        "alpha": UNKNOWN if checkpoint.lora_alpha is None else checkpoint.lora_alpha,
        "dropout": given.get("lora_dropout", UNKNOWN),
        "layers": len(layers),
        "targets": [target for target in _TARGETS if any(match[2] == target for match in matches)],
        "saved whole": given.get("modules_to_save", UNKNOWN),
    }


def _frozen(trained: Sequence[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the checkpoint does not hold comes from the base models as it is."""
    told = {"InternViT": "freeze_visual_encoder", "the language model's own weights": "freeze_llm"}
    parts = [f"{part} ({key} = {find(config, key)})" for part, key in told.items()]
    return (*parts, "SAM2's image encoder", *(f"{_GROUPS[name]}" for name in _GROUPS if name not in (*trained, "unknown")))


def _losses(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    model = config.get("model")
    for name, value in model.items() if isinstance(model, Mapping) else ():
        if name.startswith("loss") and isinstance(value, Mapping):
            yield name, _kind(value.get("type", UNKNOWN)), value.get("loss_weight", UNKNOWN)


def _kind(value: Any) -> str:
    return str(value).rpartition(".")[2]


def _export(checkpoint: Checkpoint, members: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What the exporter would do, in its order."""
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
    """What would stop an export, as far as names and shapes tell."""
    if checkpoint.lora_alpha is None and members["LoRA"]:
        yield f"LoRA's alpha is not told: give it with --lora-alpha (Sa2VA trains with 2 r = {2 * checkpoint.lora_rank})"
    for name, kind in checkpoint.unusable.items():
        yield f"{name} is {kind}, not a dense floating-point tensor: --skip {name}, if nothing needs it"
    for name in members["unknown"]:
        yield f"{name} is unknown: --skip {name}, if nothing needs it"
    layers = [int(match[1]) for name in members["LoRA"] if (match := _LORA.fullmatch(name))]
    expected = {
        "LoRA": [
            f"{LORA_PREFIX}model.layers.{layer}.{target}.lora_{part}.weight"
            for layer in range(max(layers, default=-1) + 1)
            for target in _TARGETS
            for part in "AB"
        ],
        "modules_to_save": _SAVED,
        "projector": _PROJECTOR,
        "prompt head": _PROMPT_HEAD,
    }
    for group, names in expected.items():
        missing = [name for name in names if name not in checkpoint.tensors]
        if missing:
            yield f"{group}: {len(missing)} of {len(names)} tensors are missing, {missing[0]} first; save the checkpoint again, whole"
    if not members["LoRA"]:
        yield "LoRA: there is no adapter; vessel-rt exports models trained with one"
    if not members["SAM2 mask decoder"]:
        yield "SAM2 mask decoder: not in the checkpoint; train with frozen_sam2_decoder=False"
    for name, tensor in checkpoint.tensors.items():
        if tensor.numel() == 0:
            yield f"{name} is empty; copy the checkpoint again"


def _short(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def to_json(report: CheckpointReport | FolderReport) -> str:
    """The report for programs."""
    return json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False, default=str)


@dataclasses.dataclass(frozen=True)
class _Section:
    """A table under a title; no `head`: names and values."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _sections(report: CheckpointReport | FolderReport) -> Iterator[_Section]:
    if isinstance(report, FolderReport):
        rows = tuple((name, _size(size), str(iteration)) for name, size, iteration in report.checkpoints)
        yield _Section(f"{report.name}: {len(rows)} checkpoint{'s' * (len(rows) != 1)}", ("checkpoint", "size", "iteration"), rows)
        progress = f"{report.iteration} of {report.iterations}"
        if isinstance(report.iterations, int) and report.iterations:
            progress += f", {100 * report.iteration / report.iterations:.0f} %"
        latest = (("latest", f"{report.latest} (by {report.latest_by})"), ("progress", progress))
        yield _Section("training", (), latest)
        if report.problems:
            yield _Section("problems of the folder", ("",), tuple((problem,) for problem in report.problems))
        if report.checkpoint is None:
            return
        report = report.checkpoint
    groups = tuple((g.name, g.part, str(g.tensors), f"{g.values:,}", ", ".join(g.dtypes)) for g in report.groups)
    total = ("in all", "", str(sum(g.tensors for g in report.groups)), f"{sum(g.values for g in report.groups):,}", "")
    yield _Section(f"{report.name}, {_size(report.bytes)}", ("group", "part", "tensors", "values", "dtype"), (*groups, total))
    yield _Section("run", (), tuple((key, str(value)) for key, value in report.training.items()))
    lora = {key: ", ".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in report.lora.items()}
    yield _Section("LoRA", (), tuple(lora.items()))
    trained = tuple((line,) for line in report.trained)
    yield _Section("trained, in the checkpoint", ("",), trained or (("nothing that vessel-rt knows",),))
    yield _Section("frozen, from the base models", ("",), tuple((line,) for line in report.frozen))
    losses = tuple((name, kind, str(weight)) for name, kind, weight in report.losses)
    yield _Section("losses", ("loss", "type", "weight"), losses or ((UNKNOWN, UNKNOWN, UNKNOWN),))
    yield _Section("an export would", ("",), tuple((line,) for line in report.export))
    yield _Section("problems", ("",), tuple((line,) for line in report.problems) or (("none that names and shapes show",),))


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def markdown(report: CheckpointReport | FolderReport) -> str:
    """The report as Markdown: a heading and a table or list a section."""
    blocks = []
    for section in _sections(report):
        if len(section.head) == 1:
            lines = [f"- {line}" for (line,) in section.rows]
        else:
            head = section.head or ("", "")
            table = [head, ("---",) * len(head), *section.rows]
            lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
        blocks.append("\n".join([f"## {section.title}", "", *lines]))
    return "\n\n".join(blocks) + "\n"


def show(report: CheckpointReport | FolderReport) -> None:
    """Print the report: coloured tables on a terminal, the same without colours elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    for section in _sections(report):
        bad = section.title.startswith("problems") and "none that" not in section.rows[0][0]
        table = Table(box=box.SIMPLE_HEAD if len(section.head) > 1 else None, show_header=len(section.head) > 1, pad_edge=False)
        for number, name in enumerate(section.head or ("", "")):
            table.add_column(name, style="cyan" if number == 0 and len(section.rows[0]) > 1 else None, overflow="fold")
        for row in section.rows:
            table.add_row(*map(escape, row))
        console.print(f"[bold {'red' if bad else 'green'}]{escape(section.title)}[/]")
        console.print(table)
        console.print()

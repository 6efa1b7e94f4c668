"""An inspection's report as text and as JSON. Does not know checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vessel_export.sources.inspection import CheckpointReport, FolderReport
from vessel_export.sources.mmengine_config import UNKNOWN

__all__ = ["print_report", "to_json"]


def to_json(report: CheckpointReport | FolderReport) -> str:
    """The report for programs."""
    return json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False, default=str)


def print_report(report: CheckpointReport | FolderReport) -> None:
    """Print the report as tables, coloured on a terminal."""
    console = Console(highlight=False)
    for section in _sections(report):
        table = Table(box=box.SIMPLE_HEAD if len(section.head) > 1 else None, show_header=len(section.head) > 1, pad_edge=False)
        for number, name in enumerate(section.head or ("", "")):
            table.add_column(name, style="cyan" if number == 0 and len(section.rows[0]) > 1 else None, overflow="fold")
        for row in section.rows:
            table.add_row(*map(escape, row))
        console.print(f"[bold {'red' if section.alarming else 'green'}]{escape(section.title)}[/]")
        console.print(table)
        console.print()


@dataclasses.dataclass(frozen=True)
class _Section:
    """A table with a title. Without `head`, the rows are names and values."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    alarming: bool = False


def _sections(report: CheckpointReport | FolderReport) -> Iterator[_Section]:
    if isinstance(report, FolderReport):
        yield from _folder_sections(report)
        if report.checkpoint is None:
            return
        report = report.checkpoint
    groups = tuple((g.name, g.part, str(g.tensors), f"{g.values:,}", ", ".join(g.dtypes)) for g in report.groups)
    total = ("total", "", str(sum(g.tensors for g in report.groups)), f"{sum(g.values for g in report.groups):,}", "")
    yield _Section(f"{report.name}, {_size(report.bytes)}", ("group", "part", "tensors", "values", "dtype"), (*groups, total))
    yield _Section("run", (), tuple((key, str(value)) for key, value in report.training.items()))
    lora = {key: ", ".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in report.lora.items()}
    yield _Section("LoRA", (), tuple(lora.items()))
    yield _list("trained, in the checkpoint", report.trained or ("no tensor that vessel-rt exports",))
    yield _list("frozen, from the base models", report.frozen)
    losses = tuple((name, kind, str(weight)) for name, kind, weight in report.losses)
    yield _Section("losses", ("loss", "type", "weight"), losses or ((UNKNOWN, UNKNOWN, UNKNOWN),))
    yield _list("an export would", report.export)
    yield _list("problems", report.problems or ("none found in names and shapes",), alarming=bool(report.problems))


def _folder_sections(report: FolderReport) -> Iterator[_Section]:
    rows = tuple((name, _size(size), str(iteration)) for name, size, iteration in report.checkpoints)
    yield _Section(f"{report.name}: {len(rows)} checkpoint{'s' * (len(rows) != 1)}", ("checkpoint", "size", "iteration"), rows)
    progress = f"{report.iteration} of {report.iterations}"
    if isinstance(report.iterations, int) and report.iterations:
        progress += f", {100 * report.iteration / report.iterations:.0f} %"
    yield _Section("training", (), (("latest", f"{report.latest} (by {report.latest_by})"), ("progress", progress)))
    if report.problems:
        yield _list("problems of the folder", report.problems, alarming=True)


def _list(title: str, lines: tuple[str, ...], *, alarming: bool = False) -> _Section:
    return _Section(title, ("",), tuple((line,) for line in lines), alarming)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

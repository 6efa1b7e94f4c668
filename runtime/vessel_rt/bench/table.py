"""The measurements as rows of text, for the terminal and for bench.html. Does not know how they are measured."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from vessel_rt.bench.schema import BenchFile, BenchRow, BenchRun
from vessel_rt.measure.memory import size
from vessel_rt.measure.schema import BundleFacts
from vessel_rt.measure.timing import TOTAL

__all__ = ["STEPS", "TEXTS", "Column", "Line", "columns", "describe", "fault_place", "lines_of", "step_ms", "table"]

STEPS = {
    "prepare": ("tiles", "square"),
    "vision": ("vision_encoder",),
    "language": ("language_model",),
    "SAM2 enc.": ("sam2_image_encoder",),
    "SAM2 dec.": ("sam2_mask_decoder",),
    "masks": ("upsample",),
}
"""The columns of the steps, and the steps whose times they add."""

TEXTS = ("machine", "bundle", "device")
"""The columns that are not numbers."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the table: the names of its machine, bundle and device, the run and the row."""

    machine: str
    bundle: str
    device: str
    run: BenchRun
    row: BenchRow


Column = tuple[str, Callable[[Line], str]]


def lines_of(found: BenchFile) -> list[Line]:
    """All rows, by their tiles, so that those of the same frames are next to each other; what could not be measured comes last.

    A machine is called by its number if there are several, and a bundle by what tells it from the others.
    """
    names, several = _bundle_names(found), len(found.runs) > 1
    lines = [
        Line(str(number) if several else "", _bundle_name(run, row, names), row.device, run, row)
        for number, run in enumerate(found.runs, start=1)
        for row in run.rows
    ]
    return sorted(lines, key=lambda line: (line.row.fault != "", line.row.tiles or 0))


def _bundle_names(found: BenchFile) -> dict[str, str]:
    """The name of each bundle by its hash: its precision; with its checkpoint, and then its hash, if another has the same name."""
    facts = {bundle.sha256: bundle for run in found.runs for bundle in run.bundles if bundle}
    names = {sha256: _precision(bundle) for sha256, bundle in facts.items()}
    for more in ({sha256: facts[sha256].checkpoint for sha256 in facts}, {sha256: sha256[:8] for sha256 in facts}):
        count = Counter(names.values())
        names = {sha256: f"{name} {more[sha256]}" if count[name] > 1 else name for sha256, name in names.items()}
    return names


def _precision(bundle: BundleFacts) -> str:
    return bundle.precision if bundle.weights == bundle.precision else f"{bundle.precision} {bundle.weights}"


def _bundle_name(run: BenchRun, row: BenchRow, names: dict[str, str]) -> str:
    bundle = run.bundles[row.bundle] if row.bundle < len(run.bundles) else None
    return names[bundle.sha256] if bundle else f"bundle {row.bundle + 1}"


def step_ms(row: BenchRow, name: str) -> float | None:
    """The median milliseconds of a column of STEPS, or of TOTAL; None if none of its steps ran."""
    found = {step.step: step.p50_ms for step in row.steps}
    times = [found[step] for step in STEPS.get(name, (name,)) if step in found]
    return sum(times) if times else None


def columns(lines: Sequence[Line]) -> list[Column]:
    """The columns that have something to say about `lines`: their titles, and the text of a line."""
    every: list[Column] = [
        ("machine", lambda line: line.machine),
        ("bundle", lambda line: line.bundle),
        ("device", lambda line: line.device),
        ("tiles", lambda line: _number(line.row.tiles)),
        ("batch", lambda line: _number(line.row.batch)),
        ("images/s", lambda line: _decimal(line.row.images_per_second, 2)),
        ("ms p50", lambda line: _decimal(step_ms(line.row, TOTAL), 1)),
        ("p90", lambda line: _decimal(next((step.p90_ms for step in line.row.steps if step.step == TOTAL), None), 1)),
        *((name, _step(name)) for name in STEPS),
        ("host", lambda line: _size(line.row.host_peak_bytes)),
        ("device mem.", lambda line: _size(line.row.device_peak_bytes)),
        ("Dice", lambda line: _decimal(line.row.dice, 4)),
        ("least IoU", lambda line: _decimal(line.row.least_iou, 4)),
    ]
    measured = [line for line in lines if not line.row.fault] or lines
    return [(title, text) for title, text in every if any(map(text, measured)) or title in ("bundle", "device", "batch")]


def table(found: BenchFile) -> str:
    """The table for a terminal. What could not be measured follows, with the reason."""
    lines = lines_of(found)
    measured = [line for line in lines if not line.row.fault]
    shown = columns(measured)
    texts = [[title for title, _ in shown], *([text(line) for _, text in shown] for line in measured)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    left = [title in TEXTS for title, _ in shown]
    rows = [
        "  ".join(f"{text:{'<' if is_left else '>'}{width}}" for text, width, is_left in zip(row, widths, left, strict=True)).rstrip()
        for row in texts
    ]
    faults = [f"{fault_place(line)}: {line.row.fault}" for line in lines if line.row.fault]
    several = len(found.runs) > 1
    machines = [f"machine{f' {number}' if several else ''}: {describe(run)}" for number, run in enumerate(found.runs, start=1)]
    return "\n".join([*(rows if measured else []), *faults, *machines])


def fault_place(line: Line) -> str:
    """What a fault is about."""
    parts = [f"machine {line.machine}" if line.machine else "", f"{line.bundle} on {line.device}"]
    parts.append("" if line.row.batch is None else f"batch {line.row.batch}")
    parts.append("" if line.row.tiles is None else f"{line.row.tiles} tiles")
    return ", ".join(filter(None, parts))


def describe(run: BenchRun) -> str:
    """The machine of a run in one line: processor, cores, memory, GPUs, ONNX Runtime and its providers, date."""
    machine = run.machine
    memory = "" if machine.memory_bytes is None else f"{machine.memory_bytes / 2**30:.1f} GiB"
    runtimes = [f"{name} {version}" for name, version in machine.versions.items() if name.startswith("onnxruntime")]
    providers = dict.fromkeys(row.provider for row in run.rows if row.provider)
    parts = [machine.cpu or machine.system, f"{machine.cores} cores", memory, *(gpu.name for gpu in machine.gpus), *runtimes]
    return ", ".join(filter(None, [*parts, *providers, run.started[:10]]))


def _step(name: str) -> Callable[[Line], str]:
    return lambda line: _decimal(step_ms(line.row, name), 1)


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _decimal(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _size(value: int | None) -> str:
    return "" if value is None else size(value)

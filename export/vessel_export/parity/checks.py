"""Checks of a bundle: measurements, their tolerances, and the report. Does not know how the quantities are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["ALONE", "CINE_IOU", "QUANTIZED_TOLERANCES", "TOLERANCES", "Check", "Measurement", "Report", "Tolerances", "worst_of"]

ALONE = "mean mask IoU, alone"  # of the reference's masks with the outputs of one stage of the bundle


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """How far a bundle may differ from the reference.

    `relative_error`: the maximum for an output of a graph, max|bundle - reference| / max|reference|. `mask_iou`: the minimum IoU of a mask
    end to end, over its decided pixels: those whose reference logit is farther from zero than `undecided` times the mask's largest.
    `steps`: the maximum error of a quantized weight, where a step is the scale of its block.
    `mean_iou` and `mean_dice` are minimums over all masks; None if the minimum of each mask says enough.
    """

    relative_error: float
    mask_iou: float
    undecided: float = 0.0
    mean_iou: float | None = None
    mean_dice: float | None = None
    steps: float = 0.51


# Reasons: docs/numerics.md. Pixels, prompt ids, answer ids and the number of masks must be equal at every precision.
TOLERANCES = {
    "fp32": Tolerances(relative_error=1e-4, mask_iou=1.0, undecided=1e-4),
    "fp16": Tolerances(relative_error=3e-2, mask_iou=0.995),
    "bf16": Tolerances(relative_error=2e-1, mask_iou=0.96),
}

# Of quantized stages, and of the masks of a bundle that has any.
QUANTIZED_TOLERANCES = {
    "int8": Tolerances(relative_error=6e-2, mask_iou=0.9, mean_iou=0.995, mean_dice=0.997),
    "int4": Tolerances(relative_error=4e-1, mask_iou=0.85, mean_iou=0.985, mean_dice=0.992),
}


# The minimum IoU of a mask on each frame of a cine, by the type of the matrices: errors go from frame to frame with the memories. With
# integers as for single frames.
CINE_IOU = {"fp32": 0.9999, "fp16": 0.98, "bf16": 0.95, "int8": 0.9, "int4": 0.85}


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of a report: the worst value over all images and questions.

    `measured` is a relative error of at most `limit`, or with `at_least` a share or an IoU of at least `limit`. Without a limit it is shown
    only. `max_abs` is the absolute error of the same run, None if it has no meaning. `worst` names the run; it is empty if no run differs.
    """

    stage: str
    quantity: str
    measured: float
    limit: float | None
    at_least: bool
    max_abs: float | None
    worst: str

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        if self.limit is None:
            return True
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclasses.dataclass(frozen=True)
class Report:
    """All checks of one bundle, the number of runs (images times questions) and of masks, whether the bundle was emulated, and the type of
    its weights if they are quantized."""

    precision: str
    runs: int
    masks: int
    checks: tuple[Check, ...]
    emulated: bool = False
    weights: str | None = None

    @property
    def passed(self) -> bool:
        return self.masks > 0 and all(check.passed for check in self.checks)

    def table(self) -> str:
        """The report as text, one line for each check."""
        header = ("stage", "quantity", "max abs", "measured", "limit", "", "worst")
        rows = [header] + [
            (
                check.stage,
                check.quantity,
                "" if check.max_abs is None else f"{check.max_abs:.2e}",
                f"{check.measured:.6f}" if check.at_least else f"{check.measured:.2e}",
                "" if check.limit is None else f"{'>=' if check.at_least else '<='} {check.limit:g}",
                "" if check.limit is None else "ok" if check.passed else "FAILED",
                check.worst,
            )
            for check in self.checks
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        types = f"{self.precision}, {self.weights} weights" if self.weights else self.precision
        lines.append(f"{types}: {self.runs} runs, {self.masks} masks: {self._verdict()}")
        if self.emulated:
            lines.append(f"emulated: every operator computed in FP32 on the CPU, its result rounded to {self.precision}")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.masks:
            return "FAILED: no answer has [SEG], so no mask was compared; give --images that show vessels"
        failed = sum(not check.passed for check in self.checks)
        alone = min((check for check in self.checks if check.quantity == ALONE), key=lambda check: check.measured, default=None)
        moved = f"; {alone.stage} alone moves the masks most, to a mean IoU of {alone.measured:.4f}" if alone else ""
        return f"FAILED ({failed} of {sum(check.limit is not None for check in self.checks)} checks){moved}" if failed else "parity"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One quantity of one run. The check of an `average` is the mean over all runs, otherwise their worst."""

    stage: str
    quantity: str
    measured: float
    limit: float | None
    run: str
    at_least: bool = False
    max_abs: float | None = None
    average: bool = False


def worst_of(measurements: Sequence[Measurement]) -> Iterator[Check]:
    """A check for each quantity, in order of first appearance."""
    grouped: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in measurements:
        grouped.setdefault((measurement.stage, measurement.quantity), []).append(measurement)
    for (stage, quantity), group in grouped.items():
        worst = max(group, key=lambda m: (np.isnan(m.measured), -m.measured if m.at_least else m.measured))
        measured = float(np.mean([m.measured for m in group])) if worst.average else worst.measured
        ideal = 1.0 if worst.at_least else 0.0
        yield Check(stage, quantity, measured, worst.limit, worst.at_least, worst.max_abs, "" if measured == ideal else worst.run)

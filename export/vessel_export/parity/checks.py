"""Checks of a bundle: measurements, their tolerances, and the report. Does not know how the quantities are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["TOLERANCES", "Check", "Measurement", "Report", "Tolerances", "worst_of"]


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """How far a bundle may differ from the reference.

    `relative_error`: the maximum for an output of a graph, max|bundle - reference| / max|reference|. `mask_iou`: the minimum IoU of a mask
    end to end, over its decided pixels: those whose reference logit is farther from zero than `undecided` times the mask's largest.
    """

    relative_error: float
    mask_iou: float
    undecided: float = 0.0


# Reasons: docs/numerics.md. Pixels, prompt ids, answer ids and the number of masks must be equal at every precision.
TOLERANCES = {
    "fp32": Tolerances(relative_error=1e-4, mask_iou=1.0, undecided=1e-4),
    "fp16": Tolerances(relative_error=3e-2, mask_iou=0.995),
    "bf16": Tolerances(relative_error=2e-1, mask_iou=0.96),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of a report: the worst value over all images and questions.

    `measured` is a relative error of at most `limit`, or with `at_least` a share or an IoU of at least `limit`. `max_abs` is the absolute
    error of the same run, None if it has no meaning. `worst` names the run; it is empty if no run differs.
    """

    stage: str
    quantity: str
    measured: float
    limit: float
    at_least: bool
    max_abs: float | None
    worst: str

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclasses.dataclass(frozen=True)
class Report:
    """All checks of one bundle, the number of runs (images times questions) and of masks, and whether the bundle was emulated."""

    precision: str
    runs: int
    masks: int
    checks: tuple[Check, ...]
    emulated: bool = False

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
                f">= {check.limit:g}" if check.at_least else f"<= {check.limit:g}",
                "ok" if check.passed else "FAILED",
                check.worst,
            )
            for check in self.checks
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"{self.precision}: {self.runs} runs, {self.masks} masks: {self._verdict()}")
        if self.emulated:
            lines.append(f"emulated: every operator computed in FP32 on the CPU, its result rounded to {self.precision}")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.masks:
            return "FAILED: no answer has [SEG], so no mask was compared; give --images that show vessels"
        failed = sum(not check.passed for check in self.checks)
        return f"FAILED ({failed} of {len(self.checks)} checks)" if failed else "parity"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One quantity of one run."""

    stage: str
    quantity: str
    measured: float
    limit: float
    run: str
    at_least: bool = False
    max_abs: float | None = None


def worst_of(measurements: Sequence[Measurement]) -> Iterator[Check]:
    """A check for each quantity, in order of first appearance. Equalities become the share of runs that agree."""
    grouped: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in measurements:
        grouped.setdefault((measurement.stage, measurement.quantity), []).append(measurement)
    for (stage, quantity), group in grouped.items():
        worst = max(group, key=lambda m: (np.isnan(m.measured), -m.measured if m.at_least else m.measured))
        measured = float(np.mean([m.measured for m in group])) if "identical" in quantity else worst.measured
        ideal = 1.0 if worst.at_least else 0.0
        yield Check(stage, quantity, measured, worst.limit, worst.at_least, worst.max_abs, "" if measured == ideal else worst.run)

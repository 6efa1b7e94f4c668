"""The lines of a check: each is told as it is made, and saved, so that a process that crashes leaves what it found.

Does not know what is checked.
"""

from __future__ import annotations

import datetime
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from vessel_rt.check.schema import (
    GRADES,
    BatchSpeed,
    CheckedBundle,
    CheckFile,
    CheckLine,
    GradeName,
    Outcome,
    StageError,
    StepTime,
)
from vessel_rt.errors import VesselError, first_line
from vessel_rt.measure.schema import MachineFacts

__all__ = ["Record"]


class Record:
    """What was found so far.

    Args:
        redact: takes out of a message what must not be passed on.
        say: called with each line.
        save: called with the whole after each line.
    """

    def __init__(self, redact: Callable[[str], str], say: Callable[[CheckLine], object], save: Callable[[CheckFile], object]) -> None:
        self._redact, self._say, self._save = redact, say, save
        self._started, self._began = datetime.datetime.now(datetime.UTC), time.perf_counter()
        self._lines: list[CheckLine] = []
        self.device: str | None = None
        """The device that the next lines are about; None: the machine or the bundle."""
        self.machine: MachineFacts | None = None
        self.bundle: CheckedBundle | None = None
        self.stages: list[StageError] = []
        self.times: list[StepTime] = []
        self.batches: list[BatchSpeed] = []

    def passed(self, grade: GradeName, name: str, figure: str) -> None:
        self._add(grade, name, "pass", figure, "")

    def failed(self, grade: GradeName, name: str, reason: str, figure: str = "") -> None:
        self._add(grade, name, "fail", figure, reason)

    def skipped(self, grade: GradeName, name: str, reason: str) -> None:
        self._add(grade, name, "skip", "", reason)

    def judged(self, grade: GradeName, name: str, figure: str, fault: str | None) -> None:
        """A line that passes if there is no `fault`."""
        if fault is None:
            self.passed(grade, name, figure)
        else:
            self.failed(grade, name, fault, figure)

    @contextmanager
    def attempt(self, grade: GradeName, name: str) -> Iterator[None]:
        """What the block raises becomes a line that failed, and the check goes on. A bug also prints its traceback."""
        try:
            yield
        except VesselError as e:
            self.failed(grade, name, str(e))
        except Exception as e:
            print(self._redact(traceback.format_exc()), end="", file=sys.stderr)
            self.failed(grade, name, f"{type(e).__name__}: {first_line(e)}; this is a bug of vessel-rt: send check.json and the traceback")

    def complete(self) -> None:
        """Skip every grade that has no line for this device, because of the first check that failed."""
        lines = [line for line in self._lines if line.device in (None, self.device)]
        first = next((line for line in lines if line.outcome == "fail"), None)
        for grade in GRADES:
            if grade not in {line.grade for line in lines}:
                self.skipped(grade, grade, f"not checked, since {first.grade}: {first.name} failed" if first else "not checked")

    @property
    def failures(self) -> Sequence[CheckLine]:
        """The checks that failed."""
        return [line for line in self._lines if line.outcome == "fail"]

    def file(self, *, finished: bool) -> CheckFile:
        """The content of check.json."""
        return CheckFile(
            verdict=self._verdict(finished),
            passed=finished and not self.failures,
            finished=finished,
            started=self._started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - self._began, 1),
            machine=self.machine,
            bundle=self.bundle,
            lines=tuple(self._lines),
            stages=tuple(self.stages),
            times=tuple(self.times),
            batches=tuple(self.batches),
        )

    def _verdict(self, finished: bool) -> str:
        skipped = dict.fromkeys(line.name for line in self._lines if line.outcome == "skip")
        passed = sum(line.outcome == "pass" for line in self._lines)
        if not finished:
            last = self._lines[-1] if self._lines else None
            return f"NOT FINISHED: the last check was {last.grade}: {last.name}" if last else "NOT FINISHED"
        if not self.failures:
            return f"PASS: {passed} passed" + (f", skipped: {', '.join(skipped)}" if skipped else "")
        first = self.failures[0]
        others = f"; {len(self.failures) - 1} more failed" if len(self.failures) > 1 else ""
        return f"FAIL: {first.grade}: {first.name}{f' on {first.device}' if first.device else ''}{others}; {passed} passed"

    def _add(self, grade: GradeName, name: str, outcome: Outcome, figure: str, reason: str) -> None:
        figure, reason = (self._redact(" ".join(text.split())) for text in (figure, reason))
        line = CheckLine(grade, name, self.device, outcome, figure, reason)
        self._lines.append(line)
        self._say(line)
        self._save(self.file(finished=False))

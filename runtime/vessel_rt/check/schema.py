"""The types of check.json. Does not know how its content is measured."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct

from vessel_rt.formats.schema import Items, Text
from vessel_rt.measure.schema import BundleFacts, Count, MachineFacts, Measured

__all__ = [
    "CHECK_FILE",
    "GRADES",
    "SCHEMA",
    "BatchSpeed",
    "CheckFile",
    "CheckLine",
    "CheckedBundle",
    "GradeName",
    "Outcome",
    "StageError",
    "StepTime",
]

CHECK_FILE = "check.json"
SCHEMA = 1

GradeName = Literal["machine", "bundle", "providers", "loading", "parity", "determinism", "speed", "memory", "cines", "endurance"]
GRADES: tuple[GradeName, ...] = get_args(GradeName)
Outcome = Literal["pass", "fail", "skip"]


class CheckLine(Struct, frozen=True):
    """One check.

    Attributes:
        grade: the group of the check.
        name: what was checked, such as a stage.
        device: the device; null if the check is of the machine or the bundle alone.
        outcome: `pass`, `fail` or `skip`.
        figure: what was measured; empty if nothing was.
        reason: why it failed or was skipped, and what to do; empty if it passed.
    """

    grade: GradeName
    name: Text
    device: Text | None
    outcome: Outcome
    figure: Text = ""
    reason: Text = ""


class CheckedBundle(BundleFacts, frozen=True):
    """The bundle.

    Attributes:
        cases: the number of golden cases; 0 if it has no goldens.
    """

    cases: Count


class StageError(Struct, frozen=True):
    """The largest error of a stage's output over all golden cases, or that of the golden cine.

    Attributes:
        device: the device.
        stage: the stage.
        output: the output.
        error: an estimate of the L2 norm of the difference over that of the reference; null if it is not a number.
        limit: the tolerance.
        case: the golden case with that error, by its position; null: the cine.
    """

    device: Text
    stage: Text
    output: Text
    error: Measured | None
    limit: Measured
    case: Count | None


class StepTime(Struct, frozen=True):
    """The time of one step for an image, one image at a time.

    Attributes:
        device: the device.
        tiles: the tiles of the image.
        step: a step of the pipeline, or `total`.
        runs: the number of runs.
        p50_ms: the median, in milliseconds.
        p90_ms: the 90th percentile, in milliseconds.
        floor_ms: the least time that the card's data sheet allows (docs/performance.md); null if that is not known.
        mfu: the share of the card's compute rate that the median reaches; null if that is not known.
        mbu: the share of the card's memory bandwidth that the median reaches; null if that is not known.
    """

    device: Text
    tiles: Count
    step: Text
    runs: Count
    p50_ms: Measured
    p90_ms: Measured
    floor_ms: Measured | None = None
    mfu: Measured | None = None
    mbu: Measured | None = None


class BatchSpeed(Struct, frozen=True):
    """The images per second at a batch size.

    Attributes:
        device: the device.
        tiles: the tiles of each image.
        batch: the images at once.
        images_per_second: the images per second, preparation and masks included.
    """

    device: Text
    tiles: Count
    batch: Count
    images_per_second: Measured


class CheckFile(Struct, frozen=True, kw_only=True):
    """`check.json`. It has no file names of images, no host name, and no paths outside the bundle.

    Attributes:
        schema: the version of this format.
        verdict: the result in one line.
        passed: whether no check failed.
        finished: whether all checks were made. A file that is not finished was left by a process that was killed or crashed.
        started: the time of the start, in UTC.
        seconds: the time that the checks took.
        machine: the machine; null until it was described.
        bundle: the bundle; null if it could not be read.
        lines: the checks, in order.
        stages: the errors of the stages against the goldens.
        times: the times of the steps.
        batches: the speed by batch size.
    """

    schema: Annotated[int, Meta(ge=1, le=SCHEMA)] = SCHEMA
    verdict: Text
    passed: bool
    finished: bool
    started: Text
    seconds: Measured
    machine: MachineFacts | None
    bundle: CheckedBundle | None
    lines: Items[CheckLine]
    stages: Items[StageError] = ()
    times: Items[StepTime] = ()
    batches: Items[BatchSpeed] = ()

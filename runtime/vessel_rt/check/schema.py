"""The types of check.json. Does not know how its content is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from vessel_rt.formats.schema import Items, Table, Text

__all__ = [
    "CHECK_FILE",
    "GRADES",
    "SCHEMA",
    "BatchSpeed",
    "CheckFile",
    "CheckLine",
    "CheckedBundle",
    "GradeName",
    "MachineFacts",
    "MachineGpu",
    "Outcome",
    "StageError",
    "StepTime",
]

CHECK_FILE = "check.json"
SCHEMA = 1

GradeName = Literal["machine", "bundle", "providers", "loading", "parity", "determinism", "speed", "memory", "endurance"]
GRADES: tuple[GradeName, ...] = ("machine", "bundle", "providers", "loading", "parity", "determinism", "speed", "memory", "endurance")
Outcome = Literal["pass", "fail", "skip"]

_Bytes = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Count = Annotated[int, Meta(ge=0, le=2**31)]
_Measured = Annotated[float, Meta(ge=0, le=1e15)]


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


class MachineGpu(Struct, frozen=True):
    """A GPU of the machine.

    Attributes:
        name: the name.
        architecture: the compute capability, as in `sm86`.
        memory_bytes: the total memory.
    """

    name: Text
    architecture: Text
    memory_bytes: _Bytes


class MachineFacts(Struct, frozen=True):
    """The machine.

    Attributes:
        system: the operating system and the processor's architecture.
        cpu: the processor's name; null if the system does not tell.
        cores: the cores that the process may use.
        features: instruction sets that speed up matrix products.
        memory_bytes: the host's memory; null if the system does not tell.
        gpus: NVIDIA's GPUs, in CUDA's order.
        driver: the version of NVIDIA's driver; null if there is none, or nvidia-ml-py is not installed.
        versions: the versions of vessel-rt, Python, ONNX Runtime and its libraries.
    """

    system: Text
    cpu: Text | None
    cores: _Count
    features: Items[Text]
    memory_bytes: _Bytes | None
    gpus: Items[MachineGpu]
    driver: Text | None
    versions: Table[Text, Text]


class CheckedBundle(Struct, frozen=True):
    """The bundle.

    Attributes:
        sha256: the hash of bundle.json, which has the hashes of all other files.
        precision: `fp32`, `fp16` or `bf16`.
        weights: the type of the matrices.
        checkpoint: the file name of the checkpoint.
        layers: the number of the language model's layers.
        cases: the number of golden cases; 0 if it has no goldens.
    """

    sha256: Text
    precision: Text
    weights: Text
    checkpoint: Text
    layers: _Count
    cases: _Count


class StageError(Struct, frozen=True):
    """The largest error of a stage's output over all golden cases.

    Attributes:
        device: the device.
        stage: the stage.
        output: the output.
        error: an estimate of the L2 norm of the difference over that of the reference; null if it is not a number.
        limit: the tolerance.
        case: the golden case with that error, by its position.
    """

    device: Text
    stage: Text
    output: Text
    error: _Measured | None
    limit: _Measured
    case: _Count


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
    tiles: _Count
    step: Text
    runs: _Count
    p50_ms: _Measured
    p90_ms: _Measured
    floor_ms: _Measured | None = None
    mfu: _Measured | None = None
    mbu: _Measured | None = None


class BatchSpeed(Struct, frozen=True):
    """The images per second at a batch size.

    Attributes:
        device: the device.
        tiles: the tiles of each image.
        batch: the images at once.
        images_per_second: the images per second, preparation and masks included.
    """

    device: Text
    tiles: _Count
    batch: _Count
    images_per_second: _Measured


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
    seconds: _Measured
    machine: MachineFacts | None
    bundle: CheckedBundle | None
    lines: Items[CheckLine]
    stages: Items[StageError] = ()
    times: Items[StepTime] = ()
    batches: Items[BatchSpeed] = ()

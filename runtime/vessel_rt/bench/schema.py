"""The types of bench.json. Does not know how its content is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from vessel_rt.formats.schema import Items, Text
from vessel_rt.measure.schema import BundleFacts, Bytes, Count, MachineFacts, Measured

__all__ = ["BENCH_FILE", "MINOR", "SCHEMA", "BenchFile", "BenchFrames", "BenchRow", "BenchRun", "BenchStep", "Source"]

BENCH_FILE = "bench.json"
SCHEMA, MINOR = 1, 0

Source = Literal["given", "goldens"]
_Share = Annotated[float, Meta(ge=0, le=1)]


class BenchStep(Struct, frozen=True):
    """The time of one step, for one image.

    Attributes:
        step: a step of the pipeline, or `total`: the wall time of a batch over its images. On a GPU some steps run at the same time.
        p50_ms: the median of all runs, in milliseconds.
        p90_ms: the 90th percentile, in milliseconds.
    """

    step: Text
    p50_ms: Measured
    p90_ms: Measured


class BenchRow(Struct, frozen=True):
    """A bundle on a device at one batch size: the figures of its frames with as many tiles, or why there are none.

    Attributes:
        bundle: the bundle, by its position in `bundles`.
        device: the device.
        provider: ONNX Runtime's name of what runs the graphs; empty if the device was not reached.
        batch: the images at once; null if nothing could be run at any batch size.
        tiles: the tiles of each image; null if the row is about all images.
        fault: why there are no figures; empty if there are.
        runs: the batches that were timed.
        images_per_second: the median, preparation and masks included, without reading and writing files.
        steps: the times of the steps; the last is `total`.
        host_peak_bytes: the peak of the process's anonymous memory up to the end of this batch size; null if the system does not tell.
        device_peak_bytes: that of the GPU's memory, without what was in use before; null on a CPU, or without nvidia-ml-py.
        masks: the number of masks, of each frame once.
        dice: the mean Dice of the frames that have ground truth; null if none has.
        least_iou: the least IoU of a mask with that of the FP32 bundle, 0 if their numbers differ; null without an FP32 bundle, and for
            the row that the others are compared with.
    """

    bundle: Count
    device: Text
    provider: Text
    batch: Count | None
    tiles: Count | None
    fault: Text = ""
    runs: Count = 0
    images_per_second: Measured | None = None
    steps: Items[BenchStep] = ()
    host_peak_bytes: Bytes | None = None
    device_peak_bytes: Bytes | None = None
    masks: Count = 0
    dice: _Share | None = None
    least_iou: _Share | None = None


class BenchFrames(Struct, frozen=True):
    """Frames with the same number of tiles.

    Attributes:
        tiles: the tiles of each, the thumbnail included, as the first bundle cuts them.
        count: the number of frames.
    """

    tiles: Count
    count: Count


class BenchRun(Struct, frozen=True, kw_only=True):
    """All measurements of one command.

    Attributes:
        started: the time of the start, in UTC.
        seconds: the time that it took.
        finished: whether everything was measured. A run that is not finished was stopped.
        machine: the machine.
        source: `given` for the user's frames, `goldens` for the drawn ones in a bundle.
        frames: the frames, by their number of tiles.
        question: the question that was asked.
        rounds: how often each bundle was loaded on each device, in turn.
        threads: the CPU threads of an operator; 0 if ONNX Runtime chose.
        bundles: the bundles; null for one that could not be read.
        rows: the measurements.
    """

    started: Text
    seconds: Measured
    finished: bool
    machine: MachineFacts
    source: Source
    frames: Items[BenchFrames]
    question: Text
    rounds: Count
    threads: Count
    bundles: Items[BundleFacts | None]
    rows: Items[BenchRow]


class BenchFile(Struct, frozen=True, kw_only=True):
    """`bench.json`. It has no names of frames, folders and hosts. Files of several machines merge into one.

    Attributes:
        schema: the version of this format. A higher one is refused.
        minor: counts the fields that were added since. Those that a reader does not know are ignored, and those that are missing are empty.
        runs: the commands whose measurements these are.
    """

    schema: Annotated[int, Meta(ge=1, le=SCHEMA)] = SCHEMA
    minor: Count = MINOR
    runs: Items[BenchRun]

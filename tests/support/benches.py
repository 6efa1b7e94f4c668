"""What the tests of `vessel-rt bench` share: a run as it would be measured, and the type of a function that measures."""

from __future__ import annotations

from collections.abc import Callable

from vessel_rt.bench.schema import BenchFile, BenchFrames, BenchRow, BenchRun, BenchStep
from vessel_rt.measure.schema import BundleFacts, MachineFacts, MachineGpu

Bench = Callable[..., BenchFile]

ONCE = "from vessel_rt.measure import timing; timing._LEAST_RUNS = timing._MOST_RUNS = 1\n"
"""What a process runs first, so that it measures every time once."""

STEPS = ("tiles", "square", "vision_encoder", "language_model", "sam2_image_encoder", "sam2_mask_decoder", "upsample")


def row(bundle: int, device: str, batch: int, tiles: int, ms: float) -> BenchRow:
    """A row whose steps take `ms` / 8 each, and the whole image `ms`."""
    steps = tuple(BenchStep(step, ms / 8, ms / 7) for step in STEPS)
    return BenchRow(
        bundle=bundle,
        device=device,
        provider="CPUExecutionProvider",
        batch=batch,
        tiles=tiles,
        runs=6,
        images_per_second=round(1e3 / ms, 3),
        steps=(*steps, BenchStep("total", ms, ms * 1.1)),
        host_peak_bytes=2_000_000_000,
        device_peak_bytes=None if device == "cpu" else 16_000_000_000,
        masks=2,
        dice=0.8123,
        least_iou=None if bundle == 0 else 0.9912,
    )


def bench_run(cpu: str = "A <processor>", started: str = "2026-01-02T03:04:05+00:00", finished: bool = True) -> BenchRun:
    """Two bundles on two devices at two batch sizes; a third cannot be read, and one batch does not fit."""
    rows = [
        row(bundle, device, batch, tiles, (100 if device == "cpu" else 10) * (1 + bundle) * tiles / batch)
        for bundle in range(2)
        for device in ("cpu", "cuda:0")
        for batch in (1, 2)
        for tiles in (1, 10)
    ]
    rows.append(BenchRow(1, "cuda:0", "CUDAExecutionProvider", 4, None, "not run: needs about 20.00 GB of memory with 4 images at once"))
    rows.append(BenchRow(2, "cpu", "", None, None, "bundle: <damaged> bundle"))
    gpus, versions = (MachineGpu("Card", "sm86", 24 << 30),), {"onnxruntime": "1.32.0"}
    facts = [BundleFacts(digit * 64, precision, precision, "iter_1.pth", 28) for digit, precision in (("0", "fp32"), ("1", "fp16"))]
    return BenchRun(
        started=started,
        seconds=12.3,
        finished=finished,
        machine=MachineFacts("Linux x86_64", cpu, 8, ("avx2",), 32 << 30, gpus, "580.65", versions),
        source="given",
        frames=(BenchFrames(1, 3), BenchFrames(10, 1)),
        question="Please segment <vessel> in this image.",
        rounds=2,
        threads=0,
        bundles=(*facts, None),
        rows=tuple(rows),
    )


def bench_file(*runs: BenchRun) -> BenchFile:
    return BenchFile(runs=runs or (bench_run(),))

"""The counts of a run, and the content of run.json. Does not know how the frames were run."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import vessel_rt
from vessel_rt.device.providers import Device, onnxruntime
from vessel_rt.formats.bundle import Bundle
from vessel_rt.results.schema import SCHEMA, RunFile, RunOptions
from vessel_rt.results.writer import Entry

__all__ = ["Summary", "run_content"]

_LIBRARIES = ("numpy", "pillow", "tokenizers", "safetensors", "pycocotools")


@dataclasses.dataclass
class Summary:
    """The counts of a run, and the seconds that loading the bundle and running the frames took.

    Of `total` frames (`in_all_shards` together) `images` have been tried, by this run or an earlier one. `kept` of these were done by an
    earlier run, and `unread` of those have inputs that cannot be read now. `answers`, `masks`, `without_mask` and `undrafted` (answers that
    took runs of language_model after the first) count results: a frame has one for each question. Each of `streams` ran `batch` images at
    once, or `least_batch` after the device ran out of memory. `skipped` counts the files that were not taken, by input and kind. `stopped`
    is the signal that stopped the run, if one did.
    """

    total: int = 0
    in_all_shards: int = 0
    images: int = 0
    kept: int = 0
    unread: int = 0
    failed: int = 0
    answers: int = 0
    undrafted: int = 0
    masks: int = 0
    without_mask: int = 0
    streams: int = 1
    batch: int = 1
    least_batch: int = 1
    load_seconds: float = 0.0
    seconds: float = 0.0
    skipped: dict[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    stopped: signal.Signals | None = None

    @property
    def images_per_second(self) -> float:
        return (self.images - self.kept) / self.seconds if self.seconds else 0.0

    def count(self, entry: Entry) -> None:
        """Add one frame to the counts."""
        self.images += 1
        if entry.error is not None:
            self.failed += 1
            return
        for line, timing in zip(entry.lines, entry.timings, strict=True):
            self.answers += 1
            self.undrafted += (timing["decode_steps"] or 0) > 0  # None where timings.jsonl was lost
            self.masks += len(line["masks"])
            self.without_mask += not line["masks"]


def run_content(
    bundle: Bundle, devices: Sequence[Device], options: Mapping[str, Any], started: datetime.datetime, summary: Summary
) -> RunFile:
    """The content of run.json, for a run with these options."""
    return {
        "schema": SCHEMA,
        "versions": {
            "vessel-rt": vessel_rt.__version__,
            "python": platform.python_version(),
            "onnxruntime": onnxruntime().__version__,
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
        "bundle": {
            "name": bundle.folder.resolve().name,
            "sha256": bundle.sha256,
            "precision": bundle.precision,
            "weights": bundle.weights,
            "checkpoint": bundle.provenance.checkpoint,
        },
        "device": ", ".join(map(str, devices)),
        "batch": {"streams": summary.streams, "at_first": summary.batch, "least": summary.least_batch},
        "options": cast(RunOptions, options),
        "counts": {
            "in_all_shards": summary.in_all_shards,
            "images": summary.images,
            "ok": summary.images - summary.failed,
            "failed": summary.failed,
            "kept": summary.kept,
            "answers": summary.answers,
            "with_decode_steps": summary.undrafted,
            "masks": summary.masks,
            "without_mask": summary.without_mask,
        },
        "skipped": summary.skipped,
        "started": started.isoformat(timespec="seconds"),
        "seconds": {"load": round(summary.load_seconds, 3), "images": round(summary.seconds, 3)},
        "images_per_second": round(summary.images_per_second, 4),
        "peak_memory_bytes": _peak_memory(),
    }


def _peak_memory() -> int | None:
    """The peak resident set of this process so far, in bytes, from Linux's /proc; None elsewhere.

    Not getrusage: its figure includes the parent's memory at the time of the fork.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    peak = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024

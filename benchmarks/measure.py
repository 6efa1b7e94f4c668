"""Shared by the benchmarks: running a command and measuring it, the machine's description, and saving results."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vessel_rt.device.providers import Device
from vessel_rt.inputs.frames import Naming
from vessel_rt.inputs.images import SUFFIXES
from vessel_rt.inputs.pseudonyms import StudyCodes
from vessel_rt.measure.machine import describe_machine
from vessel_rt.run.infer import InferOptions
from vessel_rt.run.worker import WorkOptions

__all__ = ["Usage", "infer_options", "machine", "others_seconds", "process_field", "publish", "run", "square_frames"]

RESULTS = Path(__file__).parent / "results"

_INTERVAL = 0.05  # seconds between two readings of a command's memory
_LIBRARIES = ("torch", "transformers", "peft", "onnx", "onnxscript", "onnxruntime", "onnxruntime-ep-nv-tensorrt-rtx-cu13")


@dataclasses.dataclass(frozen=True)
class Usage:
    """One command: wall time, peak of the anonymous memory of all its processes together, bytes passed to write(2), exit code, stderr."""

    seconds: float
    peak_anonymous_bytes: int
    bytes_written: int
    exit_code: int
    errors: str


def run(command: Sequence[str | Path], *, limit_bytes: int | None = None) -> Usage:
    """Run `command`; kill it if its anonymous memory exceeds `limit_bytes`. Linux only."""
    began = time.perf_counter()
    peak = written = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([str(word) for word in command], stdout=sys.stderr, stderr=errors)
        while process.poll() is None:
            family = _family(process.pid)
            anonymous = sum(process_field(pid, "status", "RssAnon:") * 1024 for pid in family)
            peak, written = max(peak, anonymous), max(written, sum(process_field(pid, "io", "wchar:") for pid in family))
            if limit_bytes is not None and anonymous > limit_bytes:
                process.kill()
            time.sleep(_INTERVAL)
        errors.seek(0)
        text = errors.read().decode(errors="replace")
    return Usage(time.perf_counter() - began, peak, written, process.returncode, text)


def _family(pid: int) -> list[int]:
    """`pid` and its descendants."""
    members = [pid]
    for member in members:
        try:
            for task in Path(f"/proc/{member}/task").iterdir():
                members += map(int, (task / "children").read_text().split())
        except OSError:  # it has ended
            continue
    return members


def process_field(pid: int, file: str, name: str) -> int:
    """A number in /proc/<pid>/<file>; 0 if the process has ended."""
    try:
        text = Path(f"/proc/{pid}/{file}").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name)), 0)


def others_seconds() -> float:
    """Processor seconds used on this machine, except by this process and by those that it started and that have ended. Linux only."""
    user, nice, system, _, _, interrupts, soft, stolen = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    ticks = user + nice + system + interrupts + soft + stolen
    ours = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return ticks / os.sysconf("SC_CLK_TCK") - sum(used.ru_utime + used.ru_stime for used in ours)


def infer_options(frames: Path, output: Path, question: str, device: Device, *, draft: bool = True) -> InferOptions:
    """Options for `vessel_rt.run.infer.infer` in this process. The key of its study codes is not secret."""
    return InferOptions((str(frames),), output, Naming(StudyCodes(b"benchmark")), WorkOptions((question,), draft=draft), devices=(device,))


def square_frames(source: Path, folder: Path, side: int, count: int) -> None:
    """Write `count` frames of `side` x `side` pixels to `folder`, made from those in `source`. Each round is rotated by one more degree."""
    originals = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
    folder.mkdir()
    for number in tqdm(range(count), desc="making frames", disable=None, delay=2, leave=False):
        with Image.open(originals[number % len(originals)]) as image:
            frame = image.convert("RGB").resize((side, side)).rotate(number // len(originals), Image.Resampling.BILINEAR)
        frame.save(folder / f"study-{number + 1:04}.png", compress_level=1)


def machine() -> dict[str, Any]:
    """This machine and its libraries, those of the exporter included."""
    facts, versions = describe_machine(), {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": facts.cpu or "",
        "cores": facts.cores,
        "memory_gib": round((facts.memory_bytes or 0) / 2**30, 1),
        "system": facts.system,
        "python": facts.versions["python"],
        **versions,
    }


def publish(name: str, result: dict[str, Any]) -> None:
    """Save `result` as results/<name>.json, and print it as the last line."""
    document = {"benchmark": name, "machine": machine(), **result}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))

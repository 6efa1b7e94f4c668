"""Many images through one Segmenter: which they are, one after the other, and the account of the run."""

from __future__ import annotations

import dataclasses
import datetime
import glob
import importlib.metadata
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

import vessel_rt
from vessel_rt.bundle import BUNDLE_FILE, Bundle, sha256_of
from vessel_rt.deployment import Deployment, deploy
from vessel_rt.engine import ENGINES
from vessel_rt.errors import ImageError, VesselError
from vessel_rt.image import SUFFIXES, read_image
from vessel_rt.outputs import OutputFolder
from vessel_rt.segmenter import Result, Segmenter
from vessel_rt.session import Device, onnxruntime

__all__ = ["InferOptions", "Summary", "find_images", "infer"]

_LIBRARIES = ("numpy", "pillow", "tokenizers", "safetensors", "pycocotools")


@dataclasses.dataclass(frozen=True)
class InferOptions:
    """What `infer` is asked to do: `inputs` are files, folders and globs, of which None takes all; 0 `threads` is ONNX Runtime's choice."""

    inputs: tuple[str, ...]
    output: Path
    question: str
    num_images: int | None = None
    device: Device = Device("auto")  # noqa: RUF009 (immutable)
    threads: int = 0
    overwrite: bool = False


@dataclasses.dataclass
class Summary:
    """What became of the images of a run, and the seconds that loading the bundle and running them took."""

    images: int = 0
    failed: int = 0
    masks: int = 0
    without_mask: int = 0
    load_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def find_images(inputs: Sequence[str], num_images: int | None = None) -> list[Path]:
    """The image files that `inputs` name, each once, in order; the first `num_images` of them.

    A file is taken as it is; of a folder (not of those in it) and of a glob, sorted, what has the suffix of an image and is not hidden.

    Raises:
        VesselError: an input that is not there, or in which there is no image.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        for path in _images_of(text):
            found.setdefault(path.resolve(), path)
    return list(found.values())[:num_images]


def _images_of(text: str) -> list[Path]:
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates, place = list(path.iterdir()), f"{text}: this folder"
    elif glob.has_magic(text):
        candidates, place = [Path(name) for name in glob.glob(text, recursive=True)], f"{text}: this pattern"
    else:
        raise VesselError(f"{text}: no such file or folder")
    images = [p for p in sorted(candidates) if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    if not images:
        raise VesselError(f"{place} holds no image ({', '.join(SUFFIXES)})")
    return images


def infer(bundle: Bundle, options: InferOptions) -> Summary:
    """Segment every image and write the results; an image that fails becomes a line in results.jsonl, and the others go on.

    Raises:
        VesselError: nothing could be begun (inputs, output folder, question, device, bundle), or a result could not be written.
    """
    began, started, summary = time.perf_counter(), datetime.datetime.now(datetime.UTC), Summary()
    images = find_images(options.inputs, options.num_images)
    outputs = OutputFolder(options.output, images, options.overwrite)
    deployment = _deploy(bundle, options.device)
    with Segmenter(deployment, options.threads) as segmenter:
        segmenter.check_question(options.question)
        _announce(options.device, deployment)
        summary.load_seconds = time.perf_counter() - began
        with outputs:
            for path in tqdm(images, unit="image", disable=None, dynamic_ncols=True):  # None: a bar on terminals only
                _infer_one(path, options.question, segmenter, outputs, summary)
        summary.seconds = time.perf_counter() - began - summary.load_seconds
        outputs.write_run(_report(bundle, options, deployment.device, started, summary))
    return summary


def _announce(wanted: Device, deployment: Deployment) -> None:
    """Say where the run takes place: `auto` may have chosen what the user did not mean."""
    device, bundle, note = deployment.device, deployment.bundle, ""
    if (device.kind, bundle.precision) == ("cpu", "fp16"):
        note = ": slow, and twice its size in memory; take a GPU, or export with --precision fp32"
    elif wanted.kind == "auto" and device.kind != "rtx" and (bundle.folder / ENGINES).is_dir():
        note = f": the bundle's engines are not used (vessel-rt devices --bundle {bundle.folder} says why)"
    print(f"device {device}{note}", file=sys.stderr)


def _deploy(bundle: Bundle, device: Device) -> Deployment:
    """`deploy`, with a bar if the files take more than two seconds."""
    with tqdm(desc="checking the bundle", unit="B", unit_scale=True, disable=None, delay=2, leave=False) as bar:

        def advance(read: int, total: int) -> None:
            bar.total = total
            bar.update(read)

        return deploy(bundle, device, advance)


def _infer_one(path: Path, question: str, segmenter: Segmenter, outputs: OutputFolder, summary: Summary) -> None:
    summary.images += 1
    try:
        began = time.perf_counter()
        image = read_image(path)
        read_ms = (time.perf_counter() - began) * 1e3
        result = _named(path, segmenter, image, question)
    except ImageError as e:
        summary.failed += 1
        tqdm.write(f"vessel-rt: error: {e}", file=sys.stderr)
        outputs.write_error(path, str(e))
        return
    summary.masks += len(result.masks)
    summary.without_mask += not result.masks
    outputs.write_result(path, image, dataclasses.replace(result, ms={"read": read_ms, **result.ms}))


def _named(path: Path, segmenter: Segmenter, image: Image.Image, question: str) -> Result:
    """`Segmenter.segment`, which does not know the image's name, with the name put before its errors."""
    try:
        return segmenter.segment(image, question)
    except ImageError as e:
        raise ImageError(f"{path}: {e}") from e


def _report(bundle: Bundle, options: InferOptions, device: Device, started: datetime.datetime, summary: Summary) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "versions": {
            "vessel-rt": vessel_rt.__version__,
            "python": platform.python_version(),
            "onnxruntime": onnxruntime().__version__,
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
        "bundle": {
            "name": bundle.folder.resolve().name,
            "sha256": sha256_of(bundle.folder / BUNDLE_FILE),
            "precision": bundle.precision,
            "checkpoint": bundle.provenance.checkpoint,
        },
        "device": str(device),
        "options": dataclasses.asdict(options) | {"output": str(options.output), "device": str(options.device)},
        "counts": {
            "images": summary.images,
            "ok": summary.images - summary.failed,
            "failed": summary.failed,
            "masks": summary.masks,
            "without_mask": summary.without_mask,
        },
        "started": started.isoformat(timespec="seconds"),
        "seconds": {"load": round(summary.load_seconds, 3), "images": round(summary.seconds, 3)},
        "images_per_second": round(summary.images_per_second, 4),
        "peak_memory_bytes": _peak_memory(),
    }


def _peak_memory() -> int | None:
    """The largest resident set of this process so far, in bytes, from Linux's /proc; None elsewhere.

    Not getrusage: its figure includes the parent's memory at the time of the fork.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    peak = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024

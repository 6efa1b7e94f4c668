"""Accuracy of every precision and device, with and without drafts: mean Dice against the ground truth, and IoU with the first run's masks.

    python -m benchmarks.accuracy [--bundles DIR ...] [--devices cpu cuda ...]

Faster runs must not change the masks: all rows have to agree. They are compared with the simplest run: the first bundle on the first device
(the CPU if all devices are used), decoding token by token. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.measure import infer_options, publish
from vessel_rt.device.device_report import list_devices
from vessel_rt.device.providers import Device
from vessel_rt.errors import BundleError, VesselError
from vessel_rt.evaluation.evaluate import evaluate
from vessel_rt.evaluation.metrics import iou
from vessel_rt.formats.bundle import Bundle
from vessel_rt.results.reader import read_results
from vessel_rt.run.infer import infer

_TINY = Path("examples/tiny")
_MADE_BY = {
    "tiny-fp32": "make demo",
    "tiny-fp16": f"vessel-export export --ckpt {_TINY}/iter_1000.pth --base {_TINY}/base --sam2 {_TINY}/sam2_tiny.pt "
    "--recipe engines/cpu.toml --precision fp16 --out engines/tiny-fp16 --overwrite",
}

_Masks = dict[tuple[str, str], list[npt.NDArray[np.bool_]]]  # by image and question, each [height, width]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=(__doc__ or "").partition("\n")[0])
    bundles = [Path("engines") / name for name in _MADE_BY]
    parser.add_argument("--bundles", type=Path, nargs="+", default=bundles, metavar="DIR", help="the others are compared with the first")
    parser.add_argument("--devices", type=Device.parse, nargs="+", metavar="DEVICE", help="default: all that a bundle can run on")
    parser.add_argument("--frames", type=Path, default=_TINY / "frames", metavar="DIR")
    parser.add_argument("--gt", type=Path, default=_TINY / "annotations.json", metavar="JSON", help="in Sa2VA's fine-tuning format")
    arguments = parser.parse_args()
    try:
        loaded = [_load(path) for path in arguments.bundles]
        rows = list(_rows(loaded, arguments.devices, arguments.frames, arguments.gt))
    except VesselError as e:
        print(e, file=sys.stderr)
        return 1
    publish("accuracy", {"images": rows[0]["images"], "min_mask_iou": min(row["min_mask_iou"] for row in rows), "runs": rows})
    return 0


def _load(folder: Path) -> Bundle:
    try:
        return Bundle.load(folder)
    except BundleError:
        command = _MADE_BY.get(folder.name, f"make export CKPT=... OUT={folder}")
        raise VesselError(f"{folder}: no bundle that this version can read; make one with: {command}") from None


def _rows(bundles: Sequence[Bundle], devices: Sequence[Device] | None, frames: Path, annotations: Path) -> Iterator[dict[str, Any]]:
    """One run for each bundle, device and way of decoding. infer shows the progress of a run."""
    first: _Masks | None = None
    for bundle in bundles:
        for device in devices or _usable(bundle):
            for draft in (False, True):
                name = bundle.folder.resolve().name
                print(f"{name}, {device}, {'with drafts' if draft else 'token by token'}", file=sys.stderr)
                with tempfile.TemporaryDirectory() as folder:
                    options = infer_options(frames, Path(folder), bundle.prompt.default_question, device, draft=draft)
                    summary = infer(bundle, options)
                    [score] = evaluate(options.output, annotations).scores
                    masks = _masks(options.output)
                first = masks if first is None else first
                yield {
                    "bundle": name,
                    "precision": bundle.precision,
                    "device": str(device),
                    "draft": draft,
                    "images": summary.images,
                    "failed": summary.failed,
                    "masks": summary.masks,
                    "concept": score.concept,
                    "mean_dice": round(score.mean["dice"], 6),
                    "min_mask_iou": round(_min_iou(first, masks), 6),
                }


def _usable(bundle: Bundle) -> list[Device]:
    """The devices that can run `bundle`, the CPU first."""
    return [report.device for report in reversed(list_devices(bundle)) if report.fault is None]


def _masks(output: Path) -> _Masks:
    """The masks in a run's files."""
    lines = read_results(output)
    return {(r["image"], r["question"]): [np.asarray(Image.open(output / mask["file"])) > 0 for mask in r["masks"]] for r in lines}


def _min_iou(first: _Masks, other: _Masks) -> float:
    """The minimum IoU of two masks at the same place; 0 if only one of the runs has a mask."""
    pairs = [(masks, other.get(key, [])) for key, masks in first.items()]
    if any(len(a) != len(b) for a, b in pairs):
        return 0.0
    return min((iou(a, b) for masks, others in pairs for a, b in zip(masks, others, strict=True)), default=1.0)


if __name__ == "__main__":
    raise SystemExit(main())

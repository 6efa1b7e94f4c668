"""Runs `vessel-rt infer` with a full-size model on the CPU: seconds of loading and of each stage, and the peak memory.

    python -m benchmarks.infer --model DIR [--recipe cpu-int8] [--bundle DIR]

benchmarks.synth writes DIR. The bundle is exported first. Each frame size is a run of its own. Loading ends with the model's answer to a
gray image, which becomes the draft; another run has no draft. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import publish, run, square_frames
from vessel_rt.device.host_memory import make_host_plan
from vessel_rt.formats.bundle import Bundle

_BIN = Path(sys.executable).parent
_SIDES = (512, 1024)
_FRAMES = 2  # of each size: the first one also grows ONNX Runtime's arenas


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.infer", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model written by `python -m benchmarks.synth`")
    parser.add_argument("--recipe", default="cpu-int8")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="the bundle to make (default: next to the model, by the recipe's name)")
    parser.add_argument("--frames", type=Path, default=Path("examples/tiny/frames"), metavar="DIR", help="the frames that are resized")
    arguments = parser.parse_args()
    folder = arguments.bundle or arguments.model.with_name(arguments.recipe)
    [checkpoint], [sam2] = arguments.model.glob("iter_*.pth"), arguments.model.glob("sam2_*.pt")
    inputs = ["--ckpt", checkpoint, "--base", arguments.model / "base", "--sam2", sam2]
    export = run([_BIN / "vessel-export", "export", *inputs, "--recipe", arguments.recipe, "--out", folder, "--overwrite", "--no-golden"])
    if export.exit_code:
        print(export.errors, file=sys.stderr)
        return 1
    bundle, sides = Bundle.load(folder), {}
    for name, side, options in [*((str(side), side, []) for side in _SIDES), ("512 without draft", _SIDES[0], ["--no-draft"])]:
        found = measure_frames(folder, arguments.frames, side, options)
        if found is None:
            return 1
        sides[name] = found
        print(f"{name}: {found['seconds_per_frame']} s a frame, {found['peak_anonymous_gib']} GiB", flush=True)
    publish(
        f"infer-{arguments.recipe}-{bundle.language_model.layers}-layers",
        {
            "recipe": arguments.recipe,
            "planned_gib": round(make_host_plan(bundle).total / 2**30, 2),
            "weights_bytes": sum(record.bytes for record in bundle.files.values()),
            "export": {"seconds": round(export.seconds, 1), "peak_anonymous_gib": round(export.peak_anonymous_bytes / 2**30, 2)},
            "sides": sides,
        },
    )
    return 0


def measure_frames(bundle: Path, frames: Path, side: int, options: list[str]) -> dict[str, Any] | None:
    """Segment frames of `side` x `side` pixels with `vessel-rt infer`; None if it fails. Seconds of a step are the median of the frames."""
    with tempfile.TemporaryDirectory() as work:
        square_frames(frames, Path(work) / "frames", side, _FRAMES)
        output = Path(work) / "out"
        usage = run([_BIN / "vessel-rt", "infer", f"{work}/frames", "--bundle", bundle, "--device", "cpu", "-o", output, "-q", *options])
        if usage.exit_code:
            print(usage.errors, file=sys.stderr)
            return None
        ran = json.loads((output / "run.json").read_text(encoding="utf-8"))
        timings = [json.loads(line) for line in (output / "timings.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seconds_of_loading": ran["seconds"]["load"],
        "seconds_per_frame": round(ran["seconds"]["images"] / _FRAMES, 2),
        "peak_anonymous_gib": round(usage.peak_anonymous_bytes / 2**30, 2),
        "generated_tokens": statistics.median(line["accepted"] + line["decode_steps"] for line in timings),
        "streams": ran["batch"]["streams"],
        "seconds_by_step": {step: round(statistics.median(line["ms"][step] for line in timings) / 1e3, 2) for step in timings[0]["ms"]},
    }


if __name__ == "__main__":
    sys.exit(main())

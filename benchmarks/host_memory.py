"""Peak memory of `vessel-rt infer` on a CPU compared with `vessel-rt plan --device cpu`, for every precision.

    python -m benchmarks.host_memory --model DIR [--forms fp32 fp16 int8 int4] [--propagate best-frame|sa2va]

benchmarks.synth writes DIR, or it is examples/tiny. FP32 and FP16 need four bytes for each parameter: 24 GiB are enough for 6 layers
(`--layers` of benchmarks.synth). A bundle of each form is exported to a temporary folder next to DIR, which takes its size on the disk, and
segments one frame of 1024x1024 pixels (10 tiles), or with `--propagate` tracks through a cine of 27: the same frame each time, of which
best-frame then asks about as many as it can. Memory is anonymous: what the system cannot take back. The last line is JSON.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import publish, run, square_frames
from vessel_rt.device.host_memory import make_host_plan
from vessel_rt.formats.bundle import Bundle

_BIN = Path(sys.executable).parent
_FORMS = ("fp32", "fp16", "int8", "int4")
_SIDE = 1024
_CINE = 27  # frames


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model written by `python -m benchmarks.synth`")
    parser.add_argument("--forms", nargs="+", choices=_FORMS, default=_FORMS)
    parser.add_argument("--propagate", choices=("best-frame", "sa2va"), help="track through a cine, too")
    parser.add_argument("--frames", type=Path, default=Path("examples/tiny/frames"), metavar="DIR", help="the frames that are resized")
    arguments = parser.parse_args()
    rows = {}
    for form in arguments.forms:
        with tempfile.TemporaryDirectory(dir=arguments.model.parent) as work:
            found = _measured(arguments, form, Path(work))
        if found is None:
            return 1
        rows[form], layers = found
        print(f"{form}: {rows[form]}", flush=True)
    name = f"host-memory-{layers}-layers" + (f"-{arguments.propagate}" if arguments.propagate else "")
    publish(name, {"layers": layers, "side": _SIDE, "propagate": arguments.propagate, "forms": rows})
    return 0


def _measured(arguments: argparse.Namespace, form: str, work: Path) -> tuple[dict[str, Any], int] | None:
    """What a bundle of this form was planned to take and takes, in GiB, and its layers; None if something fails."""
    [checkpoint], [sam2] = arguments.model.glob("iter_*.pth"), arguments.model.glob("sam2_*.pt")
    inputs: list[str | Path] = ["--ckpt", checkpoint, "--base", arguments.model / "base", "--sam2", sam2]
    usage = run([_BIN / "vessel-export", "export", *inputs, *_recipe(form, work), "--out", work / "bundle", "--no-golden"])
    if not usage.exit_code:
        square_frames(arguments.frames, work / "frames", _SIDE, 1)
        [frame] = (work / "frames").iterdir()
        for number in range(2, _CINE + 1) if arguments.propagate else ():
            shutil.copyfile(frame, frame.with_name(f"study-{number:04}.png"))
        infer: list[str | Path] = [_BIN / "vessel-rt", "infer", work / "frames", "--bundle", work / "bundle", "--device", "cpu"]
        how = ["--propagate", arguments.propagate, "--series"] if arguments.propagate else ["--streams", "1"]
        usage = run([*infer, "-o", work / "out", "-q", *how])
    if usage.exit_code:
        print(usage.errors, file=sys.stderr)
        return None
    bundle = Bundle.load(work / "bundle")
    planned, measured = make_host_plan(bundle, propagate=arguments.propagate).total, usage.peak_anonymous_bytes
    row = {
        "weights_gib": round(sum(map(bundle.weight_bytes, bundle.stages)) / 2**30, 2),
        "planned_gib": round(planned / 2**30, 2),
        "measured_gib": round(measured / 2**30, 2),
        "planned_over_measured": round(planned / measured, 3),
    }
    return row, bundle.language_model.layers


def _recipe(form: str, work: Path) -> list[str | Path]:
    if form.startswith("fp"):
        return ["--recipe", "cpu", "--precision", form]
    recipe = work / "recipe.toml"
    recipe.write_text(Path("engines/cpu-int8.toml").read_text(encoding="utf-8").replace('"int8"', f'"{form}"'), encoding="utf-8")
    return ["--recipe", recipe]


if __name__ == "__main__":
    sys.exit(main())

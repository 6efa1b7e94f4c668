"""The error of every stage of a full-size bundle against the FP32 reference, each on the reference's own inputs.

    python -m benchmarks.stage_errors --model DIR --bundle DIR [--emulate] [--reference FILE]

benchmarks.synth writes the model; the bundle was exported from it. The frames are the first golden frames: 1 and 7 tiles. `--reference`
keeps what the reference computes, so that it is computed once for several bundles. Adds a row to results/stage_errors.json, which is also
the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS, publish
from vessel_export.parity.checks import ALONE, Measurement, worst_of
from vessel_export.parity.emulate import emulate
from vessel_export.parity.record_golden import GoldenRecorder
from vessel_export.parity.reference import Reference, ReferenceResult
from vessel_export.parity.verify import VerifyRequest, compare_stage, load_reference
from vessel_rt.device.deployment import Deployment, deploy
from vessel_rt.device.providers import Device
from vessel_rt.errors import VesselError
from vessel_rt.formats.bundle import Bundle

_NAME = "stage_errors"
_FRAMES = 2  # a third one has 13 tiles, as many tokens as all others together


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stage_errors", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model written by `python -m benchmarks.synth`")
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="a bundle of it")
    parser.add_argument("--emulate", action="store_true", help="round as a GPU does, as `vessel-export verify --emulate`")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="where the reference's outputs are kept")
    arguments = parser.parse_args()
    try:
        bundle = Bundle.load(arguments.bundle)
        [checkpoint], [sam2] = arguments.model.glob("iter_*.pth"), arguments.model.glob("sam2_*.pt")
        reference = load_reference(VerifyRequest(arguments.bundle, checkpoint, str(arguments.model / "base"), str(sam2)), bundle)
        results = _results(bundle, reference, arguments.reference)
        deployment = emulate(bundle) if arguments.emulate else deploy(bundle, Device("cpu"))
        row = _measured(deployment, reference, results, arguments.emulate)
    except VesselError as e:
        print(e, file=sys.stderr)
        return 1
    path = RESULTS / f"{_NAME}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    others = [other for other in rows if other["name"] != row["name"]]
    publish(_NAME, {"layers": bundle.language_model.layers, "tiles": [len(r.pixel_values) for r in results], "rows": [*others, row]})
    return 0


def _results(bundle: Bundle, reference: Reference, kept: Path | None) -> list[ReferenceResult]:
    """What the reference computes for the bundle's own question about each frame."""
    if kept is not None and kept.exists():
        found: list[ReferenceResult] = torch.load(kept, weights_only=False)  # written below
        return found
    recorder, limit = GoldenRecorder(bundle, reference), bundle.language_model.max_new_tokens
    question = bundle.prompt.default_question
    results: list[ReferenceResult] = []
    for frame in range(_FRAMES):
        draft = results[-1].answer_ids.tolist() if results else ()
        results.append(reference.segment(recorder.image(frame), question, max_new_tokens=limit, draft=draft))
    if kept is not None:
        torch.save(results, kept)
    return results


def _measured(deployment: Deployment, reference: Reference, results: Sequence[ReferenceResult], emulated: bool) -> dict[str, Any]:
    bundle = deployment.bundle
    measurements: list[Measurement] = []
    for stage in bundle.stages:
        with deployment.session(stage) as session:
            for number, result in enumerate(results, start=1):
                measurements += compare_stage(bundle, session, reference, stage, str(number), result)
    checks = [check for check in worst_of(measurements) if check.quantity != ALONE]
    kind = f"{bundle.weights.upper()}, {bundle.precision.upper()} activations" if bundle.quantization else bundle.precision.upper()
    return {
        "name": kind + (", emulated" if emulated else ""),
        "recipe": bundle.provenance.recipe,
        "errors": {
            stage: {check.quantity: float(f"{check.measured:.3g}") for check in checks if check.stage == stage} for stage in bundle.stages
        },
    }


if __name__ == "__main__":
    sys.exit(main())

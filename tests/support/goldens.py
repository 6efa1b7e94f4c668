"""Goldens that the runtime itself makes of a bundle, where the exporter's reference is not at hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vessel_rt.check.cine import run_cine
from vessel_rt.check.loading import LoadedDeployment
from vessel_rt.check.parity import Outputs
from vessel_rt.device.deployment import deploy
from vessel_rt.device.providers import Device
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.golden import (
    SKETCHED,
    Golden,
    GoldenCase,
    GoldenCaseRecord,
    GoldenCine,
    GoldenCineRecord,
    GoldenFile,
    GoldenFrame,
    GoldenReference,
    GoldenShift,
    SketchSpec,
    make_sketch,
    shifted,
)
from vessel_rt.model.segmenter import Segmenter

SPEC = SketchSpec()


def make_goldens(bundle: Bundle, frames: Sequence[Image.Image], questions: Sequence[str]) -> Golden:
    """What `bundle` makes of gray `frames` on the CPU: every question about every frame."""
    deployment = deploy(bundle, Device("cpu"))
    sessions = deployment.sessions(1)
    outputs = Outputs()
    cases, records = [], []
    with Segmenter(LoadedDeployment.of(deployment, sessions).tapped(outputs), draft=False) as segmenter:
        pixels = [segmenter.prepare(frame.convert("RGB")) for frame in frames]
        for index, each in enumerate(pixels):
            for question in questions:
                outputs.clear()
                [[answer]] = segmenter.run([each], [question])
                arrays = outputs.of(answer)
                ids, text = answer.generation.token_ids, segmenter.finish(each, answer).answer
                sketches = {name: make_sketch(arrays[name], SPEC) for names in SKETCHED.values() for name in names}
                logits = answer.low_res_logits.astype(np.float16).astype(np.float32)
                cases.append(GoldenCase(index, question, text, ids, logits, answer.iou, answer.object_score, sketches))
                records.append(GoldenCaseRecord(index, question, text, ids, len(logits)))
    grays = tuple(np.asarray(frame.convert("L")) for frame in frames)
    cine = None
    if bundle.cine:
        shifts = tuple(GoldenShift(2 * time, time) for time in range(bundle.cine.prompted_frames + 2))
        loaded = LoadedDeployment.of(deployment, sessions)
        found = run_cine(loaded, [shifted(grays[0], shift) for shift in shifts], questions[0])
        logits, ids = found.low_res_logits.astype(np.float16).astype(np.float32), found.result.token_ids
        record = GoldenCineRecord(0, shifts, questions[0], found.result.answer, ids, len(logits))
        cine = GoldenCine(record, logits, {name: make_sketch(array, SPEC) for name, array in found.sketched.items()})
    for session in sessions.values():
        session.__exit__(None, None, None)
    reference = GoldenReference("fp32", False, bundle.provenance.checkpoint_sha256, {"vessel-rt": "of the tests"})
    file = GoldenFile(
        reference=reference,
        sketches=SPEC,
        frames=tuple(GoldenFrame(frame.width, frame.height, len(each.tiles)) for frame, each in zip(frames, pixels, strict=True)),
        cases=tuple(records),
        cine=cine.record if cine else None,
    )
    return Golden(file, grays, tuple(cases), cine)

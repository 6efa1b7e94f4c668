"""Parity of a cine: a bundle that tracks objects against the reference that tracks them. Does not know how either does it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_export.parity.checks import CINE_IOU, Measurement, Report, worst_of
from vessel_export.parity.emulate import EmulatedDeployment
from vessel_export.parity.golden_frames import draw_angiogram
from vessel_export.parity.reference import Reference
from vessel_export.parity.verify import VerifyRequest, deployment_of, load_reference
from vessel_rt.device.deployment import Deployment
from vessel_rt.evaluation.metrics import iou
from vessel_rt.formats.bundle import Bundle
from vessel_rt.model.cine import CineSegmenter

__all__ = ["compare_cine", "drawn_cine", "verify_cine"]

_SEED, _SIDE, _BEAT = 1, 512, 9.0  # of the drawing; pixels; frames of a heartbeat


def verify_cine(request: VerifyRequest, frames: int) -> Report:
    """Compare the bundle of `request` with the reference on a drawn cine of `frames` frames, for each question.

    Raises:
        VesselError: as `verify.verify_bundle`; or an older version exported the bundle.
    """
    bundle = Bundle.load(request.bundle)
    deployment, reference = deployment_of(request, bundle), load_reference(request, bundle)
    questions = request.questions or (bundle.prompt.default_question,)
    return compare_cine(deployment, reference, drawn_cine(frames), questions, threads=request.threads)


def compare_cine(
    deployment: Deployment, reference: Reference, frames: Sequence[Image.Image], questions: Sequence[str], *, threads: int = 0
) -> Report:
    """Answers must be equal, and the masks of each frame must overlap as CINE_IOU says, since errors add up from frame to frame."""
    from vessel_export.parity.reference_cine import segment_cine

    bundle = deployment.bundle
    measurements: list[Measurement] = []
    masks = 0
    with CineSegmenter(deployment, threads) as segmenter:
        for question in questions:
            expected = segment_cine(reference, frames, question, max_new_tokens=bundle.language_model.max_new_tokens)
            answer = tuple(token for token in expected.answer_ids.tolist() if token not in bundle.prompt.stop_token_ids)
            for place, result in enumerate(segmenter.segment_cine(frames, question)):
                name = f"frame {place}: {question}"
                same = result.token_ids == answer
                measurements.append(Measurement("cine", "answers identical", float(same), 1.0, name, at_least=True, average=True))
                ours, theirs = [mask.pixels for mask in result.masks], expected.masks[:, place].cpu().numpy()
                masks += len(theirs)
                measurements += _overlaps(ours, theirs, place == len(frames) - 1, CINE_IOU[bundle.weights], name)
    emulated, weights = isinstance(deployment, EmulatedDeployment), bundle.weights if bundle.quantization else None
    return Report(bundle.precision, len(frames) * len(questions), masks, tuple(worst_of(measurements)), emulated, weights)


def _overlaps(
    ours: Sequence[npt.NDArray[np.bool_]], theirs: npt.NDArray[np.bool_], last: bool, limit: float, name: str
) -> Iterator[Measurement]:
    if len(ours) != len(theirs):
        yield Measurement("cine", "mask IoU", 0.0, limit, name, at_least=True)
        return
    for one, other in zip(ours, theirs, strict=True):
        overlap = iou(one, other)
        yield Measurement("cine", "mask IoU", overlap, limit, name, at_least=True)
        if last:
            yield Measurement("cine", "mask IoU, last frame", overlap, limit, name, at_least=True)


def drawn_cine(frames: int) -> list[Image.Image]:
    """A drawn angiogram, RGB, that moves with the heart: a few pixels and degrees back and forth."""
    still = Image.fromarray(draw_angiogram(_SIDE, _SIDE, _SEED)).convert("RGB")
    beats = [2 * math.pi * place / _BEAT for place in range(frames)]
    return [
        still.rotate(
            1.5 * math.sin(beat / 2),
            Image.Resampling.BICUBIC,
            translate=(round(6 * math.sin(beat)), round(4 * math.cos(beat))),
            fillcolor=(120, 120, 120),
        )
        for beat in beats
    ]

"""A short cine against the goldens: the stages of cines, the answer, and the masks of every frame."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.check.loading import LoadedDeployment
from vessel_rt.check.parity import as_array, decided_iou, judge_stages, stage_error
from vessel_rt.check.record import Record
from vessel_rt.check.tolerances import tolerances_of
from vessel_rt.errors import LoadMemoryError, OutOfMemory
from vessel_rt.formats.golden import CINE_SKETCHED, Golden, shifted
from vessel_rt.model.cine import CineSegmenter
from vessel_rt.model.result import Result

__all__ = ["CineOutputs", "check_cine", "run_cine"]

_DECODERS = ("sam2_mask_decoder", "sam2_tracking_decoder")


def check_cine(record: Record, deployment: LoadedDeployment, golden: Golden | None) -> None:
    """A line for each stage of cines, one for the answer and one for the masks. The stages are loaded for this check alone."""
    cine = golden.cine if golden else None
    if deployment.bundle.cine is None:
        record.skipped("cines", "run", "the bundle has no graphs for cines: an older version exported it")
        return
    if golden is None or cine is None:
        record.skipped("cines", "run", "there is no golden cine: record the goldens with `vessel-export verify --record`")
        return
    told = cine.record
    try:
        found = run_cine(deployment, [shifted(golden.frames[told.frame], shift) for shift in told.shifts], told.question)
    except (LoadMemoryError, OutOfMemory) as e:
        record.skipped("cines", "run", f"no memory is left for it beside all that was loaded before: {e}")
        return
    errors = [
        stage_error(deployment, stage, name, golden.sketch(found.sketched[name]).error(cine.sketches[name]), None)
        for stage, name in CINE_SKETCHED.items()
        if name in found.sketched
    ]
    judge_stages(record, "cines", errors, CINE_SKETCHED, "no object was found, so it did not run")
    same = found.result.token_ids == told.token_ids
    record.judged("cines", "answer", "identical" if same else "", None if same else "other token ids than the reference's")
    _judge_masks(record, deployment, found.low_res_logits, cine.low_res_logits)


@dataclasses.dataclass(frozen=True, eq=False)
class CineOutputs:
    """A bundle's results of a cine: that of the first frame, `low_res_logits` [objects, frames, side, side], and the outputs in
    CINE_SKETCHED: none, if there is no object."""

    result: Result
    low_res_logits: npt.NDArray[np.float32]
    sketched: Mapping[str, npt.NDArray[Any]]


def run_cine(deployment: LoadedDeployment, frames: Sequence[npt.NDArray[np.uint8]], question: str) -> CineOutputs:
    """Ask about a cine of gray frames [height, width], of which at least one is tracked. Raises as `CineSegmenter.segment_cine`."""
    runs: dict[str, list[Mapping[str, Any]]] = defaultdict(list)

    def keep(stage: str, outputs: Mapping[str, Any]) -> None:
        if stage in _DECODERS or (stage in CINE_SKETCHED and not runs[stage]):
            runs[stage].append(outputs)

    with CineSegmenter(deployment.tapped(keep), draft=False) as segmenter:
        images = (Image.fromarray(frame).convert("RGB") for frame in frames)
        first, *_ = list(segmenter.segment_cine(images, question))
    if not first.masks:
        side = deployment.bundle.mask.low_res_size
        return CineOutputs(first, np.empty((0, len(frames), side, side), np.float32), {})
    # A decoder runs for each object of each frame, in this order.
    logits: npt.NDArray[np.float32] = np.concatenate([run["low_res_logits"] for stage in _DECODERS for run in runs[stage]])
    sketched = {name: as_array(runs[stage][0][name]) for stage, name in CINE_SKETCHED.items()}
    return CineOutputs(first, logits.reshape(len(frames), -1, *logits.shape[1:]).swapaxes(0, 1), sketched)


def _judge_masks(record: Record, deployment: LoadedDeployment, ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> None:
    """The line of the masks: the least IoU of a frame, by the limit of single frames, and that of the last one."""
    if len(ours) != len(theirs):
        record.failed("cines", "masks", f"{len(ours)} objects, and the reference found {len(theirs)}")
        return
    limits = tolerances_of(deployment.bundle)
    overlaps = [[decided_iou(*pair, limits.undecided) for pair in zip(*both, strict=True)] for both in zip(ours, theirs, strict=True)]
    least, frame = min((overlap, frame) for frames in overlaps for frame, overlap in enumerate(frames))
    last = min(frames[-1] for frames in overlaps)
    figure = f"{len(overlaps[0])} frames: least IoU {least:.4f} (at least {limits.iou:g}), of the last frame {last:.4f}"
    record.judged("cines", "masks", figure, f"another mask than the reference's on frame {frame}" if least < limits.iou else None)

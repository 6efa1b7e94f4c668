"""The bundle's answers, masks and stage outputs against the goldens: which stage is the first that is off."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from vessel_rt.check.loading import LoadedDeployment
from vessel_rt.check.record import Record
from vessel_rt.check.schema import GradeName, StageError
from vessel_rt.check.tolerances import SOURCES, Tolerances, error_limit, tolerances_of
from vessel_rt.formats.golden import SKETCHED, Golden, GoldenCase
from vessel_rt.model.result import Answer
from vessel_rt.model.segmenter import Segmenter

__all__ = ["Outputs", "as_array", "check_parity", "decided_iou", "golden_images", "judge_stages", "stage_error"]

_OR_A_KERNEL = ", or a kernel of this device computes it wrongly: compare with --device cpu"
_LEAST_BATCH = 2  # images, where the device's own batch is one


def golden_images(golden: Golden) -> list[Image.Image]:
    """The frames of the goldens as RGB images."""
    return [Image.fromarray(frame).convert("RGB") for frame in golden.frames]


def check_parity(record: Record, deployment: LoadedDeployment, golden: Golden) -> None:
    """A line for each stage, one for the answers and one for the masks."""
    answers, errors, outputs = _Answers(golden, tolerances_of(deployment.bundle)), _Errors(golden), Outputs()
    batches = list(_batches(golden, deployment))
    with tqdm(total=2 * (len(golden.cases) + len(batches)), desc="parity", unit="run", disable=None, delay=2, leave=False) as bar:
        for draft in (False, True):
            drafts = "with drafts" if draft else "without drafts"
            # With a draft, a stage's outputs have states of tokens that may be rejected.
            with Segmenter(deployment if draft else deployment.tapped(outputs), draft=draft) as segmenter:
                pixels = [segmenter.prepare(image) for image in golden_images(golden)]
                for case in golden.cases:
                    outputs.clear()
                    [[answer]] = segmenter.run([pixels[case.frame]], [case.question])
                    if not draft:
                        errors.add(case, outputs.of(answer))
                    answers.add(f"one image at a time, {drafts}", case, answer)
                    bar.update()
                for batch in batches:
                    outputs.clear()
                    found = segmenter.run([pixels[case.frame] for case in batch], [batch[0].question])
                    for case, [answer] in zip(batch, found, strict=True):
                        answers.add(f"{len(batch)} images at once, {drafts}", case, answer)
                    bar.update()
    judge_stages(record, "parity", errors.worst(deployment), SKETCHED, "no golden case has a mask, so it did not run")
    record.judged("parity", "answers", answers.told_ids, answers.id_fault)
    record.judged("parity", "masks", answers.told_masks, answers.mask_fault)


def _batches(golden: Golden, deployment: LoadedDeployment) -> Iterator[list[GoldenCase]]:
    """The cases, by question, in batches of the device's size, at least two; a case alone is its own neighbour."""
    size = max(deployment.batch, _LEAST_BATCH)
    if deployment.max_batch is not None:
        size = min(size, deployment.max_batch)
    if size < 2:  # engines for one image
        return
    asked: dict[str, list[GoldenCase]] = defaultdict(list)
    for case in golden.cases:
        asked[case.question].append(case)
    for cases in asked.values():
        cases = cases * 2 if len(cases) == 1 else cases
        for start in range(0, len(cases), size):
            yield cases[start : start + size]


class Outputs:
    """The outputs of one image's run, as the stages give them."""

    def __init__(self) -> None:
        self._runs: dict[str, list[Mapping[str, Any]]] = defaultdict(list)

    def __call__(self, stage: str, outputs: Mapping[str, Any]) -> None:
        self._runs[stage].append(outputs)

    def clear(self) -> None:
        self._runs.clear()

    def of(self, answer: Answer) -> dict[str, npt.NDArray[Any]]:
        """Every output that the goldens have a sketch of, for the one question that was asked."""
        # Runs of the first chunks of a long prompt come before that of the last, whose first position is the prompt's last token.
        last_of_prompt = self._runs["language_model"][-1 - answer.generation.decode_steps]
        found = {
            "image_embeds": np.concatenate([run["image_embeds"] for run in self._runs["vision_encoder"]]),
            "prompt_state": last_of_prompt["hidden_states"][0, 0],
            "seg_states": answer.generation.seg_states,
            "low_res_logits": answer.low_res_logits,
        }
        if self._runs["sam2_image_encoder"]:  # without a mask it is not run on a CPU
            [features] = self._runs["sam2_image_encoder"]
            found |= {name: as_array(features[name]) for name in SKETCHED["sam2_image_encoder"]}
        return found


def as_array(value: Any) -> npt.NDArray[Any]:
    """An output that may still be on the device."""
    array: npt.NDArray[Any] = value if isinstance(value, np.ndarray) else value.numpy()
    return array


class _Errors:
    """The errors of the outputs of every case."""

    def __init__(self, golden: Golden) -> None:
        self._golden = golden
        self._found: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def add(self, case: GoldenCase, outputs: Mapping[str, npt.NDArray[Any]]) -> None:
        number = self._golden.cases.index(case)
        for name, array in outputs.items():
            per_mask = name in ("seg_states", "low_res_logits")
            error = self._golden.sketch(array).error(case.sketches[name]) if not per_mask or len(array) == len(case.iou) else math.nan
            self._found[name].append((error, number))

    def worst(self, deployment: LoadedDeployment) -> list[StageError]:
        """The largest error of each output; what is not a number is larger than all."""
        found = []
        for stage, names in SKETCHED.items():
            for name in names:
                if errors := self._found[name]:
                    error, case = max(errors, key=lambda each: math.inf if math.isnan(each[0]) else each[0])
                    found.append(stage_error(deployment, stage, name, error, case))
        return found


def stage_error(deployment: LoadedDeployment, stage: str, output: str, error: float, case: int | None) -> StageError:
    """The error of an output, with its tolerance; `case` None: of the cine."""
    told = float(f"{error:.3g}") if math.isfinite(error) else None
    return StageError(str(deployment.device), stage, output, told, error_limit(deployment.bundle, stage), case)


def judge_stages(record: Record, grade: GradeName, errors: Sequence[StageError], stages: Iterable[str], idle: str) -> None:
    """Put `errors` on record, and make a line for each of `stages`; `idle` says why one did not run. Of stages that are off, now or in
    earlier lines, only one whose inputs are right is at fault itself."""
    record.stages += errors
    off = {each.stage for each in record.stages if each.device == record.device and _is_off(each)}
    for stage in stages:
        of_stage = [each for each in errors if each.stage == stage]
        if not of_stage:
            record.skipped(grade, stage, idle)
            continue
        figure = ", ".join(f"{each.output} {_told(each.error)}" for each in of_stage) + f" (at most {of_stage[0].limit:g})"
        worse = [each for each in of_stage if _is_off(each)]
        inherited = [source for source in SOURCES.get(stage, ()) if source in off]
        if not worse:
            record.passed(grade, stage, figure)
            continue
        case = worse[0].case
        which = f"{', '.join(each.output for each in worse)} of {'the cine' if case is None else f'case {case}'}"
        if inherited:
            fault = f"{which}: its inputs are off already ({', '.join(inherited)})"
        else:
            fault = (
                f"{which}: the first stage that is off, since its inputs are right. Its graph or weights are not those that the goldens "
                f"were recorded for{_OR_A_KERNEL if record.device != 'cpu' else ''}"
            )
        record.failed(grade, stage, fault, figure)


def _is_off(error: StageError) -> bool:
    return error.error is None or error.error > error.limit


def _told(error: float | None) -> str:
    return "not a number" if error is None else f"{error:.1e}" if error else "0"


@dataclasses.dataclass
class _Answers:
    """Answers and masks in every way of running, against the goldens."""

    golden: Golden
    limits: Tolerances
    identical: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    overlaps: list[tuple[float, str]] = dataclasses.field(default_factory=list)

    def add(self, way: str, case: GoldenCase, answer: Answer) -> None:
        """Compare one answer; `way` is how it was computed."""
        place = f"case {self.golden.cases.index(case)}, {way}"
        if answer.generation.token_ids == case.token_ids:
            self.identical += 1
        else:
            self.wrong.append(place)
        if len(answer.low_res_logits) != len(case.low_res_logits):
            self.overlaps.append((0.0, place))
            return
        for ours, theirs in zip(answer.low_res_logits, case.low_res_logits, strict=True):
            self.overlaps.append((decided_iou(ours, theirs, self.limits.undecided), place))

    @property
    def told_ids(self) -> str:
        return f"{self.identical} of {self.identical + len(self.wrong)} identical"

    @property
    def id_fault(self) -> str | None:
        return f"other token ids than the reference's: {self.wrong[0]}" if self.wrong else None

    @property
    def told_masks(self) -> str:
        if not self.overlaps:
            return "no golden case has a mask"
        least, _ = min(self.overlaps)
        return (
            f"{len(self.overlaps)} masks: least IoU {least:.4f} (at least {self.limits.iou:g}), "
            f"mean {self._mean:.4f} (at least {self.limits.mean_iou:g})"
        )

    @property
    def mask_fault(self) -> str | None:
        if not self.overlaps:
            return None
        least, place = min(self.overlaps)
        if least < self.limits.iou:
            return f"another mask than the reference's: {place}"
        return "the masks differ from the reference's by more than rounding" if self._mean < self.limits.mean_iou else None

    @property
    def _mean(self) -> float:
        return sum(overlap for overlap, _ in self.overlaps) / len(self.overlaps)


def decided_iou(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32], undecided: float) -> float:
    """IoU of two low-res masks [side, side], logits above 0, where the reference's logit is decided. 1 if both are empty."""
    decided = np.abs(theirs) >= undecided * np.abs(theirs).max(initial=0.0)
    a, b = (ours > 0) & decided, (theirs > 0) & decided
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0

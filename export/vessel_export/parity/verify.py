"""Parity: a bundle against the PyTorch reference, each graph alone on the reference's own inputs, then the whole pipeline.

Checked alone, a graph does not inherit the errors of earlier graphs; the end-to-end check shows what all errors add up to. See
docs/numerics.md for what is compared with what, and for the reason of each tolerance. Does not know how the reference computes.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from vessel_export.parity.checks import ALONE, QUANTIZED_TOLERANCES, TOLERANCES, Measurement, Report, Tolerances, worst_of
from vessel_export.parity.emulate import EmulatedDeployment, emulate
from vessel_export.parity.inputs import Array, Sample, run_language_model, samples_of
from vessel_export.parity.record_golden import GoldenRecorder, record_golden
from vessel_export.parity.stage_masks import consumed, masks_with
from vessel_export.parity.stored_matrices import rounding_errors
from vessel_export.sources.base_model import open_base, open_sam2
from vessel_rt.device.deployment import Deployment, deploy
from vessel_rt.device.host_memory import available_memory, needed_memory
from vessel_rt.device.providers import Device
from vessel_rt.device.session import Session
from vessel_rt.errors import BundleError
from vessel_rt.evaluation.metrics import dice, iou
from vessel_rt.formats.bundle import Bundle
from vessel_rt.io.checked_files import sha256_of
from vessel_rt.model.preprocess import mask_pixels, tile_pixels
from vessel_rt.model.prompt import PromptTokenizer
from vessel_rt.model.result import Result
from vessel_rt.model.segmenter import Segmenter

if TYPE_CHECKING:
    from vessel_export.parity.reference import Reference, ReferenceResult

__all__ = [
    "Case",
    "VerifyRequest",
    "compare_stage",
    "deployment_of",
    "load_reference",
    "memory_for_reference",
    "record_after_export",
    "sensitivity_of",
    "undecided_pixels",
    "verify",
    "verify_bundle",
    "verify_cases",
]

_AT_ONCE = 2  # cases whose results of a streamed reference are in memory: 200 MB each for the full model

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class VerifyRequest:
    """What to verify. None and empty tuples stand for what the bundle records; without `images`, three drawn frames are used.

    `emulate` rounds as a GPU does, on the CPU; BF16 bundles on the CPU are always emulated. `threads` 0 uses all cores. `record` verifies
    on the golden frames and questions instead of `images` and `questions`, and writes goldens into the bundle.
    """

    bundle: Path
    checkpoint: Path
    base: str | None = None
    sam2: str | None = None
    images: tuple[Path, ...] = ()
    questions: tuple[str, ...] = ()
    lora_alpha: float | None = None
    device: Device = dataclasses.field(default_factory=lambda: Device("cpu"))
    emulate: bool = False
    threads: int = 0
    record: bool = False


def verify_bundle(request: VerifyRequest) -> Report:
    """Load the bundle and the reference of `request` and compare them. With `request.record`, write goldens into the bundle, too.

    Raises:
        VesselError: an input is missing or damaged, or the bundle was made from another checkpoint.
    """
    bundle = Bundle.load(request.bundle)
    deployment = deployment_of(request, bundle)
    reference = load_reference(request, bundle)
    if request.record:
        return _verify_and_record(deployment, reference, request.threads)
    samples = samples_of(request.images)
    return verify(deployment, reference, samples, request.questions or (bundle.prompt.default_question,), threads=request.threads)


def deployment_of(request: VerifyRequest, bundle: Bundle) -> Deployment:
    """`bundle` on the device of `request`, or emulated. Raises VesselError."""
    emulated = request.emulate or (bundle.precision == "bf16" and request.device.kind == "cpu")
    return emulate(bundle) if emulated else deploy(bundle, request.device)


def record_after_export(request: VerifyRequest, *, stream: bool) -> bool:
    """Write goldens into the bundle of `request` without verifying it. Without `stream`, only if the reference fits in memory, by the size
    of the base model's files, which have two bytes for a parameter.

    Returns whether they were written.

    Raises:
        VesselError: as `verify_bundle`.
    """
    bundle = Bundle.load(request.bundle)
    files = open_base(request.base or bundle.provenance.base).folder.glob("*.safetensors")
    if not stream and 2 * sum(file.stat().st_size for file in files) > memory_for_reference(bundle):
        return False
    reference = load_reference(request, bundle)
    with tqdm(desc="goldens", disable=None, leave=False, delay=5) as bar:
        record_golden(bundle, reference, bar.update)
    return True


def _verify_and_record(deployment: Deployment, reference: Reference, threads: int) -> Report:
    """Verify the bundle on the golden frames and questions, and write what the reference computed for them into it."""
    recorder = GoldenRecorder(deployment.bundle, reference)
    cases = [
        Case(f"golden frame {frame + 1}: {question}", Sample("", recorder.image(frame), recorder.image(frame)), question)
        for frame, question in recorder.cases
    ]
    golden = dict(zip((case.name for case in cases), recorder.cases, strict=True))

    def keep(case: Case, result: ReferenceResult) -> None:
        recorder.add(*golden[case.name], result)

    report = verify_cases(deployment, reference, cases, threads=threads, keep=keep)
    recorder.add_unrelated()
    recorder.add_cine()
    recorder.golden().save(deployment.bundle)
    return report


def sensitivity_of(request: VerifyRequest) -> str:
    """As a table: which matrices of a quantized bundle move the masks, and which of them to keep.

    Raises:
        VesselError: as `verify_bundle`; or the bundle is not quantized.
    """
    from vessel_export.parity.sensitivity import measure_sensitivity

    bundle = Bundle.load(request.bundle)
    if not bundle.quantization:
        raise BundleError(f"{bundle.folder}: has no quantized matrices; export it with --recipe cpu-int8 or rtx3090-int8")
    bundle.verify_files()
    questions = request.questions or (bundle.prompt.default_question,)
    found = measure_sensitivity(bundle, load_reference(request, bundle), samples_of(request.images), questions)
    return found.table(QUANTIZED_TOLERANCES[bundle.weights].mean_iou or 1.0)


def load_reference(request: VerifyRequest, bundle: Bundle) -> Reference:
    """The reference of the checkpoint that `bundle` was made from; streamed if it does not fit in the memory next to the bundle.

    Raises:
        VesselError: an input is missing or damaged, or the bundle was made from another checkpoint.
    """
    from vessel_export.parity.reference import Reference

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of interest to developers only
    origin = bundle.provenance
    if sha256_of(request.checkpoint) != origin.checkpoint_sha256:
        made_from = f"{origin.checkpoint} with SHA-256 {origin.checkpoint_sha256[:12]}..."
        raise BundleError(f"{bundle.folder}: not made from {request.checkpoint}; give --ckpt the {made_from}")
    return Reference.load(
        request.checkpoint,
        open_base(request.base or origin.base).folder,
        open_sam2(request.sam2 or origin.sam2).path,
        lora_alpha=origin.lora_alpha if request.lora_alpha is None else request.lora_alpha,
        skip=origin.skipped,
        memory=memory_for_reference(bundle),
    )


def memory_for_reference(bundle: Bundle) -> float:
    """The bytes of memory that the reference may take next to `bundle`, which may run on the CPU. A tenth of the memory stays free."""
    available = available_memory()
    return math.inf if available is None else 0.9 * available - (needed_memory(bundle) or 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A question about an image; `name` stands for both in the report."""

    name: str
    sample: Sample
    question: str


@dataclasses.dataclass(frozen=True)
class _Expected:
    """What the end-to-end check needs of a reference's result; the whole result is too large to store.

    `masks` and `undecided` (pixels that may be either inside or outside) are [masks, height, width].
    """

    case: Case
    answer_ids: tuple[int, ...]
    masks: npt.NDArray[np.bool_]
    undecided: npt.NDArray[np.bool_]

    @property
    def name(self) -> str:
        return self.case.name


def verify(
    deployment: Deployment, reference: Reference, samples: Sequence[Sample], questions: Sequence[str], *, threads: int = 0
) -> Report:
    """Compare a deployed bundle with the FP32 `reference` on every sample and question. Raises as `verify_cases`."""
    cases = [
        Case(sample.name if len(questions) == 1 else f"{sample.name}: {question}", sample, question)
        for sample in samples
        for question in questions
    ]
    return verify_cases(deployment, reference, cases, threads=threads)


def verify_cases(
    deployment: Deployment,
    reference: Reference,
    cases: Sequence[Case],
    *,
    threads: int = 0,
    keep: Callable[[Case, ReferenceResult], object] = lambda _case, _result: None,
) -> Report:
    """Compare a deployed bundle with the FP32 `reference`. `keep` gets the reference's result of every case.

    If the reference is streamed, memory is scarce: the bundle's stages are loaded one at a time, each for several cases, and give back what
    their activations took. The bundle's own answers are the reference's drafts, so that it reads its files once for each case.

    Raises:
        VesselError: the bundle cannot be loaded or run on its device.
        BundleError: its graphs are not quantized as it says.
    """
    bundle = deployment.bundle
    tolerances = QUANTIZED_TOLERANCES[bundle.weights] if bundle.quantization else TOLERANCES[bundle.precision]
    measurements = [
        Measurement(stage, "stored weights, in steps", error, QUANTIZED_TOLERANCES[bundle.weights].steps, name)
        for stage, name, error in rounding_errors(bundle, reference)
    ]
    if reference.streamed:
        deployment = dataclasses.replace(deployment, arena=False)
    with Segmenter(deployment, threads) as segmenter:
        found = [segmenter.segment(case.sample.runtime, case.question) for case in _shown(cases, "bundle, end to end")]
    expected: list[_Expected] = []
    with ExitStack() as stack:
        loaded = {} if reference.streamed else {name: stack.enter_context(deployment.session(name, threads)) for name in bundle.stages}
        at_once = _AT_ONCE if reference.streamed else 1
        tokenizer = PromptTokenizer(bundle)
        for start in range(0, len(cases), at_once):
            group = []
            for case, result in _shown(list(zip(cases, found, strict=True))[start : start + at_once], "reference"):
                draft = (*result.token_ids, bundle.prompt.stop_token_ids[0]) if reference.streamed else ()
                made = reference.segment(
                    case.sample.reference, case.question, max_new_tokens=bundle.language_model.max_new_tokens, draft=draft
                )
                unclear = undecided_pixels(_array(made.mask_logits), tolerances.undecided)
                group.append((_Expected(case, _without_stop(made, bundle), made.masks.cpu().numpy(), unclear), made))
                measurements += _compare_inputs(bundle, tokenizer, *group[-1])
                keep(case, made)
            for stage in bundle.stages:
                with nullcontext(loaded[stage]) if loaded else deployment.session(stage, threads) as session:
                    for run, made in group:
                        measurements += compare_stage(bundle, session, reference, stage, run.name, made)
            expected += [run for run, _ in group]
    for run, result in zip(expected, found, strict=True):
        measurements += _compare_end_to_end(result, tolerances, run)
    masks, emulated = sum(len(run.masks) for run in expected), isinstance(deployment, EmulatedDeployment)
    weights = bundle.weights if bundle.quantization else None
    return Report(bundle.precision, len(expected), masks, tuple(worst_of(measurements)), emulated, weights)


def _shown(items: Sequence[_T], what: str) -> Iterator[_T]:
    """The items; on a terminal, with a bar after some seconds."""
    yield from tqdm(items, desc=what, disable=None, leave=False, delay=5)


def _compare_inputs(bundle: Bundle, tokenizer: PromptTokenizer, run: _Expected, result: ReferenceResult) -> Iterator[Measurement]:
    """The runtime's pixels and prompt against the reference's. They must be equal."""
    pixels = {
        "tiles": (tile_pixels(run.case.sample.runtime, bundle.tiles), result.pixel_values),
        "SAM2's square": (mask_pixels(run.case.sample.runtime, bundle.mask), result.sam2_pixel_values),
    }
    for quantity, (ours, theirs) in pixels.items():
        yield _error("image", quantity, ours, _array(theirs), 0.0, run.name)
    before, after = tokenizer.encode(run.case.question)
    ids = [*before, *[bundle.prompt.image_token_id] * (len(result.pixel_values) * bundle.tiles.tokens_per_tile), *after]
    yield _equal("prompt", "token ids identical", ids == result.prompt_ids.tolist(), run.name)


def compare_stage(
    bundle: Bundle, session: Session, reference: Reference, stage: str, run: str, result: ReferenceResult
) -> Iterator[Measurement]:
    """A graph on the inputs of the reference's `result`, rounded to the bundle's precision, against the reference's outputs.

    In a quantized bundle also the masks that the stage alone would give. `run` names the result in the report.
    """
    if stage == "sam2_mask_decoder" and not len(result.seg_states):
        return
    feeds, outputs = _feeds_and_outputs(bundle, reference, stage, result)
    quantized = bundle.quantization and stage in bundle.quantization.matrices
    limit = (QUANTIZED_TOLERANCES[bundle.weights] if quantized else TOLERANCES[bundle.precision]).relative_error
    dtypes = {spec.name: spec.dtype for spec in bundle.stages[stage].inputs}
    feeds = {name: np.ascontiguousarray(array, dtypes[name]) for name, array in feeds.items()}
    if stage == "language_model":
        got = run_language_model(session, bundle.language_model, feeds["inputs_embeds"], kept=len(result.answer_ids))
    else:
        got = session.run(feeds)
    for name, array in outputs.items():
        yield _error(stage, name, got[name], array, limit, run)
    if stage == "language_model":
        yield _equal(stage, "next ids identical", np.array_equal(got["next_ids"][0], _array(result.answer_ids)), run)
    # Masks that vision_encoder alone would give take another pass of the reference's language model.
    if bundle.quantization and not (reference.streamed and stage == "vision_encoder"):
        for ours, theirs in zip(
            masks_with(reference, result, stage, {name: got[name] for name in outputs}), result.masks.cpu().numpy(), strict=False
        ):
            yield _mean(stage, ALONE, iou(ours, theirs), None, run)


def _feeds_and_outputs(
    bundle: Bundle, reference: Reference, stage: str, result: ReferenceResult
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The reference's inputs and outputs of a stage, under the graph's names."""
    features = {name: _array(getattr(result.sam2_features, name)) for name in ("fpn_0", "fpn_1", "image_features")}
    if stage == "vision_encoder":
        return {"pixel_values": _array(result.pixel_values)}, {"image_embeds": _array(result.image_embeds)}
    if stage == "language_model":
        embeds = _array(consumed(reference, result, result.image_embeds))
        states = {"hidden_states": _array(result.hidden_states)[None]}
        return {"inputs_embeds": embeds}, states
    if stage == "sam2_image_encoder":
        return {"pixel_values": _array(result.sam2_pixel_values)}, features
    index = np.zeros(len(result.seg_states), np.int64)
    prediction = {name: _array(getattr(result.prediction, name)) for name in ("low_res_logits", "iou", "object_score")}
    return {**features, "seg_states": _array(result.seg_states), "image_index": index}, prediction


def _compare_end_to_end(result: Result, tolerances: Tolerances, run: _Expected) -> Iterator[Measurement]:
    """The result of the whole runtime, from image to masks, against the reference's answer and masks."""
    yield _equal("end to end", "answers identical", result.token_ids == run.answer_ids, run.name)
    if len(result.masks) != len(run.masks):
        yield Measurement("end to end", "mask IoU", 0.0, tolerances.mask_iou, run.name, at_least=True)
        return
    for ours, theirs, undecided in zip(result.masks, run.masks, run.undecided, strict=True):
        found = np.where(undecided, theirs, ours.pixels)
        overlap = iou(found, theirs)
        # where pixels may flip at all, one may in any mask: a mask of 106 pixels without one of them has an IoU of 0.991
        told = max(overlap, tolerances.mask_iou) if tolerances.mask_iou < 1 and (found != theirs).sum() == 1 else overlap
        yield Measurement("end to end", "mask IoU", told, tolerances.mask_iou, run.name, at_least=True)
        if tolerances.mean_iou is not None:
            yield _mean("end to end", "mean mask IoU", overlap, tolerances.mean_iou, run.name)
        if tolerances.mean_dice is not None:
            yield _mean("end to end", "mean mask Dice", dice(ours.pixels, theirs), tolerances.mean_dice, run.name)


def undecided_pixels(logits: Array, share: float) -> npt.NDArray[np.bool_]:
    """The pixels whose logit is closer to zero than `share` times the mask's largest magnitude: [masks, height, width], as the logits."""
    magnitudes = np.abs(logits)
    undecided: npt.NDArray[np.bool_] = magnitudes < share * magnitudes.max(axis=(1, 2), keepdims=True, initial=0.0)
    return undecided


def _error(stage: str, quantity: str, ours: Array, theirs: Array, limit: float, run: str) -> Measurement:
    """The error relative to the reference's largest magnitude: for elements near zero, their own relative error means nothing."""
    if ours.shape != theirs.shape:
        return Measurement(stage, quantity, float("nan"), limit, run, max_abs=float("nan"))
    difference = float(np.max(np.abs(ours.astype(np.float64) - theirs), initial=0.0))
    magnitude = float(np.max(np.abs(theirs), initial=0.0))
    return Measurement(stage, quantity, difference / magnitude if magnitude else difference, limit, run, max_abs=difference)


def _equal(stage: str, quantity: str, same: bool, run: str) -> Measurement:
    return _mean(stage, quantity, float(same), 1.0, run)


def _mean(stage: str, quantity: str, measured: float, limit: float | None, run: str) -> Measurement:
    return Measurement(stage, quantity, measured, limit, run, at_least=True, average=True)


def _without_stop(result: ReferenceResult, bundle: Bundle) -> tuple[int, ...]:
    ids = result.answer_ids.tolist()
    return tuple(ids[:-1] if ids and ids[-1] in bundle.prompt.stop_token_ids else ids)


def _array(tensor: Any) -> Array:
    """A torch tensor as an array; floating-point types become float32."""
    array: Array = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    return array

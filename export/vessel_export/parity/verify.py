"""Parity: a bundle against the PyTorch reference, each graph alone on the reference's own inputs, then the whole pipeline.

Checked alone, a graph does not inherit the errors of earlier graphs; the end-to-end check shows what all errors add up to. See
docs/numerics.md for what is compared with what, and for the reason of each tolerance. Does not know how the reference computes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vessel_export.parity.checks import ALONE, QUANTIZED_TOLERANCES, TOLERANCES, Measurement, Report, Tolerances, worst_of
from vessel_export.parity.emulate import EmulatedDeployment, emulate
from vessel_export.parity.inputs import Array, Sample, one_pass, samples_of
from vessel_export.parity.stage_masks import consumed, masks_with
from vessel_export.parity.stored_matrices import rounding_errors
from vessel_rt.device.deployment import Deployment, deploy
from vessel_rt.device.providers import Device
from vessel_rt.device.session import Session
from vessel_rt.errors import BundleError
from vessel_rt.evaluation.metrics import dice, iou
from vessel_rt.formats.bundle import Bundle
from vessel_rt.io.checked_files import sha256_of
from vessel_rt.model.preprocess import mask_pixels, tile_pixels
from vessel_rt.model.prompt import PromptTokenizer
from vessel_rt.model.segmenter import Segmenter

if TYPE_CHECKING:
    from vessel_export.parity.reference import Reference, ReferenceResult

__all__ = ["VerifyRequest", "sensitivity_of", "undecided_pixels", "verify", "verify_bundle"]


@dataclasses.dataclass(frozen=True)
class VerifyRequest:
    """What to verify. None and empty tuples stand for what the bundle records; without `images`, three drawn frames are used.

    `emulate` rounds as a GPU does, on the CPU; BF16 bundles on the CPU are always emulated. `threads` 0 uses all cores.
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


def verify_bundle(request: VerifyRequest) -> Report:
    """Load the bundle and the reference of `request` and compare them.

    Raises:
        VesselError: an input is missing or damaged, or the bundle was made from another checkpoint.
    """
    bundle = Bundle.load(request.bundle)
    emulated = request.emulate or (bundle.precision == "bf16" and request.device.kind == "cpu")
    deployment = emulate(bundle) if emulated else deploy(bundle, request.device)
    reference = _reference(request, bundle)
    samples = samples_of(request.images)
    return verify(deployment, reference, samples, request.questions or (bundle.prompt.default_question,), threads=request.threads)


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
    found = measure_sensitivity(bundle, _reference(request, bundle), samples_of(request.images), questions)
    return found.table(QUANTIZED_TOLERANCES[bundle.weights].mean_iou or 1.0)


def _reference(request: VerifyRequest, bundle: Bundle) -> Reference:
    """The reference of the checkpoint that the bundle was made from."""
    from vessel_export.parity.reference import Reference
    from vessel_export.sources.base_model import open_base, open_sam2

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
    )


@dataclasses.dataclass(frozen=True)
class _Expected:
    """What the end-to-end check needs of a reference's result; the whole result is too large to store.

    `masks` and `undecided` (pixels that may be either inside or outside) are [masks, height, width].
    """

    name: str
    sample: Sample
    question: str
    answer_ids: tuple[int, ...]
    masks: npt.NDArray[np.bool_]
    undecided: npt.NDArray[np.bool_]


def verify(
    deployment: Deployment, reference: Reference, samples: Sequence[Sample], questions: Sequence[str], *, threads: int = 0
) -> Report:
    """Compare a deployed bundle with the FP32 `reference` on every sample and question.

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
    expected: list[_Expected] = []
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(deployment.session(name, threads)) for name in bundle.stages}
        tokenizer = PromptTokenizer(bundle)
        for sample in samples:
            for question in questions:
                result = reference.segment(sample.reference, question, max_new_tokens=bundle.language_model.max_new_tokens)
                name = sample.name if len(questions) == 1 else f"{sample.name}: {question}"
                unclear = undecided_pixels(_array(result.mask_logits), tolerances.undecided)
                run = _Expected(name, sample, question, _without_stop(result, bundle), result.masks.cpu().numpy(), unclear)
                measurements += _compare_inputs(bundle, tokenizer, run, result)
                measurements += _compare_stages(bundle, sessions, reference, run, result)
                expected.append(run)
    with Segmenter(deployment, threads) as segmenter:
        for run in expected:
            measurements += _compare_end_to_end(segmenter, tolerances, run)
    masks, emulated = sum(len(run.masks) for run in expected), isinstance(deployment, EmulatedDeployment)
    weights = bundle.weights if bundle.quantization else None
    return Report(bundle.precision, len(expected), masks, tuple(worst_of(measurements)), emulated, weights)


def _compare_inputs(bundle: Bundle, tokenizer: PromptTokenizer, run: _Expected, result: ReferenceResult) -> Iterator[Measurement]:
    """The runtime's pixels and prompt against the reference's. They must be equal."""
    pixels = {
        "tiles": (tile_pixels(run.sample.runtime, bundle.tiles), result.pixel_values),
        "SAM2's square": (mask_pixels(run.sample.runtime, bundle.mask), result.sam2_pixel_values),
    }
    for quantity, (ours, theirs) in pixels.items():
        yield _error("image", quantity, ours, _array(theirs), 0.0, run.name)
    before, after = tokenizer.encode(run.question)
    ids = [*before, *[bundle.prompt.image_token_id] * (len(result.pixel_values) * bundle.tiles.tokens_per_tile), *after]
    yield _equal("prompt", "token ids identical", ids == result.prompt_ids.tolist(), run.name)


def _compare_stages(
    bundle: Bundle, sessions: Mapping[str, Session], reference: Reference, run: _Expected, result: ReferenceResult
) -> Iterator[Measurement]:
    """Each graph on the reference's inputs, rounded to the bundle's precision, against the reference's outputs.

    In a quantized bundle also the masks that each stage alone would give.
    """
    features = {name: _array(getattr(result.sam2_features, name)) for name in ("fpn_0", "fpn_1", "image_features")}
    prediction = {name: _array(getattr(result.prediction, name)) for name in ("low_res_logits", "iou", "object_score")}
    stages: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {
        "vision_encoder": ({"pixel_values": _array(result.pixel_values)}, {"image_embeds": _array(result.image_embeds)}),
        "language_model": (
            one_pass(bundle.language_model, _array(consumed(reference, result, result.image_embeds)), kept=len(result.answer_ids)),
            {"hidden_states": _array(result.hidden_states)[None]},
        ),
        "sam2_image_encoder": ({"pixel_values": _array(result.sam2_pixel_values)}, features),
    }
    if len(run.masks):
        image_index = np.zeros(len(run.masks), np.int64)
        stages["sam2_mask_decoder"] = ({**features, "seg_states": _array(result.seg_states), "image_index": image_index}, prediction)
    for stage, (feeds, outputs) in stages.items():
        quantized = bundle.quantization and stage in bundle.quantization.matrices
        limit = (QUANTIZED_TOLERANCES[bundle.weights] if quantized else TOLERANCES[bundle.precision]).relative_error
        dtypes = {spec.name: spec.dtype for spec in bundle.stages[stage].inputs}
        cache = [spec.name for spec in bundle.stages[stage].outputs if spec.name.startswith("present_")]
        got = sessions[stage].run({name: np.ascontiguousarray(array, dtypes[name]) for name, array in feeds.items()}, keep=cache)
        for name, array in outputs.items():
            yield _error(stage, name, got[name], array, limit, run.name)
        if stage == "language_model":
            yield _equal(stage, "next ids identical", np.array_equal(got["next_ids"][0], _array(result.answer_ids)), run.name)
        if bundle.quantization:
            for ours, theirs in zip(masks_with(reference, result, stage, {name: got[name] for name in outputs}), run.masks, strict=False):
                yield _mean(stage, ALONE, iou(ours, theirs), None, run.name)


def _compare_end_to_end(segmenter: Segmenter, tolerances: Tolerances, run: _Expected) -> Iterator[Measurement]:
    """The whole runtime, from image to masks, against the reference's answer and masks."""
    result = segmenter.segment(run.sample.runtime, run.question)
    yield _equal("end to end", "answers identical", result.token_ids == run.answer_ids, run.name)
    if len(result.masks) != len(run.masks):
        yield Measurement("end to end", "mask IoU", 0.0, tolerances.mask_iou, run.name, at_least=True)
        return
    for ours, theirs, undecided in zip(result.masks, run.masks, run.undecided, strict=True):
        overlap = iou(np.where(undecided, theirs, ours.pixels), theirs)
        yield Measurement("end to end", "mask IoU", overlap, tolerances.mask_iou, run.name, at_least=True)
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

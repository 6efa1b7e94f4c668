"""Parity: a bundle against the PyTorch reference, each graph alone on the reference's own inputs, then the whole pipeline.

Errors of a graph do not add up over stages this way, and the end-to-end part shows what they come to together. What is compared
with what, and why each tolerance is what it is: docs/numerics.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from vessel_export.parity.emulate import emulate
from vessel_export.sources.mmengine_config import positive_number
from vessel_rt.device.deployment import Deployment, deploy
from vessel_rt.device.providers import Device
from vessel_rt.device.session import Session
from vessel_rt.errors import BundleError, ImageError, VesselError
from vessel_rt.formats.bundle import Bundle, LanguageModelSpec
from vessel_rt.inputs.images import SUFFIXES, read_image
from vessel_rt.io.checked_files import sha256_of
from vessel_rt.model.preprocess import mask_pixels, tile_pixels
from vessel_rt.model.prompt import PromptTokenizer
from vessel_rt.model.segmenter import Segmenter

if TYPE_CHECKING:
    from vessel_export.parity.reference import Reference, ReferenceResult

__all__ = [
    "TOLERANCES",
    "Check",
    "Report",
    "Sample",
    "Tolerances",
    "add_arguments",
    "drawn_samples",
    "one_pass",
    "read_samples",
    "run",
    "undecided_pixels",
    "verify",
]

Array = npt.NDArray[Any]

_CPU = Device("cpu")


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """How far a bundle may be from the reference.

    `relative_error`: the most that an output of a graph may differ, max|bundle - reference| / max|reference|. `mask_iou`: the least IoU of
    a mask end to end, over its decided pixels: those whose reference logit is farther from zero than `undecided` times the mask's largest.
    """

    relative_error: float
    mask_iou: float
    undecided: float = 0.0


# Reasons: docs/numerics.md. Pixels, prompt ids, answer ids and the number of masks must be equal at every precision.
TOLERANCES = {
    "fp32": Tolerances(relative_error=1e-4, mask_iou=1.0, undecided=1e-4),
    "fp16": Tolerances(relative_error=3e-2, mask_iou=0.995),
    "bf16": Tolerances(relative_error=2e-1, mask_iou=0.96),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image under both ways of reading it: the reference's (Pillow) and the runtime's (`vessel_rt.inputs.images.read_image`)."""

    name: str
    reference: Image.Image
    runtime: Image.Image


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of a report: the worst of all images and questions.

    `measured` is a relative error that may be at most `limit`, or, with `at_least`, a share or an IoU that must reach it.
    `max_abs` is the absolute error there, None where that says nothing; `worst` names the run, and is empty where none differs.
    """

    stage: str
    quantity: str
    measured: float
    limit: float
    at_least: bool
    max_abs: float | None
    worst: str

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclasses.dataclass(frozen=True)
class Report:
    """Every check of one bundle, and how many runs (images times questions) and masks they rest on."""

    precision: str
    runs: int
    masks: int
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return self.masks > 0 and all(check.passed for check in self.checks)

    def table(self) -> str:
        """The report as text, a line a check."""
        header = ("stage", "quantity", "max abs", "measured", "limit", "", "worst")
        rows = [header] + [
            (
                check.stage,
                check.quantity,
                "" if check.max_abs is None else f"{check.max_abs:.2e}",
                f"{check.measured:.6f}" if check.at_least else f"{check.measured:.2e}",
                f">= {check.limit:g}" if check.at_least else f"<= {check.limit:g}",
                "ok" if check.passed else "FAILED",
                check.worst,
            )
            for check in self.checks
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.precision}: {self.runs} runs, {self.masks} masks: {self._verdict()}"])

    def _verdict(self) -> str:
        if not self.masks:
            return "FAILED: no answer held [SEG], so no mask was compared; give --images with vessels in them"
        failed = sum(not check.passed for check in self.checks)
        return f"FAILED ({failed} of {len(self.checks)} checks)" if failed else "parity"


@dataclasses.dataclass(frozen=True)
class _Measurement:
    """One quantity of one run, before the worst is taken."""

    stage: str
    quantity: str
    measured: float
    limit: float
    run: str
    at_least: bool = False
    max_abs: float | None = None


@dataclasses.dataclass(frozen=True)
class _Expected:
    """What the end-to-end part needs of a reference's result, which is otherwise too large to keep.

    `masks` and `undecided` (the pixels that may fall to either side) are [masks, height, width].
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
    """Compare a bundle, where it is deployed, with `reference` (FP32) on every sample and question.

    Raises:
        VesselError: the bundle cannot be loaded or run there.
    """
    bundle = deployment.bundle
    tolerances = TOLERANCES[bundle.precision]
    measurements: list[_Measurement] = []
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
                measurements += _compare_stages(bundle, sessions, tolerances, reference, run, result)
                expected.append(run)
    with Segmenter(deployment, threads) as segmenter:
        for run in expected:
            measurements += _compare_end_to_end(segmenter, tolerances, run)
    return Report(bundle.precision, len(expected), sum(len(run.masks) for run in expected), tuple(_worst(measurements)))


def _compare_inputs(bundle: Bundle, tokenizer: PromptTokenizer, run: _Expected, result: ReferenceResult) -> Iterator[_Measurement]:
    """Pixels and prompt: the runtime's against the reference's, which must be equal."""
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
    bundle: Bundle, sessions: Mapping[str, Session], tolerances: Tolerances, reference: Reference, run: _Expected, result: ReferenceResult
) -> Iterator[_Measurement]:
    """Each graph on the reference's inputs, rounded to the bundle's precision, against the reference's outputs."""
    features = {name: _array(getattr(result.sam2_features, name)) for name in ("fpn_0", "fpn_1", "image_features")}
    prediction = {name: _array(getattr(result.prediction, name)) for name in ("low_res_logits", "iou", "object_score")}
    stages: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {
        "vision_encoder": ({"pixel_values": _array(result.pixel_values)}, {"image_embeds": _array(result.image_embeds)}),
        "language_model": (
            one_pass(bundle.language_model, _embeds(reference, result), kept=len(result.answer_ids)),
            {"hidden_states": _array(result.hidden_states)[None]},
        ),
        "sam2_image_encoder": ({"pixel_values": _array(result.sam2_pixel_values)}, features),
    }
    if len(run.masks):
        image_index = np.zeros(len(run.masks), np.int64)
        stages["sam2_mask_decoder"] = ({**features, "seg_states": _array(result.seg_states), "image_index": image_index}, prediction)
    for stage, (feeds, outputs) in stages.items():
        dtypes = {spec.name: spec.dtype for spec in bundle.stages[stage].inputs}
        cache = [spec.name for spec in bundle.stages[stage].outputs if spec.name.startswith("present_")]
        got = sessions[stage].run({name: np.ascontiguousarray(array, dtypes[name]) for name, array in feeds.items()}, keep=cache)
        for name, array in outputs.items():
            yield _error(stage, name, got[name], array, tolerances.relative_error, run.name)
        if stage == "language_model":
            yield _equal(stage, "next ids identical", np.array_equal(got["next_ids"][0], _array(result.answer_ids)), run.name)


def _embeds(reference: Reference, result: ReferenceResult) -> Array:
    """Prompt and answer, up to the last token but one: the last is not consumed."""
    import torch

    with torch.inference_mode():
        prompt = reference.embed(result.prompt_ids, result.image_embeds)
        consumed = reference.embed(result.answer_ids[:-1], result.image_embeds[:0])
        return _array(torch.cat([prompt, consumed], dim=1))


def one_pass(sizes: LanguageModelSpec, embeds: Array, kept: int) -> dict[str, Array]:
    """What language_model is fed to take `embeds` [1, tokens, hidden_size] at once, over an empty FP32 cache, and keep the last `kept`."""
    length = embeds.shape[1]
    cache = np.zeros((1, sizes.kv_heads, sizes.capacity, sizes.head_dim), np.float32)
    return {
        "inputs_embeds": embeds,
        "position_ids": np.arange(length)[None],
        "write_indices": np.zeros(1, np.int64),
        "kv_positions": np.arange(length),
        "gather_positions": np.arange(length - kept, length)[None],
        **{f"past_{part}.{layer}": cache for layer in range(sizes.layers) for part in ("key", "value")},
    }


def _compare_end_to_end(segmenter: Segmenter, tolerances: Tolerances, run: _Expected) -> Iterator[_Measurement]:
    """The runtime as it is used, from the image on, against the reference's answer and masks."""
    result = segmenter.segment(run.sample.runtime, run.question)
    yield _equal("end to end", "answers identical", result.token_ids == run.answer_ids, run.name)
    if len(result.masks) != len(run.masks):
        yield _Measurement("end to end", "mask IoU", 0.0, tolerances.mask_iou, run.name, at_least=True)
        return
    for ours, theirs, undecided in zip(result.masks, run.masks, run.undecided, strict=True):
        iou = mask_iou(np.where(undecided, theirs, ours.pixels), theirs)
        yield _Measurement("end to end", "mask IoU", iou, tolerances.mask_iou, run.name, at_least=True)


def undecided_pixels(logits: Array, share: float) -> npt.NDArray[np.bool_]:
    """Where logits [masks, height, width] are within `share` of their mask's largest magnitude of zero: bool, of the same shape."""
    magnitudes = np.abs(logits)
    undecided: npt.NDArray[np.bool_] = magnitudes < share * magnitudes.max(axis=(1, 2), keepdims=True, initial=0.0)
    return undecided


def mask_iou(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """Intersection over union of two masks of one size; 1 if both are empty."""
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 1.0


def _error(stage: str, quantity: str, ours: Array, theirs: Array, limit: float, run: str) -> _Measurement:
    """Relative to the reference's largest magnitude, since elements near zero have no meaningful error of their own."""
    if ours.shape != theirs.shape:
        return _Measurement(stage, quantity, float("nan"), limit, run, max_abs=float("nan"))
    difference = float(np.max(np.abs(ours.astype(np.float64) - theirs), initial=0.0))
    magnitude = float(np.max(np.abs(theirs), initial=0.0))
    return _Measurement(stage, quantity, difference / magnitude if magnitude else difference, limit, run, max_abs=difference)


def _equal(stage: str, quantity: str, same: bool, run: str) -> _Measurement:
    return _Measurement(stage, quantity, float(same), 1.0, run, at_least=True)


def _worst(measurements: Sequence[_Measurement]) -> Iterator[Check]:
    """One check for each quantity, in order of first appearance. Equalities become the share of runs that agree."""
    grouped: dict[tuple[str, str], list[_Measurement]] = {}
    for measurement in measurements:
        grouped.setdefault((measurement.stage, measurement.quantity), []).append(measurement)
    for (stage, quantity), group in grouped.items():
        worst = max(group, key=lambda m: (np.isnan(m.measured), -m.measured if m.at_least else m.measured))
        measured = float(np.mean([m.measured for m in group])) if "identical" in quantity else worst.measured
        ideal = 1.0 if worst.at_least else 0.0
        yield Check(stage, quantity, measured, worst.limit, worst.at_least, worst.max_abs, "" if measured == ideal else worst.run)


def _without_stop(result: ReferenceResult, bundle: Bundle) -> tuple[int, ...]:
    ids = result.answer_ids.tolist()
    return tuple(ids[:-1] if ids and ids[-1] in bundle.prompt.stop_token_ids else ids)


def _array(tensor: Any) -> Array:
    """A torch tensor as an array; inexact types as float32."""
    array: Array = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    return array


def read_samples(paths: Sequence[Path]) -> list[Sample]:
    """The images at `paths`: files, and the images of folders, sorted.

    Raises:
        VesselError: a path that is not there, a folder without images, or an image that cannot be read.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise VesselError(f"{path}: no images in this folder ({', '.join(SUFFIXES)}); give another to --images")
        files += found
    return [_read_sample(file, f"image {number} of {len(files)}") for number, file in enumerate(files, start=1)]


def _read_sample(file: Path, name: str) -> Sample:
    """Called by its place: file names carry patients' names, and reports are passed on."""
    try:
        runtime = read_image(file)  # first, because it says what is wrong with a file
    except ImageError as e:
        raise VesselError(f"{name}: {e}") from e
    with Image.open(file) as image:
        return Sample(name, image.convert("RGB"), runtime)


def drawn_samples() -> list[Sample]:
    """Three frames with dark vessels drawn on a gray ground, in three shapes, for when there are no images at hand."""
    samples = []
    for width, height in ((512, 512), (640, 480), (300, 300)):
        random = np.random.default_rng(width)
        image = Image.fromarray(random.normal(150, 12, (height, width)).clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for thickness in (9, 7, 5, 3):
            steps = np.cumsum(random.normal((width / 24, height / 24), width / 40, (16, 2)), axis=0)
            draw.line([(float(x), float(y)) for x, y in steps + random.uniform(0, width / 3, 2)], fill=70, width=thickness * width // 512)
        image = image.convert("RGB")
        samples.append(Sample(f"drawn {width}x{height}", image, image))
    return samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vessel-export verify`; `parser`'s namespace then has `run`."""
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="the bundle to check")
    parser.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="the checkpoint it was exported from")
    parser.add_argument("--base", metavar="DIR|ID", help="InternVL3 (default: the one named in the bundle)")
    parser.add_argument("--sam2", metavar="FILE|ID", help="SAM 2.0 (default: the one named in the bundle)")
    parser.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="images and folders (default: three drawn frames)")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a question; may be repeated (default: the bundle's)")
    parser.add_argument("--lora-alpha", type=positive_number, metavar="A", help="LoRA's alpha, instead of the bundle's")
    parser.add_argument("--device", type=Device.parse, default=_CPU, metavar="DEVICE", help="where the bundle runs (default: cpu)")
    parser.add_argument("--emulate", action="store_true", help="round as a GPU does, on the CPU (always so for bf16 on the CPU)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads for one operator (default: all cores)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """`vessel-export verify`: print the table; 0 for parity, 1 beyond tolerance.

    Raises:
        VesselError: an input is missing or damaged, or the bundle was made from another checkpoint.
    """
    from vessel_export.parity.reference import Reference
    from vessel_export.sources.base_model import open_base, open_sam2

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # for those who change this code
    bundle = Bundle.load(arguments.bundle)
    emulated = arguments.emulate or (bundle.precision == "bf16" and arguments.device.kind == "cpu")
    deployment = emulate(bundle) if emulated else deploy(bundle, arguments.device)
    if sha256_of(arguments.ckpt) != bundle.provenance.checkpoint_sha256:
        made_from = f"{bundle.provenance.checkpoint} of SHA-256 {bundle.provenance.checkpoint_sha256[:12]}..."
        raise BundleError(f"{bundle.folder}: not made from {arguments.ckpt}; give --ckpt the {made_from}")
    samples = read_samples(arguments.images) if arguments.images else drawn_samples()
    base, sam2 = arguments.base or bundle.provenance.base, arguments.sam2 or bundle.provenance.sam2
    reference = Reference.load(
        arguments.ckpt,
        open_base(base).folder,
        open_sam2(sam2).path,
        lora_alpha=bundle.provenance.lora_alpha if arguments.lora_alpha is None else arguments.lora_alpha,
        skip=bundle.provenance.skipped,
    )
    questions = arguments.prompt or [bundle.prompt.default_question]
    report = verify(deployment, reference, samples, questions, threads=arguments.threads)
    print(report.table())
    if emulated:
        print(f"emulated: every operator computed in FP32 on the CPU, its result rounded to {bundle.precision}")
    if not report.passed:
        print(f"vessel-export: {bundle.folder}: beyond tolerance", file=sys.stderr)
    return 0 if report.passed else 1

"""Records goldens: what the reference makes of a few drawn frames and a cine, for checks without it. Does not know how a bundle is run."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

import vessel_rt
from vessel_export.parity.golden_frames import golden_frames
from vessel_rt.errors import VesselError
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

if TYPE_CHECKING:
    from torch import Tensor

    from vessel_export.parity.reference import Reference, ReferenceResult
    from vessel_export.parity.reference_cine import CineResult

__all__ = ["GoldenRecorder", "record_golden"]

_OTHER_QUESTION = "Please segment vessel and catheter in this image."
_UNRELATED = "What kind of image is this?"  # an answer without [SEG] is recorded, too
_LONGEST_UNRELATED = 48  # tokens: a streamed reference reads its files once for each
_TRACKED = 3  # frames of the cine after those that the language model sees: the last one has a memory of tracked frames
_LIBRARIES = ("torch", "transformers", "peft", "sam2")

_Array = npt.NDArray[Any]


class GoldenRecorder:
    """Collects the reference's results of golden cases.

    `cases` are those to run: positions in `frames` (uint8 [height, width]), and questions.
    """

    def __init__(self, bundle: Bundle, reference: Reference) -> None:
        self._bundle, self._reference = bundle, reference
        self.frames = golden_frames(bundle.tiles)
        question = bundle.prompt.default_question
        self.cases: Sequence[tuple[int, str]] = ((0, question), (0, _OTHER_QUESTION), *((i, question) for i in range(1, len(self.frames))))
        self._tiles: dict[int, int] = {}
        self._recorded: list[tuple[GoldenCaseRecord, GoldenCase]] = []
        self._cine: GoldenCine | None = None
        self._spec = SketchSpec()

    def image(self, frame: int) -> Image.Image:
        """A frame in RGB."""
        return Image.fromarray(self.frames[frame]).convert("RGB")

    def add(self, frame: int, question: str, result: ReferenceResult) -> None:
        """Record the reference's result of a case."""
        outputs = {name: _array(tensor) for name, tensor in _outputs(result)}
        ids = self.answer_of(result)
        text = self._reference.tokenizer.decode(ids, skip_special_tokens=False).strip()
        self._tiles[frame] = len(result.pixel_values)
        sketches = {name: make_sketch(outputs[name], self._spec) for names in SKETCHED.values() for name in names}
        half = _half(outputs["low_res_logits"], f"golden frame {frame + 1}")
        self._recorded.append(
            (
                GoldenCaseRecord(frame=frame, question=question, answer=text, token_ids=ids, masks=len(half)),
                GoldenCase(frame, question, text, ids, half.astype(np.float32), outputs["iou"], outputs["object_score"], sketches),
            )
        )

    def add_unrelated(self) -> None:
        """Ask a question that is not about a vessel, and record the answer if it has no [SEG] and ends soon."""
        limit = min(_LONGEST_UNRELATED, self._bundle.language_model.max_new_tokens - 1)
        result = self._reference.segment(self.image(0), _UNRELATED, max_new_tokens=limit)
        if len(result.masks) == 0 and len(self.answer_of(result)) < len(result.answer_ids):
            self.add(0, _UNRELATED, result)

    def add_cine(self) -> None:
        """Record a cine in which the first frame moves, if the bundle tracks objects, and if the reference finds any.

        Raises:
            VesselError: as `add`.
        """
        from vessel_export.parity.reference_cine import segment_cine

        if self._bundle.cine is None:
            return
        shifts = tuple(GoldenShift(3 * time, 2 * time) for time in range(self._bundle.cine.prompted_frames + _TRACKED))
        frames = [Image.fromarray(shifted(self.frames[0], shift)).convert("RGB") for shift in shifts]
        question, limit = self._bundle.prompt.default_question, self._bundle.language_model.max_new_tokens
        with _first_outputs(self._reference.sam2) as outputs:
            draft = self._recorded[0][1].token_ids if self._recorded else ()
            result = segment_cine(self._reference, frames, question, max_new_tokens=limit, draft=draft)
        if not len(result.low_res_logits):
            return
        low_res = _array(result.low_res_logits)
        outputs["low_res_logits"] = low_res[0, self._bundle.cine.prompted_frames]
        ids, half = self.answer_of(result), _half(low_res, "the golden cine")
        text = self._reference.tokenizer.decode(ids, skip_special_tokens=False).strip()
        record = GoldenCineRecord(frame=0, shifts=shifts, question=question, answer=text, token_ids=ids, masks=len(half))
        sketches = {name: make_sketch(array, self._spec) for name, array in outputs.items()}
        self._cine = GoldenCine(record, half.astype(np.float32), sketches)

    def answer_of(self, result: ReferenceResult | CineResult) -> tuple[int, ...]:
        """The answer's ids without the stop token."""
        ids = result.answer_ids.tolist()
        return tuple(ids[:-1] if ids and ids[-1] in self._bundle.prompt.stop_token_ids else ids)

    def golden(self) -> Golden:
        """The goldens of what was recorded."""
        reference = GoldenReference(
            precision="fp32",
            streamed=self._reference.streamed,
            checkpoint_sha256=self._bundle.provenance.checkpoint_sha256,
            versions={"vessel-rt": vessel_rt.__version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES},
        )
        records, cases = zip(*self._recorded, strict=True)
        frames = tuple(GoldenFrame(frame.shape[1], frame.shape[0], self._tiles[i]) for i, frame in enumerate(self.frames))
        cine = self._cine.record if self._cine else None
        file = GoldenFile(reference=reference, sketches=self._spec, frames=frames, cases=records, cine=cine)
        return Golden(file, tuple(self.frames), cases, self._cine)


def record_golden(bundle: Bundle, reference: Reference, progress: Callable[[int], object] = lambda _: None) -> Bundle:
    """Record goldens with `reference` in the folder of `bundle`; returns the bundle with them. Calls `progress` with 1 for each case and
    for the cine.

    Raises:
        VesselError: the reference's logits are beyond FP16.
        OSError: the files cannot be written.
    """
    recorder = GoldenRecorder(bundle, reference)
    draft: Sequence[int] = reference.tokenizer.encode(bundle.prompt.answers[0]) if bundle.prompt.answers else ()
    for frame, question in recorder.cases:
        limit = bundle.language_model.max_new_tokens
        result = reference.segment(recorder.image(frame), question, max_new_tokens=limit, draft=draft)
        recorder.add(frame, question, result)
        draft = result.answer_ids.tolist()
        progress(1)
    recorder.add_unrelated()
    progress(1)
    recorder.add_cine()
    progress(1)
    return recorder.golden().save(bundle)


def _outputs(result: ReferenceResult) -> Iterator[tuple[str, Any]]:
    """By their names in a Golden."""
    yield "image_embeds", result.image_embeds
    yield "prompt_state", result.hidden_states[0]
    yield "seg_states", result.seg_states
    yield from ((name, getattr(result.sam2_features, name)) for name in SKETCHED["sam2_image_encoder"])
    yield from ((name, getattr(result.prediction, name)) for name in ("low_res_logits", "iou", "object_score"))


@contextlib.contextmanager
def _first_outputs(sam2: Any) -> Iterator[dict[str, _Array]]:
    """What SAM2's memory modules give when they first run in this block, by the outputs' names in a Golden."""
    found: dict[str, _Array] = {}

    def remembered(_module: object, _inputs: object, output: dict[str, Tensor]) -> None:
        found.setdefault("memory", _array(output["vision_features"]))

    def attended(_module: object, _inputs: object, output: Tensor) -> None:
        found.setdefault("conditioned_features", _array(output.permute(1, 2, 0)))  # [H * W, 1, C], which is [1, C, H, W] in the graph

    hooks = [sam2.memory_encoder.register_forward_hook(remembered), sam2.memory_attention.register_forward_hook(attended)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _half(logits: _Array, name: str) -> npt.NDArray[np.float16]:
    """As they are stored. Raises VesselError if they are too large for that."""
    with np.errstate(over="ignore"):
        half = logits.astype(np.float16)
    if not np.isfinite(half).all():
        raise VesselError(f"{name}: the reference's logits are up to {np.abs(logits).max():.3g}, beyond FP16; check --ckpt")
    return half


def _array(tensor: Any) -> _Array:
    array: _Array = tensor.float().cpu().numpy()
    return array

"""The whole pipeline on one page: an image and a question in, an answer and its masks out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.deployment import Deployment
from vessel_rt.errors import ImageError
from vessel_rt.generate import LanguageModel
from vessel_rt.image import mask_pixels, tile_pixels
from vessel_rt.masks import upsample
from vessel_rt.prompt import EmbedTokens, PromptTokenizer

__all__ = ["Mask", "Result", "Segmenter"]


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """One mask, [height, width] of the image, with SAM2's predicted IoU and its object score (a logit: above 0, something is there)."""

    pixels: npt.NDArray[np.bool_]
    iou: float
    object_score: float


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What came of one image. `masks` follow the order of [SEG] in the answer and may be none.

    `decode_steps` counts the runs of language_model after the first; `ms` has each stage's wall time in milliseconds.
    """

    answer: str
    token_ids: tuple[int, ...]
    decode_steps: int
    ms: dict[str, float]
    masks: tuple[Mask, ...]


class Segmenter:
    """A bundle, loaded and ready. A context manager: leaving it frees the graphs' memory.

    Args:
        deployment: what to run, and where.
        threads: CPU threads for one operator; 0 leaves the choice to ONNX Runtime.

    Raises:
        VesselError: a file of the bundle cannot be loaded.
    """

    def __init__(self, deployment: Deployment, threads: int = 0) -> None:
        self._bundle = bundle = deployment.bundle
        with ExitStack() as stack:
            self._tokenizer = PromptTokenizer(bundle)
            self._embed_tokens = stack.enter_context(EmbedTokens(bundle))
            self._sessions = {name: stack.enter_context(deployment.session(name, threads)) for name in bundle.stages}
            self._language_model = LanguageModel(self._sessions["language_model"], bundle, self._embed_tokens)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    def check_question(self, question: str) -> None:
        """Raise the VesselError that `segment` would raise for `question`."""
        self._tokenizer.encode(question)

    def segment(self, image: Image.Image, question: str) -> Result:
        """Answer `question` about `image` (RGB, as `read_image` gives it), and draw a mask for each [SEG] of the answer.

        Raises:
            VesselError: the question cannot be put into a prompt.
            ImageError: the image makes too long a prompt, or numbers that overflow the bundle's precision.
        """
        ms: dict[str, float] = {}
        with _timed(ms, "tiles"):
            tiles = tile_pixels(image, self._bundle.tiles, self._input_dtype("vision_encoder"))
        with _timed(ms, "vision_encoder"):
            image_embeds = self._sessions["vision_encoder"].run({"pixel_values": tiles})["image_embeds"]
        with _timed(ms, "language_model"):
            [generation] = self._language_model.generate([self._prompt(question, image_embeds)])
        return Result(
            answer=self._tokenizer.decode(generation.token_ids),
            token_ids=generation.token_ids,
            decode_steps=generation.decode_steps,
            masks=self._masks(image, generation.seg_states, ms) if len(generation.seg_states) else (),
            ms=ms,
        )

    def _prompt(self, question: str, image_embeds: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The prompt's embeddings [tokens, hidden_size]: the tiles' tokens [tiles, tokens_per_tile, hidden_size] between its texts'.

        They are joined on the host, whatever the device: ONNX Runtime copies whole values to a device, never into a part of one. A tile of
        the 8B model is 1.8 MB each way, less than a further graph, or two more runs of language_model, would cost.
        """
        before, after = (self._embed_tokens.rows(ids) for ids in self._tokenizer.encode(question))
        return np.concatenate([before, image_embeds.reshape(-1, image_embeds.shape[-1]), after])

    def _masks(self, image: Image.Image, seg_states: npt.NDArray[Any], ms: dict[str, float]) -> tuple[Mask, ...]:
        """A mask for each [SEG] state, from one run of each of SAM2's graphs; the features between them stay on the device."""
        with _timed(ms, "square"):
            square = mask_pixels(image, self._bundle.mask, self._input_dtype("sam2_image_encoder"))
        with _timed(ms, "sam2_image_encoder"):
            encoder = self._sessions["sam2_image_encoder"]
            features = encoder.run({"pixel_values": square}, keep=("fpn_0", "fpn_1", "image_features"))
        with _timed(ms, "sam2_mask_decoder"):
            image_index = np.zeros(len(seg_states), np.int64)
            decoded = self._sessions["sam2_mask_decoder"].run({**features, "seg_states": seg_states, "image_index": image_index})
        if not all(np.isfinite(output).all() for output in decoded.values()):
            raise ImageError(f"its masks are not finite in {self._bundle.precision}; export the bundle with --precision fp32")
        with _timed(ms, "upsample"):
            logits = upsample(decoded["low_res_logits"], self._bundle.mask.size, image.width, image.height)
            pixels = logits > 0  # sigmoid above one half
        scores = zip(pixels, decoded["iou"], decoded["object_score"], strict=True)
        return tuple(Mask(mask, float(iou), float(object_score)) for mask, iou, object_score in scores)

    def _input_dtype(self, stage: str) -> np.dtype[Any]:
        return self._bundle.stages[stage].input_dtype("pixel_values")


@contextmanager
def _timed(ms: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    ms[stage] = (time.perf_counter() - began) * 1e3

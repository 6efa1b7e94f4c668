"""The whole pipeline on one page: images and questions in, answers and their masks out.

An image goes through three steps: `prepare` makes its pixels, `run` takes a batch through the graphs, `finish` makes its masks.
All may be called from several threads at the same time. Does not know about image files or output folders.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.device.deployment import Deployment
from vessel_rt.errors import DeviceError, GraphError, ImageError, OutOfMemory
from vessel_rt.formats.profiles import CPU_TILES, CPU_TOKENS, MASKS_AN_IMAGE
from vessel_rt.model.decoding import Generation, LanguageModel
from vessel_rt.model.postprocess import upsample
from vessel_rt.model.preprocess import mask_pixels, tile_pixels
from vessel_rt.model.prompt import EmbedTokens, PromptTokenizer
from vessel_rt.model.result import Answer, Mask, Pixels, Result

if TYPE_CHECKING:
    from onnxruntime import OrtValue

__all__ = ["Segmenter", "timed"]


T = TypeVar("T")
_Logits = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]  # low-res logits, IoUs and object scores of some masks


class Segmenter:
    """A bundle, loaded and ready. A context manager: leaving it frees the graphs' memory.

    Args:
        deployment: what to run, and where.
        threads: CPU threads for one operator; 0 leaves the choice to ONNX Runtime.
        draft: run the expected answer together with the prompt; the answers are the same without it. It is found once per question, on a
            gray image.

    Raises:
        VesselError: a file of the bundle cannot be loaded, or was changed since it was hashed.
    """

    def __init__(self, deployment: Deployment, threads: int = 0, *, draft: bool = True) -> None:
        self._bundle = bundle = deployment.bundle
        with ExitStack() as stack:
            self._verify_unchanged = stack.enter_context(deployment.guarded())
            self._tokenizer = PromptTokenizer(bundle)
            self._embed_tokens = stack.enter_context(EmbedTokens(bundle))
            self._sessions = {name: stack.enter_context(session) for name, session in deployment.sessions(threads).items()}
            self._language_model = LanguageModel(
                self._sessions["language_model"], bundle, self._embed_tokens, CPU_TOKENS if deployment.device.kind == "cpu" else None
            )
            # A GPU can run SAM2's encoder at the same time as the language model; on a CPU one of them keeps all cores busy.
            overlaps = deployment.device.kind != "cpu"
            self._thread = stack.enter_context(ThreadPoolExecutor(1, "sam2_image_encoder")) if overlaps else None
            self._verify_unchanged()
            self._stack = stack.pop_all()
        self._texts: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}
        self._first_draft = self._tokenizer.encode_answer(bundle.prompt.answers[0]) if draft and bundle.prompt.answers else None
        self._drafts: dict[str, Sequence[int]] = {}
        self._rehearsing, self._probing = threading.Lock(), threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    def prepare_question(self, question: str) -> None:
        """Get `question` ready: make its embeddings, and run the language model once, on a gray image, for its draft.

        Raises:
            VesselError: as `segment`.
        """
        self._around(question)
        self._draft(question)

    def segment(self, image: Image.Image, question: str) -> Result:
        """Answer `question` about `image` (RGB, as from `read_image`), and make a mask for each [SEG] of the answer.

        Raises:
            VesselError: the question is empty or contains an image token.
            ImageError: the image's prompt is too long, or its numbers overflow the bundle's precision.
        """
        pixels = self.prepare(image)
        [[answer]] = self.run([pixels], [question])
        return self.finish(pixels, answer)

    def prepare(self, image: Image.Image) -> Pixels:
        """The inputs of the graphs for `image`."""
        ms: dict[str, float] = {}
        with timed(ms, "tiles"):
            tiles = tile_pixels(image, self._bundle.tiles, self._input_dtype("vision_encoder"))
        with timed(ms, "square"):
            square = mask_pixels(image, self._bundle.mask, self._input_dtype("sam2_image_encoder"))
        return Pixels(image.width, image.height, tiles, square, ms)

    def run(self, batch: Sequence[Pixels], questions: Sequence[str]) -> list[list[Answer]]:
        """Every question about every image of `batch`: for each image, its answers in order. Each image is encoded once.

        Raises:
            VesselError: a question is empty or contains an image token.
            ImageError: the prompt of an image is too long, or its numbers overflow the bundle's precision.
            OutOfMemory: the device has no memory for so many images.
            DeviceError: the device also fails on a gray image.
            BundleError: a file of the bundle was changed, so neither answers nor other errors can be trusted.
        """
        return self._carefully(questions[0], lambda: self._run(batch, questions), retried=len(batch) > 1)

    def _carefully(self, question: str, work: Callable[[], T], *, retried: bool = False) -> T:
        """The result of `work`, which runs graphs. If one fails, a run on a gray image tells whether the device is at fault, unless memory
        ran out and it is `retried` with fewer images. Raises as `run`."""
        self._verify_unchanged()
        try:
            return work()
        except (GraphError, OutOfMemory) as e:  # not probed here: the error keeps device memory alive
            short, text = isinstance(e, OutOfMemory), str(e)
        finally:
            self._verify_unchanged()
        if short and retried:
            raise OutOfMemory(text)
        self._probe(question, text)
        raise OutOfMemory(text) if short else ImageError(text)

    def _run(self, batch: Sequence[Pixels], questions: Sequence[str]) -> list[list[Answer]]:
        """As `run`, but raises GraphError when a graph fails, whatever the reason."""
        ms: dict[str, float] = {}
        encoding = self._thread.submit(self._encode, batch, ms) if self._thread else None
        try:
            try:
                generations = self._generate(batch, questions, ms)
            finally:
                wait([encoding] if encoding else [])  # it uses what this call holds
            features = encoding.result() if encoding else None
        finally:
            encoding = None  # its error and this frame would keep each other alive, and with them memory that a smaller batch needs
        decoded = self._decode(batch, generations, features, ms)
        share = {step: value / len(batch) for step, value in ms.items()}
        return [
            [
                Answer(question, generation, *logits, len(batch), share)
                for question, generation, logits in zip(questions, of_image, of_masks, strict=True)
            ]
            for of_image, of_masks in zip(generations, decoded, strict=True)
        ]

    def finish(self, pixels: Pixels, answer: Answer) -> Result:
        """The answer as text, and its masks at the image's size."""
        ms = {**pixels.ms, **answer.ms}
        with timed(ms, "upsample"):
            masks = upsample(answer.low_res_logits, self._bundle.mask.size, pixels.width, pixels.height) > 0  # sigmoid above 0.5
        generation, scores = answer.generation, zip(masks, answer.iou, answer.object_score, strict=True)
        return Result(
            question=answer.question,
            answer=self._tokenizer.decode(generation.token_ids),
            token_ids=generation.token_ids,
            drafted=generation.drafted,
            accepted=generation.accepted,
            decode_steps=generation.decode_steps,
            images=answer.images,
            ms=ms,
            masks=tuple(Mask(mask, float(iou), float(object_score)) for mask, iou, object_score in scores),
        )

    def _generate(self, batch: Sequence[Pixels], questions: Sequence[str], ms: dict[str, float]) -> list[list[Generation]]:
        """The answers, by image and question. The language model takes as many prompts at once as there are images."""
        with timed(ms, "vision_encoder"):
            tiles = np.concatenate([pixels.tiles for pixels in batch]) if len(batch) > 1 else batch[0].tiles
            image_embeds = self._embed(tiles)
        ends = np.cumsum([len(pixels.tiles) for pixels in batch])
        of_images = np.split(image_embeds.reshape(len(tiles), -1, image_embeds.shape[-1]), ends[:-1])
        generations: list[list[Generation]] = [[] for _ in batch]
        with timed(ms, "language_model"):
            for question in questions:
                draft = self._draft(question)
                prompts = [self._prompt(question, embeds) for embeds in of_images]
                for answers, generation in zip(generations, self._language_model.generate(prompts, [draft] * len(prompts)), strict=True):
                    answers.append(generation)
        return generations

    def _embed(self, tiles: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The embeddings [tiles, tokens_per_tile, hidden_size] of tiles."""
        most = len(tiles) if self._thread else CPU_TILES
        runs = [{"pixel_values": tiles[start : start + most]} for start in range(0, len(tiles), most)]
        embeds = [self._sessions["vision_encoder"].run(feeds)["image_embeds"] for feeds in runs]
        return np.concatenate(embeds) if len(embeds) > 1 else embeds[0]

    def _draft(self, question: str) -> Sequence[int]:
        """The expected answer: what the model answers to this question for a gray image. It is computed once.

        Not the last image's answer: then the rounding of a result would depend on which image came before, and in which process.
        """
        if self._first_draft is None:
            return ()
        with self._rehearsing:
            if question not in self._drafts:
                self._drafts[question] = self._rehearsed(question, self._first_draft)
            return self._drafts[question]

    def _rehearsed(self, question: str, draft: Sequence[int]) -> Sequence[int]:
        """The model's answer for a gray image, generated with `draft`; `draft` itself if that answer has no mask."""
        try:
            [generation] = self._language_model.generate([self._prompt(question, self._embed(self._gray().tiles))], [draft])
        except ImageError:  # images will fail in the same way, and their errors say so
            return draft
        return generation.token_ids if len(generation.seg_states) else draft

    def _probe(self, question: str, failure: str) -> None:
        """Run every graph on a gray image after a `failure`. Raises DeviceError if the device fails on it too."""
        gray = self._gray()
        states = np.zeros((1, self._bundle.language_model.hidden_size), self._bundle.stages["sam2_mask_decoder"].input_dtype("seg_states"))
        try:
            with self._probing:
                features = self._encode([gray], {})
                self._sessions["sam2_mask_decoder"].run({**features, "seg_states": states, "image_index": np.zeros(1, np.int64)})
                self._language_model.generate([self._prompt(question, self._embed(gray.tiles))])
        except (GraphError, OutOfMemory) as e:
            raise DeviceError(f"{failure}; then on a gray image: {e}; so the device is at fault; finished results are kept") from e
        except ImageError:
            pass  # the model cannot take a gray image, but the device ran it

    def _gray(self) -> Pixels:
        return self.prepare(Image.new("RGB", (self._bundle.tiles.size,) * 2, (128, 128, 128)))

    def _prompt(self, question: str, image_embeds: npt.NDArray[Any], images: int = 1) -> npt.NDArray[Any]:
        """The prompt's embeddings [tokens, hidden_size]: the tiles' tokens [tiles, tokens_per_tile, hidden_size], of `images` with as many
        tiles each, between its texts'.

        They are joined on the host, whatever the device: ONNX Runtime copies only whole values to a device. A tile of the 8B model is
        1.8 MB each way, which costs less than another graph or two more runs of language_model.
        """
        before, after = self._around(question)
        first, *others = np.split(image_embeds.reshape(-1, image_embeds.shape[-1]), images)
        between = self._embed_tokens.rows(self._tokenizer.encode_separator()) if others else None
        return np.concatenate([before, first, *(part for embeds in others for part in (between, embeds)), after])

    def _around(self, question: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The embeddings before and after those of the images, computed once per question."""
        if question not in self._texts:
            before, after = (self._embed_tokens.rows(ids) for ids in self._tokenizer.encode(question))
            self._texts[question] = before, after
        return self._texts[question]

    def _encode(self, batch: Sequence[Pixels], ms: dict[str, float]) -> Mapping[str, OrtValue]:
        """SAM2's features of every image, which stay on the device."""
        with timed(ms, "sam2_image_encoder"):
            squares = np.concatenate([pixels.square for pixels in batch]) if len(batch) > 1 else batch[0].square
            return self._sessions["sam2_image_encoder"].run({"pixel_values": squares}, keep=("fpn_0", "fpn_1", "image_features"))

    def _decode(
        self,
        batch: Sequence[Pixels],
        generations: Sequence[Sequence[Generation]],
        features: Mapping[str, OrtValue] | None,
        ms: dict[str, float],
    ) -> list[list[_Logits]]:
        """Low-res logits, IoUs and object scores of the masks, by image and question, from the [SEG] states.

        `features` are SAM2's, of every image; without them its encoder runs now, on the images that have a mask.
        """
        states = [[generation.seg_states for generation in of_image] for of_image in generations]
        encoded = [i for i, of_image in enumerate(states) if features or any(map(len, of_image))]
        seg_states = np.concatenate([state for of_image in states for state in of_image])
        image_index = np.array([encoded.index(i) for i, of_image in enumerate(states) for state in of_image for _ in state], np.int64)
        side = self._bundle.mask.low_res_size
        parts = [(np.empty((0, side, side), np.float32), np.empty(0, np.float32), np.empty(0, np.float32))]
        if len(seg_states):
            features = features or self._encode([batch[i] for i in encoded], ms)
            with timed(ms, "sam2_mask_decoder"):
                most = MASKS_AN_IMAGE * len(encoded)  # the number that engines are built for and memory is planned for
                for start in range(0, len(seg_states), most):
                    some = slice(start, start + most)
                    feeds = {**features, "seg_states": seg_states[some], "image_index": image_index[some]}
                    outputs = self._sessions["sam2_mask_decoder"].run(feeds)
                    parts.append((outputs["low_res_logits"], outputs["iou"], outputs["object_score"]))
        whole = [np.concatenate(output) for output in zip(*parts, strict=True)]
        if not all(np.isfinite(output).all() for output in whole):
            raise ImageError(f"its masks are not finite in {self._bundle.precision}; export the bundle with --precision fp32")
        ends = np.cumsum([len(state) for of_image in states for state in of_image])
        each = zip(*(np.split(output, ends[:-1]) for output in whole), strict=True)
        return [list(itertools.islice(each, len(of_image))) for of_image in states]

    def _input_dtype(self, stage: str) -> np.dtype[Any]:
        return self._bundle.stages[stage].input_dtype("pixel_values")


@contextmanager
def timed(ms: dict[str, float], step: str) -> Iterator[None]:
    """Add the milliseconds of a block to those of its step."""
    began = time.perf_counter()
    yield
    ms[step] = ms.get(step, 0.0) + (time.perf_counter() - began) * 1e3

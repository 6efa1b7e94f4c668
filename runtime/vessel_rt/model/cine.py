"""Cines: the objects of an answer, tracked through the frames of an angiographic sequence by SAM2's memory.

`condition` makes the masks and memories of frames from [SEG] states, `propagate` tracks the objects from any set of such conditioning
frames, in either direction. Two ways through a cine are made of them:

- `run_cine` is the video path of Sa2VA's own inference (projects/sa2va/hf/models/modeling_sa2va_chat.py, `predict_forward`): the language
  model sees the first frames, one tile each; every [SEG] state prompts each of these frames; the frames after them are tracked forward.
- `run_from` asks about each of some chosen frames as about an image, and tracks backward and forward from them.

docs/cines.md has the facts. Does not know about files or runs, nor how frames are chosen.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from vessel_rt.device.deployment import Deployment
from vessel_rt.errors import ImageError, VesselError
from vessel_rt.formats.profiles import MOST_CONDITIONING, keeps_cores_busy
from vessel_rt.model.decoding import Generation
from vessel_rt.model.memory import Memory, MemoryBank
from vessel_rt.model.preprocess import mask_pixels, tile_pixels
from vessel_rt.model.result import Answer, Pixels, Result
from vessel_rt.model.segmenter import Segmenter, timed

if TYPE_CHECKING:
    from onnxruntime import OrtValue

__all__ = ["CineSegmenter", "PlacedFrames", "Tracked"]

_PREDICTION = ("low_res_logits", "iou", "object_score")
_NO_OBJECT = -1024.0  # logit of an object that is not there: NO_OBJ_SCORE of sam2

# The frames of a cine at these places, in this order, each prepared by the function; a frame that cannot be read is left out.
PlacedFrames: TypeAlias = Callable[[Sequence[int], Callable[[Image.Image], Pixels]], Iterable[tuple[int, Pixels]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Tracked:
    """The masks of objects on one frame, and its memories.

    `prediction` has low_res_logits [objects, side, side], iou [objects] and object_score [objects]; `memories` one of each object; `ms` the
    time of each step.
    """

    prediction: Mapping[str, npt.NDArray[np.float32]]
    memories: tuple[Memory, ...]
    ms: dict[str, float]


_Encoded: TypeAlias = tuple[int, Pixels, Mapping[str, "OrtValue"], dict[str, float]]  # place, frame, features, and the time of each step
_Followed: TypeAlias = tuple[int, Pixels, Tracked]  # a tracked frame: its place, the frame, and the objects on it


class CineSegmenter(Segmenter):
    """A Segmenter with the graphs of cines.

    Raises:
        VesselError: as Segmenter; or the bundle has no graphs for cines.
    """

    def __init__(self, deployment: Deployment, threads: int = 0, *, draft: bool = True) -> None:
        self._cine = deployment.bundle.require_cine()
        super().__init__(deployment, threads, draft=draft)
        with ExitStack() as stack:
            stack.callback(self._stack.close)
            for name in self._cine.stages:
                self._sessions[name] = stack.enter_context(deployment.session(name, threads))
            self._verify_unchanged()
            self._stack = stack.pop_all()
        # A frame of a large model keeps all cores busy, and the activations of two stages at the same time take a gigabyte more.
        self._encodes_ahead = deployment.device.kind != "cpu" or not keeps_cores_busy(deployment.bundle)

    def segment_cine(self, frames: Iterable[Image.Image], question: str) -> Iterator[Result]:
        """Answer `question` about a cine as Sa2VA does: the answer, and the masks of each frame, in order.

        Frames (RGB, as from `read_image`) are read as they are needed, or one ahead; at most as many as the language model sees are in
        memory.

        Raises:
            VesselError: the question is empty or contains an image token, or there is no frame.
            ImageError: the numbers of a frame overflow the bundle's precision.
        """
        prepared = (self.prepare_frame(frame, place) for place, frame in enumerate(frames))
        yield from (result for [result] in self.run_cine(prepared, [question]))

    def prepare_frame(self, image: Image.Image, place: int) -> Pixels:
        """The inputs of the graphs for frame `place` of a cine, for `run_cine`: a tile only if the language model sees it."""
        if place >= self._cine.prompted_frames:
            return self.prepare_tracked(image)
        ms: dict[str, float] = {}
        with timed(ms, "tiles"):
            spec = msgspec.structs.replace(self._bundle.tiles, min_tiles=1, max_tiles=1)
            tiles = tile_pixels(image, spec, self._input_dtype("vision_encoder"))
        return dataclasses.replace(self.prepare_tracked(image, ms), tiles=tiles)

    def prepare_tracked(self, image: Image.Image, ms: dict[str, float] | None = None) -> Pixels:
        """The inputs of the graphs for a frame that the language model does not see; `ms` is the time that was spent on it before."""
        ms, size = {} if ms is None else ms, self._bundle.tiles.size
        tiles = np.empty((0, 3, size, size), self._input_dtype("vision_encoder"))
        with timed(ms, "square"):
            square = mask_pixels(image, self._bundle.mask, self._input_dtype("sam2_image_encoder"))
        return Pixels(image.width, image.height, tiles, square, ms)

    def run_cine(self, frames: Iterable[Pixels], questions: Sequence[str]) -> Iterator[list[Result]]:
        """As `segment_cine`, with several questions and prepared frames: for each frame, a result for each question.

        Raises:
            VesselError, ImageError: as `segment_cine`.
            OutOfMemory: the device has no memory for a frame.
            DeviceError: the device also fails on a gray image.
            BundleError: a file of the bundle was changed.
        """
        going = iter(frames)
        prompted = list(itertools.islice(going, self._cine.prompted_frames))
        if not prompted:
            raise VesselError("a cine without frames")
        generations, ms = self._carefully(questions[0], lambda: self.ask(prompted, questions))
        states = np.concatenate([generation.seg_states for generation in generations])
        conditioning: list[dict[int, Memory]] = [{} for _ in states]
        places = tuple(range(len(prompted)))
        for place in places:
            pixels, prompted[place] = prompted[place], prompted[place].spent()
            found = self._conditioned(questions[0], place, pixels, states, conditioning)
            share = {step: value / len(places) for step, value in ms.items()}
            yield self._results(pixels, questions, generations, found, share, None)
        tracked = self.propagate(conditioning, enumerate(going, start=len(places)))
        for _, pixels, found in self._each(questions[0], tracked):
            yield self._results(pixels, questions, generations, found, {}, places)

    def run_from(
        self, chosen: Sequence[int], places: Sequence[int], frames: PlacedFrames, questions: Sequence[str]
    ) -> Iterator[tuple[int, list[Result]]]:
        """Ask about each of the `chosen` frames by itself, as `run` does about an image, and track their objects through the others.

        The frames between and after the chosen ones are tracked forward from the first of them, those before it backward. Where SAM2 finds
        that an object is not on a tracked frame (its score is not above 0), its mask is empty, and so it is remembered; not so if the score
        denies a mask on a chosen frame, too, since then it says nothing. A chosen frame whose answers have other numbers of [SEG] than the
        best one's is tracked like the others. Tracked frames have the best one's answer.

        Args:
            chosen: places of frames in the cine, the best first.
            places: of all frames to segment, in order of time; the chosen ones among them.
            frames: gets frames.
            questions: each is asked about each chosen frame.

        Yields:
            The place of a frame, and a result for each question: first the chosen frames, then those before the first of them, in reverse,
            then the others in order.

        Raises:
            VesselError, ImageError, OutOfMemory, DeviceError, BundleError: as `run_cine`; ImageError also if no chosen frame can be read.
        """
        asked: list[int] = []
        best: list[Generation] = []
        conditioning: list[dict[int, Memory]] = []
        denied: set[int] = set()
        for place, pixels in frames(chosen, self.prepare):
            ms: dict[str, float] = {}
            [generations] = self._carefully(questions[0], functools.partial(self._generate, [pixels], questions, ms))
            if not best:
                best, conditioning = generations, [{} for generation in generations for _ in generation.seg_states]
            if [len(one.seg_states) for one in generations] != [len(one.seg_states) for one in best]:
                continue
            states = np.concatenate([generation.seg_states for generation in generations])
            found = self._conditioned(questions[0], place, pixels, states, conditioning)
            asked.append(place)
            denied.update(np.flatnonzero(_absent(found.prediction) & (found.prediction["low_res_logits"] > 0).any(axis=(1, 2))))
            yield place, self._results(pixels, questions, generations, found, ms, None)
        if not asked:
            raise ImageError("none of the frames to ask about can be read")
        first, origins = min(asked), tuple(sorted(asked))
        before = [place for place in reversed(places) if place < first]
        after = [place for place in places if place > first and place not in asked]
        hide = set(range(len(conditioning))) - denied
        for order, reverse in ((before, True), (after, False)):
            tracked = self.propagate(conditioning, frames(order, self.prepare_tracked), reverse=reverse, hide=hide)
            for place, pixels, found in self._each(questions[0], tracked):
                yield place, self._results(pixels, questions, best, found, {}, origins)

    def _conditioned(
        self, question: str, place: int, pixels: Pixels, states: npt.NDArray[Any], conditioning: Sequence[dict[int, Memory]]
    ) -> Tracked:
        """The objects on the frame at `place`, as `condition`; their memories are added to `conditioning`. Raises as `run`."""
        found = self._carefully(question, lambda: self.condition(pixels, states))
        for of_object, memory in zip(conditioning, found.memories, strict=True):
            of_object[place] = memory
        return found

    def _each(self, question: str, tracked: Iterator[_Followed]) -> Iterator[_Followed]:
        """What `propagate` yields. Raises as `run`."""
        while following := self._carefully(question, lambda: next(tracked, None)):
            yield following

    def ask(self, prompted: Sequence[Pixels], questions: Sequence[str]) -> tuple[list[Generation], dict[str, float]]:
        """The answer to each question about `prompted`, the frames that the language model sees, and the time of each step."""
        ms: dict[str, float] = {}
        with timed(ms, "vision_encoder"):
            embeds = self._embed(np.concatenate([pixels.tiles for pixels in prompted]))
        with timed(ms, "language_model"):
            generations = [
                self._language_model.generate([self._prompt(question, embeds, images=len(prompted))], [self._draft(question)])[0]
                for question in questions
            ]
        return generations, ms

    def condition(self, pixels: Pixels, seg_states: npt.NDArray[Any]) -> Tracked:
        """The masks of the objects on a frame that their [SEG] states [objects, hidden_size] prompt, and their memories."""
        ms: dict[str, float] = {}
        if not len(seg_states):
            return self._tracked([], [], ms)
        features = self._encode([pixels], ms)
        predictions, memories = [], []
        for state in seg_states:
            with timed(ms, "sam2_mask_decoder"):
                feeds = {**features, "seg_states": state[None], "image_index": np.zeros(1, np.int64)}
                predictions.append(self._sessions["sam2_mask_decoder"].run(feeds))
            memories.append(self._remembered(features, predictions[-1], ms))
        return self._tracked(predictions, memories, ms)

    def propagate(
        self,
        conditioning: Sequence[Mapping[int, Memory]],
        frames: Iterable[tuple[int, Pixels]],
        *,
        reverse: bool = False,
        hide: Collection[int] = (),
    ) -> Iterator[_Followed]:
        """Track objects through `frames`.

        Args:
            conditioning: for each object the memories of its conditioning frames, by place in the cine: the same places for each object.
            frames: the frames to track, each with its place in the cine, in the order of tracking; without the conditioning frames.
            reverse: whether places decrease. A pass in one direction knows nothing of a pass in the other.
            hide: the objects, by number, that have an empty mask on a frame, and in its memory, where their score is not above 0, as in
                sam2; Sa2VA's copy of sam2 ignores the score.

        Yields:
            The place, the frame, and the objects on it, as soon as it is tracked; the next frame may already be read and encoded.

        Raises:
            VesselError: more conditioning frames than the device's graphs take.
            ImageError: a frame's numbers overflow the bundle's precision.
        """
        if any(len(of_object) > MOST_CONDITIONING for of_object in conditioning):
            raise VesselError(f"an object is tracked from at most {MOST_CONDITIONING} conditioning frames")
        banks = [MemoryBank(self._cine, of_object, reverse=reverse) for of_object in conditioning]
        for place, pixels, features, ms in self._encoded(frames) if banks else ((*placed, {}, {}) for placed in frames):
            predictions, memories = [], []
            for number, bank in enumerate(banks):
                with timed(ms, "sam2_memory_attention"):
                    feeds = {"image_features": features["image_features"], **bank.feeds(place)}
                    conditioned = self._sessions["sam2_memory_attention"].run(feeds, keep=("conditioned_features",))
                with timed(ms, "sam2_tracking_decoder"):
                    fine = {name: features[name] for name in ("fpn_0", "fpn_1")}
                    prediction = self._sessions["sam2_tracking_decoder"].run(fine | conditioned)
                predictions.append(_hidden(prediction) if number in hide else prediction)
                memories.append(self._remembered(features, predictions[-1], ms))
                bank.add(place, memories[-1])
            yield place, pixels, self._tracked(predictions, memories, ms)

    def _encoded(self, frames: Iterable[tuple[int, Pixels]]) -> Iterator[_Encoded]:
        """Each frame with SAM2's features and the time that they took; the next one is encoded meanwhile, if that is faster."""
        going = iter(frames)

        def encode() -> _Encoded | None:
            ms: dict[str, float] = {}
            found = next(going, None)
            return found and (*found, self._encode([found[1]], ms), ms)

        if not self._encodes_ahead:
            yield from iter(encode, None)
            return
        with ThreadPoolExecutor(1, "sam2_image_encoder") as thread:
            encoding = thread.submit(encode)
            while (encoded := encoding.result()) is not None:
                encoding = thread.submit(encode)
                yield encoded

    def _remembered(self, features: Mapping[str, OrtValue], prediction: Mapping[str, npt.NDArray[Any]], ms: dict[str, float]) -> Memory:
        """The memory of one object, in the types of sam2_memory_attention."""
        attention = self._cine.stages["sam2_memory_attention"]
        with timed(ms, "sam2_memory_encoder"):
            feeds = {"image_features": features["image_features"], "low_res_logits": prediction["low_res_logits"]}
            memory = self._sessions["sam2_memory_encoder"].run(feeds)["memory"]
        pointer = prediction["object_pointer"].astype(attention.input_dtype("object_pointers"))
        memory = memory.astype(attention.input_dtype("memories"))
        if not (np.isfinite(memory).all() and np.isfinite(pointer).all()):
            raise ImageError(f"its memory is not finite in {self._bundle.precision}; export the bundle with --precision fp32")
        return Memory(memory, pointer)

    def _tracked(self, predictions: Sequence[Mapping[str, npt.NDArray[Any]]], memories: Sequence[Memory], ms: dict[str, float]) -> Tracked:
        side = self._bundle.mask.low_res_size
        none = {name: np.empty((0, side, side) if name == "low_res_logits" else 0, np.float32) for name in _PREDICTION}
        prediction = {name: np.concatenate([empty, *(each[name] for each in predictions)]) for name, empty in none.items()}
        if not all(np.isfinite(array).all() for array in prediction.values()):
            raise ImageError(f"its masks are not finite in {self._bundle.precision}; export the bundle with --precision fp32")
        return Tracked(prediction, tuple(memories), ms)

    def _results(
        self,
        pixels: Pixels,
        questions: Sequence[str],
        generations: Sequence[Generation],
        found: Tracked,
        ms: Mapping[str, float],
        propagated_from: tuple[int, ...] | None,
    ) -> list[Result]:
        """A result for each question: its objects are those of its generation, in order."""
        ends = np.cumsum([len(generation.seg_states) for generation in generations])[:-1]
        parts = zip(*(np.split(found.prediction[name], ends) for name in _PREDICTION), strict=True)
        answers = [
            Answer(question, generation, logits, iou, object_score, 1, {**ms, **found.ms})
            for question, generation, (logits, iou, object_score) in zip(questions, generations, parts, strict=True)
        ]
        return [dataclasses.replace(self.finish(pixels, answer), propagated_from=propagated_from) for answer in answers]


def _hidden(prediction: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """`prediction` with an empty mask for each object that is not there."""
    absent = _absent(prediction)[:, None, None]
    return {**prediction, "low_res_logits": np.where(absent, np.float32(_NO_OBJECT), prediction["low_res_logits"])}


def _absent(prediction: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.bool_]:
    """Which objects are not on the frame, by their scores [objects]."""
    return prediction["object_score"] <= 0

"""The Python API: a bundle loaded once, images in, results out. Users import it as `vessel_rt`; docs/api.md describes it.

The images take the same way as those of `vessel-rt infer`; nothing of a run's folder is known here.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

import numpy as np
from PIL import Image

from vessel_rt.api.arguments import TAKEN, ImageLike, as_count, as_number, as_path, as_picture, as_rescale, type_of
from vessel_rt.api.result import Result, place_of
from vessel_rt.device.deployment import Deployment, deploy
from vessel_rt.device.providers import Device
from vessel_rt.errors import ImageError, VesselError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs import frames
from vessel_rt.inputs.frames import Frame, input_hasher, read_frame
from vessel_rt.inputs.images import Rescale, rgb_image
from vessel_rt.inputs.pseudonyms import printable
from vessel_rt.model import result as model_result
from vessel_rt.model.result import Answer, Pixels
from vessel_rt.model.segmenter import Segmenter
from vessel_rt.run.pipeline import Picture, Pipeline

__all__ = ["Model", "frame_count", "load"]


class Model:
    """A loaded bundle, made by `load`. A context manager: leaving it, or `close`, frees its memory.

    May be shared by threads: one batch runs at a time, others wait; reading images and making masks go on meanwhile.
    """

    def __init__(self, deployment: Deployment, threads: int, *, draft: bool) -> None:
        self._deployment, self._segmenter = deployment, _SharedSegmenter(deployment, threads, draft=draft)

    @property
    def device(self) -> str:
        """Where it runs: `cpu`, or such as `cuda:0`."""
        return str(self._deployment.device)

    @property
    def default_question(self) -> str:
        """What is asked where no question is given."""
        return self._deployment.bundle.prompt.default_question

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the batch that runs now, then free the memory. Whatever is asked of the model later is a VesselError."""
        self._segmenter.close()

    def segment(
        self,
        image: ImageLike,
        question: str | None = None,
        *,
        frame: int | None = None,
        rescale: bool | tuple[float, float] = False,
    ) -> Result:
        """Segment one image.

        Args:
            image: a file (JPG, PNG, TIFF, BMP, DICOM), a PIL image of any mode, or an array of uint8 [H, W] or [H, W, 3] (RGB).
            question: None asks the bundle's own.
            frame: which frame of a DICOM cine, or page of a TIFF, from 0. A file with several needs it.
            rescale: how gray of more than 8 bits becomes 8: False refuses it, True scales the file's own range, (low, high) a window.

        Raises:
            ImageError: the image cannot be read, is none of these, or makes too long a prompt.
            OutOfMemory: the device has no room for it.
            BundleError: a file of the bundle was changed since it was loaded.
            DeviceError: the device fails.
            VesselError: a bad argument, or a closed model.
        """
        scale = as_rescale(rescale)
        [outcome] = self._pipeline(question, scale, batch=1).run([_input(image, frame, 0, "image", scale)])
        if isinstance(outcome, ImageError):
            raise outcome
        return outcome

    @overload
    def segment_many(
        self,
        images: Iterable[ImageLike | tuple[str | os.PathLike[str], int]],
        question: str | None = None,
        *,
        batch: int | None = None,
        rescale: bool | tuple[float, float] = False,
        on_error: Literal["raise"] = "raise",
    ) -> Iterator[Result]: ...

    @overload
    def segment_many(
        self,
        images: Iterable[ImageLike | tuple[str | os.PathLike[str], int]],
        question: str | None = None,
        *,
        batch: int | None = None,
        rescale: bool | tuple[float, float] = False,
        on_error: Literal["return"],
    ) -> Iterator[Result | ImageError]: ...

    def segment_many(
        self,
        images: Iterable[ImageLike | tuple[str | os.PathLike[str], int]],
        question: str | None = None,
        *,
        batch: int | None = None,
        rescale: bool | tuple[float, float] = False,
        on_error: Literal["raise", "return"] = "raise",
    ) -> Iterator[Result | ImageError]:
        """Segment images one after another: one result for each, in their order. Images are read a few ahead of the results.

        Args:
            images: as for `segment`, or (path, frame) pairs for frames of a cine.
            question: None asks the bundle's own.
            batch: images that run at once; None is the number that `load` found or was given. Halved where memory does not suffice.
            rescale: as for `segment`.
            on_error: an image that fails raises its ImageError after the results before it ("raise"), or gives the error in place of
                its result, and the others go on ("return"). Errors of other kinds are always raised.

        Raises:
            VesselError: as `segment`. Bad arguments are found at once, the rest when the results are iterated.
        """
        if isinstance(images, str | os.PathLike | Image.Image | np.ndarray) or not isinstance(images, Iterable):
            raise VesselError(f"images is {type_of(images)}: give a list or another iterable of images; segment() takes a single one")
        if on_error not in ("raise", "return"):
            raise VesselError(f"on_error is {on_error!r}: give 'raise' or 'return'")
        size, most, scale = as_count("batch", batch) or self._deployment.batch, self._deployment.max_batch, as_rescale(rescale)
        if most and size > most:
            raise VesselError(f"batch is {size}: on {self.device} this model takes up to {most} images at once; give batch to load()")
        items = (_item(image, index, scale) for index, image in enumerate(images))
        return _outcomes(self._pipeline(question, scale, batch=size), items, raising=on_error == "raise")

    def _pipeline(self, question: Any, rescale: Rescale | None, batch: int) -> Pipeline[_Input, Result | ImageError]:
        if not isinstance(question, str | None):
            raise VesselError(f"question is {type_of(question)}: give a str, or None for the bundle's own")
        asked, sha256 = self.default_question if question is None else question, input_hasher()
        self._segmenter.prepare_question(asked)

        def read(item: _Input) -> Picture:
            if item.error:
                raise item.error
            if item.image:
                return Picture(item.image, None)
            path, number = item.place.path, item.place.number
            digest = sha256(path)
            if number is None and (count := frames.frame_count(path)):
                raise ImageError(f"{count} frames; give one as frame=0 to frame={count - 1}, or (path, frame) pairs to segment_many")
            return Picture(read_frame(item.place, rescale), digest)

        return Pipeline(self._segmenter, (asked,), read=read, finish=_result, fail=_named, batch=batch)


class _SharedSegmenter(Segmenter):
    """A Segmenter for several threads: batches run one at a time, and none after it was closed."""

    def __init__(self, deployment: Deployment, threads: int, *, draft: bool) -> None:
        self._lock, self._closed = threading.Lock(), False
        super().__init__(deployment, threads, draft=draft)

    def prepare_question(self, question: str) -> None:
        with self._turn():
            super().prepare_question(question)

    def run(self, batch: Sequence[Pixels], questions: Sequence[str]) -> list[list[Answer]]:
        with self._turn():
            return super().run(batch, questions)

    def close(self) -> None:
        """Once no batch runs; again is no error."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._stack.close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise VesselError("this model is closed: load() the bundle again")
            yield


@dataclasses.dataclass(frozen=True, eq=False)
class _Input:
    """An image on its way: a file at its `place`, or an image in memory, or why it is neither."""

    place: Frame
    image: Image.Image | None = None
    error: ImageError | None = None


def load(
    bundle: str | os.PathLike[str],
    device: str = "auto",
    *,
    batch: int | None = None,
    threads: int | None = None,
    draft: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> Model:
    """Load a bundle. Every file that is read is hashed first and compared with bundle.json, as `vessel-rt infer` does.

    Args:
        bundle: its folder.
        device: auto, cpu, or one of cuda, rtx, tensorrt, with `:N` for the GPU of that number.
        batch: how many images are to run at once, at most on `rtx` and `tensorrt`; None leaves it to the device (1 on a CPU).
        threads: CPU threads for one operator; None leaves it to ONNX Runtime (all physical cores).
        draft: check the expected answer in one run; False decodes token by token. The answers are the same.
        progress: called with the bytes read since the last call, and with all there are to read, while files are hashed.

    Raises:
        BundleError: no bundle there, or a file of it is missing or was changed.
        EngineError: the engines do not fit the bundle, the GPU, or `batch`.
        VesselError: the device cannot be used, a graph cannot be loaded there, or a bad argument.
    """
    folder = as_path(bundle, "bundle", "give its folder as str or Path", VesselError)
    images, cores = as_count("batch", batch), as_count("threads", threads) or 0
    if not isinstance(device, str):
        raise VesselError(f"device is {type_of(device)}: give a str, such as auto, cpu or cuda:0")
    try:
        wanted = Device.parse(device)
    except ValueError as e:
        raise VesselError(f"device: {e}") from None
    return Model(deploy(Bundle.load(folder), wanted, progress, batch=images), cores, draft=draft)


def frame_count(path: str | os.PathLike[str]) -> int:
    """How many frames a DICOM cine has, or pages a TIFF; 1 for any other file.

    Raises:
        ImageError: the file cannot be read.
    """
    file = as_path(path, "path", "give a file as str or Path")
    try:
        return frames.frame_count(file) or 1
    except ImageError as e:
        raise ImageError(f"{printable(str(file))}: {e}") from e


def _outcomes(pipeline: Pipeline[_Input, Result | ImageError], items: Iterable[_Input], *, raising: bool) -> Iterator[Result | ImageError]:
    for outcome in pipeline.run(items):
        if raising and isinstance(outcome, ImageError):
            raise outcome
        yield outcome


def _item(image: Any, index: int, rescale: Rescale | None) -> _Input:
    """An item of `segment_many`: an image, or a path and a frame."""
    file, frame = image if isinstance(image, tuple) and len(image) == 2 else (image, None)
    return _input(file, frame, index, f"image {index}", rescale)


def _input(image: Any, frame: int | None, index: int, shown: str, rescale: Rescale | None) -> _Input:
    """An image in memory is copied now, in the caller's thread: the caller may use its memory for the next one."""
    memory = Frame(Path(), None, index, "", "", "", shown)
    try:
        if not isinstance(image, str | os.PathLike):
            if frame is not None:
                raise ImageError(f"frame is {frame!r}, which is for files; an image in memory is one frame")
            return _Input(memory, rgb_image(as_picture(image), rescale))
        return _Input(place_of(as_path(image, "image", TAKEN), as_number(frame), index))
    except ImageError as e:
        return _Input(memory, error=e.with_traceback(None))


def _result(item: _Input, picture: Picture, results: Sequence[model_result.Result]) -> Result:
    [result] = results
    place, told = item.place, {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    path = None if item.image else place.path
    return Result(**told, image=picture.image, index=place.index, path=path, frame=place.number, sha256=picture.sha256)


def _named(item: _Input, error: ImageError) -> ImageError:
    return type(error)(f"{item.place.shown}: {error}")

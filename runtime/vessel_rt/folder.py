"""Many images through one Segmenter: which they are, how they share the time, and the account of the run.

Three things go on at once: threads read images and make their pixels, a few ahead; others run batches of them through the graphs; one more
makes the masks and writes them, in order. What waits between them is bounded, so memory does not grow with the folder.
"""

from __future__ import annotations

import dataclasses
import datetime
import glob
import importlib.metadata
import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

import vessel_rt
from vessel_rt.bundle import BUNDLE_FILE, Bundle, sha256_of
from vessel_rt.deployment import Deployment, deploy
from vessel_rt.engine import ENGINES
from vessel_rt.errors import ImageError, OutOfMemory, VesselError
from vessel_rt.image import SUFFIXES, read_image
from vessel_rt.outputs import OutputFolder
from vessel_rt.segmenter import Answer, Pixels, Segmenter
from vessel_rt.session import Device, onnxruntime

__all__ = ["InferOptions", "Summary", "find_images", "infer"]

S = TypeVar("S")
T = TypeVar("T")

_STREAMS = 4  # at most, unless more are asked for: each has a KV cache and activations of its own
_READERS = 1  # threads: reading and resizing an image takes less time than its masks, and the first mask does not wait for more
_LIBRARIES = ("numpy", "pillow", "tokenizers", "safetensors", "pycocotools")


@dataclasses.dataclass(frozen=True)
class InferOptions:
    """What `infer` is asked to do.

    `inputs` are files, folders and globs, of which `num_images` None takes all; every question is asked of every image. `threads` of the
    CPU are shared by `streams` of batches, in which `batch` images run at once; 0 and None leave the choice to the machine.
    `draft`: see Segmenter.
    """

    inputs: tuple[str, ...]
    output: Path
    questions: tuple[str, ...]
    num_images: int | None = None
    device: Device = Device("auto")  # noqa: RUF009 (immutable)
    threads: int = 0
    streams: int | None = None
    batch: int | None = None
    draft: bool = True
    overwrite: bool = False


@dataclasses.dataclass
class Summary:
    """What became of the images of a run, and the seconds that loading the bundle and running them took.

    `masks`, `without_mask`, `undrafted` (runs of language_model after the first were needed) and `answers` count results: an image has one
    for each question. In each of `streams`
    `batch` images ran at once at first, `least_batch` after the device had run out of memory.
    """

    images: int = 0
    failed: int = 0
    answers: int = 0
    undrafted: int = 0
    masks: int = 0
    without_mask: int = 0
    streams: int = 1
    batch: int = 1
    least_batch: int = 1
    load_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def find_images(inputs: Sequence[str], num_images: int | None = None) -> list[Path]:
    """The image files that `inputs` name, each once, in order; the first `num_images` of them.

    A file is taken as it is; of a folder (not of those in it) and of a glob, sorted, what has the suffix of an image and is not hidden.

    Raises:
        VesselError: an input that is not there, or in which there is no image.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        for path in _images_of(text):
            found.setdefault(path.resolve(), path)
    return list(found.values())[:num_images]


def _images_of(text: str) -> list[Path]:
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates, place = list(path.iterdir()), f"{text}: this folder"
    elif glob.has_magic(text):
        candidates, place = [Path(name) for name in glob.glob(text, recursive=True)], f"{text}: this pattern"
    else:
        raise VesselError(f"{text}: no such file or folder")
    images = [p for p in sorted(candidates) if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    if not images:
        raise VesselError(f"{place} holds no image ({', '.join(SUFFIXES)})")
    return images


def infer(bundle: Bundle, options: InferOptions) -> Summary:
    """Segment every image and write the results; an image that fails becomes a line in results.jsonl, and the others go on.

    Raises:
        VesselError: nothing could be begun (inputs, output folder, question, device, bundle), or a result could not be written.
    """
    began, started, summary = time.perf_counter(), datetime.datetime.now(datetime.UTC), Summary()
    images = find_images(options.inputs, options.num_images)
    outputs = OutputFolder(options.output, images, options.overwrite)
    deployment = _deploy(bundle, options)
    streams = _streams(options, deployment.device, len(images))
    with Segmenter(deployment, _threads(options, streams), draft=options.draft) as segmenter:
        for question in options.questions:
            segmenter.check_question(question)
        _announce(options.device, deployment)
        summary.streams, summary.batch, summary.least_batch = streams, deployment.batch, deployment.batch
        summary.load_seconds = time.perf_counter() - began
        with outputs, tqdm(total=len(images), unit="image", disable=None, dynamic_ncols=True) as bar:  # None: a bar on terminals only
            _Run(segmenter, options.questions, outputs, summary, bar).over(images)
        summary.seconds = time.perf_counter() - began - summary.load_seconds
        outputs.write_run(_report(bundle, options, deployment.device, started, summary))
    return summary


def _streams(options: InferOptions, device: Device, images: int) -> int:
    """How many batches are in work at one time. A CPU gets more done with a core for each than with all for one (docs/performance.md)."""
    most = options.streams or (min(options.threads or _cores(), _STREAMS) if device.kind == "cpu" else 1)
    return min(most, images)


def _threads(options: InferOptions, streams: int) -> int:
    """Of one operator; 0 leaves it to ONNX Runtime."""
    return options.threads if streams == 1 else max(1, (options.threads or _cores()) // streams)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True, eq=False)
class _Frame:
    """An image on its way: read and prepared, or the error that came of it."""

    path: Path
    image: Image.Image | None = None
    pixels: Pixels | None = None
    error: str | None = None
    ms: dict[str, float] = dataclasses.field(default_factory=dict)


class _Run:
    """The images of one run on their way through the three steps."""

    def __init__(self, segmenter: Segmenter, questions: Sequence[str], outputs: OutputFolder, summary: Summary, bar: tqdm[Any]) -> None:
        self._segmenter, self._questions, self._outputs, self._summary, self._bar = segmenter, questions, outputs, summary, bar
        self._lock = threading.Lock()

    def over(self, images: Sequence[Path]) -> None:
        """Take every image through. Interrupted, or out of disk, it ends with what is in hand written whole."""
        streams = self._summary.streams
        with ThreadPoolExecutor(1, "write") as writer, _pool(streams, "run") as runners, _pool(_READERS, "read") as readers:
            frames = _ahead(readers, self._read, images, self._summary.batch * streams + _READERS)
            answered = _ahead(runners, self._answered, self._batches(frames), streams)
            for _ in _ahead(writer, self._write, answered, streams):
                pass

    def _read(self, path: Path) -> _Frame:
        try:
            began = time.perf_counter()
            image = read_image(path)
            ms = {"read": (time.perf_counter() - began) * 1e3}
            return _Frame(path, image, self._segmenter.prepare(image), ms=ms)
        except ImageError as e:
            return _Frame(path, error=str(e))

    def _batches(self, frames: Iterable[_Frame]) -> Iterator[list[_Frame]]:
        """As many frames as run together now; one that could not be read goes with them, for the order's sake."""
        batch: list[_Frame] = []
        for frame in frames:
            batch.append(frame)
            if sum(frame.error is None for frame in batch) >= self._summary.least_batch:
                yield batch
                batch = []
        if batch:
            yield batch

    def _answered(self, batch: Sequence[_Frame]) -> list[tuple[_Frame, list[Answer]]]:
        """Each frame with its answers. A batch that fails is run again in halves, down to the image that fails alone."""
        good = [frame.pixels for frame in batch if frame.pixels]
        if len(good) <= self._summary.least_batch:
            try:
                answers = iter(self._segmenter.run(good, self._questions) if good else [])
                return [(_spent(frame), next(answers) if frame.pixels else []) for frame in batch]
            except ImageError as e:
                if len(good) == 1:
                    return [(dataclasses.replace(f, error=f"{f.path}: {e}", pixels=None) if f.pixels else f, []) for f in batch]
                if isinstance(e, OutOfMemory):
                    with self._lock:  # another stream may have come down further
                        self._summary.least_batch = min(self._summary.least_batch, len(good) // 2)
                    text = f"no memory for {len(good)} images at once, going on with {len(good) // 2}"
                    tqdm.write(f"vessel-rt: warning: {text}", file=sys.stderr)
        return self._answered(batch[: len(batch) // 2]) + self._answered(batch[len(batch) // 2 :])

    def _write(self, answered: Sequence[tuple[_Frame, Sequence[Answer]]]) -> None:
        for frame, answers in answered:
            self._write_one(frame, answers)

    def _write_one(self, frame: _Frame, answers: Sequence[Answer]) -> None:
        """Runs in the writer's thread, which alone counts."""
        summary = self._summary
        summary.images += 1
        self._bar.update()
        if frame.error or not frame.pixels or not frame.image:
            summary.failed += 1
            tqdm.write(f"vessel-rt: error: {frame.error}", file=sys.stderr)
            self._outputs.write_error(frame.path, self._questions, str(frame.error))
            return
        results = [self._segmenter.finish(frame.pixels, answer) for answer in answers]
        results = [dataclasses.replace(result, ms=frame.ms | result.ms) for result in results]
        self._outputs.write_results(frame.path, frame.image, results)
        for result in results:
            summary.answers += 1
            summary.undrafted += result.decode_steps > 0
            summary.masks += len(result.masks)
            summary.without_mask += not result.masks


def _spent(frame: _Frame) -> _Frame:
    """`frame` without its pixels, of which a waiting one has megabytes."""
    return dataclasses.replace(frame, pixels=frame.pixels.spent()) if frame.pixels else frame


def _ahead(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S], bound: int) -> Iterator[T]:
    """`function` of each of `items`, in order, computed by `pool` while earlier ones are used; `bound` of them wait at most."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        while len(waiting) > bound or (waiting and waiting[0].done()):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads for a block: what is in work when it ends is finished, and what is not begun, forgotten."""
    pool = ThreadPoolExecutor(threads, name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _announce(wanted: Device, deployment: Deployment) -> None:
    """Say where the run takes place: `auto` may have chosen what the user did not mean."""
    device, bundle, note = deployment.device, deployment.bundle, ""
    if (device.kind, bundle.precision) == ("cpu", "fp16"):
        note = ": slow, and twice its size in memory; take a GPU, or export with --precision fp32"
    elif wanted.kind == "auto" and device.kind != "rtx" and (bundle.folder / ENGINES).is_dir():
        note = f": the bundle's engines are not used (vessel-rt devices --bundle {bundle.folder} says why)"
    print(f"device {device}{note}", file=sys.stderr)


def _deploy(bundle: Bundle, options: InferOptions) -> Deployment:
    """`deploy`, with a bar if the files take more than two seconds."""
    with tqdm(desc="checking the bundle", unit="B", unit_scale=True, disable=None, delay=2, leave=False) as bar:

        def advance(read: int, total: int) -> None:
            bar.total = total
            bar.update(read)

        return deploy(bundle, options.device, advance, batch=options.batch)


def _report(bundle: Bundle, options: InferOptions, device: Device, started: datetime.datetime, summary: Summary) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "versions": {
            "vessel-rt": vessel_rt.__version__,
            "python": platform.python_version(),
            "onnxruntime": onnxruntime().__version__,
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
        "bundle": {
            "name": bundle.folder.resolve().name,
            "sha256": sha256_of(bundle.folder / BUNDLE_FILE),
            "precision": bundle.precision,
            "checkpoint": bundle.provenance.checkpoint,
        },
        "device": str(device),
        "batch": {"streams": summary.streams, "at_first": summary.batch, "least": summary.least_batch},
        "options": dataclasses.asdict(options) | {"output": str(options.output), "device": str(options.device)},
        "counts": {
            "images": summary.images,
            "ok": summary.images - summary.failed,
            "failed": summary.failed,
            "answers": summary.answers,
            "with_decode_steps": summary.undrafted,
            "masks": summary.masks,
            "without_mask": summary.without_mask,
        },
        "started": started.isoformat(timespec="seconds"),
        "seconds": {"load": round(summary.load_seconds, 3), "images": round(summary.seconds, 3)},
        "images_per_second": round(summary.images_per_second, 4),
        "peak_memory_bytes": _peak_memory(),
    }


def _peak_memory() -> int | None:
    """The largest resident set of this process so far, in bytes, from Linux's /proc; None elsewhere.

    Not getrusage: its figure includes the parent's memory at the time of the fork.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    peak = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024

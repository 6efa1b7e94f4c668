"""A cine frame by frame, and with its objects tracked: frames per second and the time of each step, side by side.

    python -m benchmarks.cines [--bundle DIR] [--frames N] [--alone N] [--rounds N]

The cine is one of examples/tiny, its frames resized to 512x512 pixels: all of them, or N spread evenly over it. Three ways run in turn in
this process, on the CPU, as in `vessel-rt infer` but without files: each frame by itself, `--propagate` and `--propagate sa2va`. Before
them, two frames warm the process up. `--alone N` segments only N frames by themselves, for a model that takes as long for each.

Milliseconds of a step are means, of the frames that the language model was asked about (`asked`), of those that were tracked, and of those
among them that attended to the most memories (`late`), as nearly all frames of a long cine do. `late_frame_ms` is the time from one such
frame to the next; `long`, the ratio of the time of a frame by itself to it, is what the ratio of long cines tends to. `processor` is the
ratio of processor times, which other load changes least; `other_load` is the share of the processors that other processes used. Full-size
models run on one stream; the small one runs two frames at the same time if it does not track. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import operator
import os
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.measure import others_seconds, publish
from vessel_rt.device.deployment import deploy
from vessel_rt.device.providers import Device
from vessel_rt.errors import ImageError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.inputs.frames import Frame, Naming, Selection, find_frames, read_frame
from vessel_rt.inputs.pseudonyms import StudyCodes
from vessel_rt.measure.memory import MemoryWatch
from vessel_rt.model.cine import CineSegmenter
from vessel_rt.model.result import Result
from vessel_rt.run.cine_pipeline import CinePipeline
from vessel_rt.run.pipeline import Picture, Pipeline
from vessel_rt.run.worker import WorkOptions

_SIDE = 512  # pixels
_CINE = Path("examples/tiny/cines/S0101.dcm")
_ALONE = "alone"
_WAYS = (_ALONE, "best-frame", "sa2va")
_WARM = 2  # frames by themselves, which grow ONNX Runtime's arenas


@dataclasses.dataclass(frozen=True, eq=False)
class Done:
    """A finished frame: its place in the cine, its result, and when that was complete, in seconds."""

    place: int
    result: Result
    at: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cines", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=Path("engines/tiny-fp32"), metavar="DIR")
    parser.add_argument("--frames", type=int, metavar="N", help="of the cine (default: all)")
    parser.add_argument("--alone", type=int, metavar="N", help="how many of them are also segmented by themselves (default: all)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="how often all ways run (default: 1)")
    arguments = parser.parse_args()
    bundle = Bundle.load(arguments.bundle)
    bundle.require_cine()
    deployment = deploy(bundle, Device("cpu"))
    frames = _frames(arguments.frames)
    rounds: list[dict[str, Any]] = []
    with MemoryWatch(Device("cpu")) as memory, ExitStack() as stack:
        segmenters: dict[int, CineSegmenter] = {}  # by threads of an operator
        for _ in tqdm(range(arguments.rounds), desc="rounds", disable=None):
            rounds.append({})
            for way in _WAYS:
                some = frames[: arguments.alone] if way == _ALONE else frames
                options = WorkOptions((bundle.prompt.default_question,), propagate=None if way == _ALONE else way)
                threads = options.threads_of(options.streams_on("cpu", len(some), bundle))
                if threads not in segmenters:
                    segmenters[threads] = stack.enter_context(CineSegmenter(deployment, threads))
                    _run(segmenters[threads], dataclasses.replace(options, propagate="sa2va"), bundle, frames[:_WARM])
                rounds[-1][way] = found = _measured(segmenters[threads], options, bundle, some)
                print(f"{way}: {found['frames_per_second']} frames a second", file=sys.stderr, flush=True)
    publish(
        f"cines-{bundle.weights}-{bundle.language_model.layers}-layers",
        {
            "bundle": bundle.folder.resolve().name,
            "side": _SIDE,
            "frames_of_cine": len(frames),
            "peak_anonymous_gib": round(memory.peak / 2**30, 2),
            "rounds": rounds,
            "ratios": {way: [_ratios(each, way) for each in rounds] for way in _WAYS[1:]},
        },
    )
    return 0


def _frames(count: int | None) -> list[Image.Image]:
    """Frames of the cine, evenly spread over it, as RGB images."""
    found = find_frames([str(_CINE)], Naming(StudyCodes(b"benchmark")), Selection(slice(None))).frames
    chosen = np.linspace(0, len(found) - 1, count or len(found)).round().astype(int)
    return [read_frame(found[place]).resize((_SIDE, _SIDE)) for place in chosen]


def _run(segmenter: CineSegmenter, options: WorkOptions, bundle: Bundle, images: Sequence[Image.Image]) -> list[Done]:
    """Segment the frames as a worker of `vessel-rt infer` does."""
    frames = [Frame(_CINE, place, place, str(place), "", "", "") for place in range(len(images))]

    def read(frame: Frame) -> Picture:
        return Picture(images[frame.index], None)

    def finish(frame: Frame, _: Picture, results: Sequence[Result]) -> Done:
        return Done(frame.index, results[0], time.perf_counter())

    def fail(_: Frame, error: ImageError) -> Done:
        raise error

    if options.propagate:
        cine = CinePipeline(segmenter, options.propagate, options.questions, read=read, finish=finish, fail=fail, stop=threading.Event())
        return list(cine.run(frames))
    streams = options.streams_on("cpu", len(images), bundle)
    return list(Pipeline(segmenter, options.questions, read=read, finish=finish, fail=fail, streams=streams).run(frames))


def _measured(segmenter: CineSegmenter, options: WorkOptions, bundle: Bundle, images: Sequence[Image.Image]) -> dict[str, Any]:
    began, used, others = time.perf_counter(), time.process_time(), others_seconds()
    done = _run(segmenter, options, bundle, images)
    seconds, used, others = time.perf_counter() - began, time.process_time() - used, others_seconds() - others
    memories = _memories(done, bundle)
    asked = [each for each in done if each.result.propagated_from is None]
    late = [i for i, count in enumerate(memories) if count and count == max(memories)]
    found: dict[str, Any] = {
        "frames": len(done),
        "asked": len(asked),
        "masks": sum(len(each.result.masks) for each in done),
        "seconds": round(seconds, 3),
        "frames_per_second": round(len(done) / seconds, 3),
        "processor_seconds": round(used, 2),
        "other_load": round(max(others, 0) / seconds / (os.cpu_count() or 1), 3),
        "ms": {"asked": _means(asked)},
    }
    if late:
        found["most_memories"] = max(memories)
        found["late_frames"] = len(late)
        found["late_frame_ms"] = round(statistics.mean(done[i].at - done[i - 1].at for i in late) * 1e3, 3)
        found["ms"] |= {"tracked": _means([each for each in done if each not in asked]), "late": _means([done[i] for i in late])}
    return found


def _memories(done: Sequence[Done], bundle: Bundle) -> list[int]:
    """How many memories each frame attended to, in the order of tracking; 0 for those that were asked about."""
    reach = bundle.require_cine().memories - 1
    asked = {each.place for each in done if each.result.propagated_from is None}
    places = [each.place for each in done]
    found = []
    for i, place in enumerate(places):
        tracked = {other for other in places[:i] if other not in asked and (other < min(asked)) == (place < min(asked))}
        found.append(0 if place in asked else len(asked) + sum(abs(place - other) <= reach for other in tracked))
    return found


def _means(done: Sequence[Done]) -> dict[str, float]:
    steps = dict.fromkeys(step for each in done for step in each.result.ms)
    return {step: round(statistics.mean(each.result.ms.get(step, 0.0) for each in done), 2) for step in steps}


def _ratios(ways: Mapping[str, Any], way: str) -> dict[str, float]:
    """How many times as fast as frames by themselves `way` is: for this cine, by wall and by processor time, and for a long one."""
    alone, tracked = ways[_ALONE], ways[way]
    processor = (each["processor_seconds"] / each["frames"] for each in (alone, tracked))
    late = tracked.get("late_frame_ms")
    return {
        "measured": round(tracked["frames_per_second"] / alone["frames_per_second"], 2),
        "processor": round(operator.truediv(*processor), 2),
        **({"long": round(1e3 * alone["seconds"] / alone["frames"] / late, 2)} if late else {}),
    }


if __name__ == "__main__":
    sys.exit(main())

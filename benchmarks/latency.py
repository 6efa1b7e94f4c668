"""Latency and throughput of the runtime, of a naive loop over its graphs, and of the PyTorch reference.

    python -m benchmarks.latency [--bundle DIR] [--model DIR] [--sides 512 1024] [--rounds 3] [--compiled]

Each contender is a process that reads a folder of frames and writes masks. It is measured from outside: the time from its start to its
first mask, and the images per second from the first mask to the last. Contenders take turns, A B A B, so that other load on the machine
affects all of them. Ratios are computed within a round; the result has their spread.

- runtime: `vessel-rt infer` with its defaults. no-draft: the same, decoding token by token.
- naive: the same graphs, one image after another, without drafts and without overlap.
- reference: vessel_export.parity.reference, eager PyTorch, as in Sa2VA's own code. compiled: with its encoders compiled by torch.compile.

Then, in one process: the latency of each step for single images (`stages`, by tiles) and the milliseconds per image in batches, both as
`vessel-rt bench` measures them, and the share of a run's steady state in which a stream runs no graph (on a CPU; on a GPU graphs overlap).
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.measure import infer_options, publish, square_frames
from vessel_rt.results.reader import TIMINGS_FILE, iter_lines

T = TypeVar("T")

_QUESTION = "Please segment vessel in this image."
_ON_THE_HOST = ("tiles", "square", "upsample")
_SCRIPT = Path(sys.executable).with_name("vessel-rt")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=Path("engines/tiny-fp32"), metavar="DIR")
    parser.add_argument(
        "--model", type=Path, default=Path("examples/tiny"), metavar="DIR", help="the model that the bundle was exported from"
    )
    parser.add_argument("--frames", type=Path, default=Path("examples/tiny/frames"), metavar="DIR")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024], metavar="PIXELS")
    parser.add_argument("--count", type=int, default=28, metavar="N", help="frames for each contender, after one to warm up")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--device", default="cpu", help="the runtime's device; the reference runs on a GPU if torch finds one")
    parser.add_argument("--compiled", action="store_true", help="also run the reference with torch.compile, which takes minutes to start")
    parser.add_argument("--worker", choices=sorted(_WORKERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # for every contender, as in vessel-rt
    if arguments.worker:
        print(json.dumps(_WORKERS[arguments.worker](arguments)))
        return 0
    result: dict[str, Any] = {"bundle": arguments.bundle.name, "device": arguments.device, "frames": arguments.count, "sides": {}}
    for side in arguments.sides:
        with _frames(arguments.frames, side, arguments.count + 1) as frames:
            result["sides"][str(side)] = _side_by_side(arguments, frames)
            found = _ask(arguments, "stages", frames)
            result.setdefault("stages", {})[str(found.pop("tiles"))] = found.pop("stages")
            result["sides"][str(side)] |= found
    publish("latency", result)
    return 0


def _side_by_side(arguments: argparse.Namespace, frames: Path) -> dict[str, Any]:
    """Run all contenders in turns."""
    infer = [_SCRIPT, "infer", frames, "--bundle", arguments.bundle, "--device", arguments.device, "-o"]
    worker = [*_worker(arguments, frames), "--worker"]
    commands: dict[str, Callable[[Path], list[Any]]] = {
        "runtime": lambda out: [*infer, out],
        "no-draft": lambda out: [*infer, out, "--no-draft"],
        "naive": lambda out: [*worker, "naive", "--bundle", arguments.bundle, "--frames", out],
        "reference": lambda out: [*worker, "reference", "--frames", out],
    }
    if arguments.compiled:
        commands["compiled"] = lambda out: [*worker, "compiled", "--frames", out]
    rounds: list[dict[str, dict[str, float]]] = []
    steps = tqdm(total=arguments.rounds * len(commands), desc=f"latency, {frames.name}", disable=None)
    min_iou = 1.0
    for turn in range(arguments.rounds):
        rounds.append({})
        with tempfile.TemporaryDirectory() as folder:
            for name, command in _rotated(list(commands.items()), turn):  # every contender comes after every other one
                out = Path(folder) / name
                out.mkdir()
                rounds[-1][name] = _watch(command(out if name in ("runtime", "no-draft") else _linked(frames, out)), out / "masks")
                steps.update()
            min_iou = min(min_iou, *(_min_iou(Path(folder) / "reference" / "masks", Path(folder) / name / "masks") for name in commands))
            timings = list(iter_lines(Path(folder) / "runtime" / TIMINGS_FILE))
    return {
        "contenders": {name: {key: [r[name][key] for r in rounds] for key in rounds[0][name]} for name in commands},
        "ratios": {
            f"{one} over {other}": {
                "images_per_second": _spread([r[one]["images_per_second"] / r[other]["images_per_second"] for r in rounds]),
                "first_mask": _spread([r[other]["first_mask_seconds"] / r[one]["first_mask_seconds"] for r in rounds]),
            }
            for one, other in (("runtime", "reference"), ("runtime", "naive"), ("runtime", "no-draft"), ("naive", "reference"))
        },
        "min_mask_iou_with_reference": min_iou,
        "without_decode_steps": statistics.mean(line["decode_steps"] == 0 for line in timings),
    }


def _rotated(items: list[T], by: int) -> list[T]:
    return items[by % len(items) :] + items[: by % len(items)]


def _watch(command: Sequence[Any], masks: Path) -> dict[str, float]:
    """Run `command`, which writes masks: seconds from its start to the first mask, and images per second from there to the last."""
    began = time.time()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]}: {done.stderr.strip()}")
    written = sorted(path.stat().st_mtime for path in masks.glob("*.png"))
    return {
        "first_mask_seconds": round(written[0] - began, 3),
        "images_per_second": round((len(written) - 1) / (written[-1] - written[0]), 3),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "min": round(min(values), 2), "max": round(max(values), 2)}


def _min_iou(theirs: Path, ours: Path) -> float:
    """The minimum IoU of the masks with the same name in two folders."""
    from vessel_rt.evaluation.metrics import iou

    pairs = ((np.asarray(Image.open(path)) > 0, np.asarray(Image.open(ours / path.name)) > 0) for path in theirs.glob("*.png"))
    return min(iou(one, other) for one, other in pairs)


@contextmanager
def _frames(source: Path, side: int, count: int) -> Iterator[Path]:
    """A folder of `count` frames of `side` x `side` pixels, made from those in `source`."""
    with tempfile.TemporaryDirectory() as folder:
        frames = Path(folder) / f"{side}x{side}"
        square_frames(source, frames, side, count)
        yield frames


def _linked(frames: Path, out: Path) -> Path:
    """A folder with a worker's frames and with room for its masks."""
    (out / "frames").symlink_to(frames)
    (out / "masks").mkdir()
    return out


def _worker(arguments: argparse.Namespace, frames: Path) -> list[Any]:
    return [sys.executable, "-m", "benchmarks.latency", "--model", arguments.model, "--device", arguments.device]


def _ask(arguments: argparse.Namespace, worker: str, frames: Path) -> dict[str, Any]:
    command = [*_worker(arguments, frames), "--worker", worker, "--bundle", arguments.bundle, "--frames", frames, "--batches"]
    done = subprocess.run([str(part) for part in [*command, *arguments.batches]], stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _segmenter(arguments: argparse.Namespace, *, draft: bool) -> Any:
    from vessel_rt.device.deployment import deploy
    from vessel_rt.device.providers import Device
    from vessel_rt.formats.bundle import Bundle
    from vessel_rt.model.segmenter import Segmenter

    return Segmenter(deploy(Bundle.load(arguments.bundle), Device.parse(arguments.device)), draft=draft)


def _naive(arguments: argparse.Namespace) -> dict[str, Any]:
    """Segment one image after another and write its mask, without overlap."""
    from vessel_rt.inputs.images import read_image

    with _segmenter(arguments, draft=False) as segmenter:
        for path in sorted((arguments.frames / "frames").iterdir()):
            result = segmenter.segment(read_image(path), _QUESTION)
            _save(result.masks[0].pixels, arguments.frames / "masks" / path.name)
    return {}


def _reference(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sa2VA's computation in PyTorch."""
    return _by_torch(arguments, lambda reference: None)


def _compiled(arguments: argparse.Namespace) -> dict[str, Any]:
    """The reference with both encoders compiled. The language model is not: its growing cache would recompile at every step."""
    import torch

    def compile_encoders(reference: Any) -> None:
        reference.vision_model.forward = torch.compile(reference.vision_model.forward, dynamic=True)
        reference.sam2.image_encoder.forward = torch.compile(reference.sam2.image_encoder.forward)

    return _by_torch(arguments, compile_encoders)


def _by_torch(arguments: argparse.Namespace, prepare: Callable[[Any], None]) -> dict[str, Any]:
    import torch

    from vessel_export.parity.reference import Reference

    [checkpoint], [sam2] = arguments.model.glob("iter_*.pth"), arguments.model.glob("sam2_*.pt")
    gpu = torch.cuda.is_available()
    reference = Reference.load(
        checkpoint, arguments.model / "base", sam2, device="cuda" if gpu else "cpu", dtype=torch.bfloat16 if gpu else torch.float32
    )
    prepare(reference)
    for path in sorted((arguments.frames / "frames").iterdir()):
        with Image.open(path) as image:
            result = reference.segment(image, _QUESTION)
        _save(result.masks[0].cpu().numpy(), arguments.frames / "masks" / path.name)
    return {}


def _save(mask: Any, path: Path) -> None:
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def _stages(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `vessel-rt bench` measures of single images and of the graphs' part of batches; and the share of a run outside the graphs."""
    from vessel_rt.bench.frames import given_frames
    from vessel_rt.bench.work import Failed, Measured, Message, Work, measure
    from vessel_rt.device import session
    from vessel_rt.device.providers import Device
    from vessel_rt.formats.bundle import Bundle
    from vessel_rt.inputs.frames import Naming, Selection
    from vessel_rt.inputs.pseudonyms import StudyCodes
    from vessel_rt.measure.timing import TOTAL, medians
    from vessel_rt.run.infer import infer

    running: list[tuple[float, float]] = []  # begin and end of each run of a graph, in any thread
    run = session.Session.run

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return run(self, *args, **kwargs)
        finally:
            running.append((began, time.perf_counter()))

    session.Session.run = timed  # type: ignore[method-assign]
    bundle, device = Bundle.load(arguments.bundle), Device.parse(arguments.device)
    found = given_frames([str(arguments.frames)], Naming(StudyCodes(b"benchmark")), Selection())
    frames = {tiles: {i: found.frames[i] for i in positions} for tiles, positions in found.by_tiles(bundle.tiles).items()}
    messages: list[Message] = []
    measure(Work(bundle, device, frames, _QUESTION, sorted({1, *arguments.batches})), messages.append)
    if faults := [message.reason for message in messages if isinstance(message, Failed)]:
        raise SystemExit(faults[0])
    times = {message.batch: message.times for message in messages if isinstance(message, Measured)}
    graphs = {batch: [run[TOTAL] - sum(run[step] for step in _ON_THE_HOST) for run in runs] for batch, runs in times.items()}
    [tiles] = frames
    running.clear()
    with tempfile.TemporaryDirectory() as out:
        summary = infer(bundle, infer_options(arguments.frames, Path(out), _QUESTION, device))
    outside = _idle(running, summary.streams)
    steps = medians(times[1])
    return {
        "tiles": tiles,
        "stages": {"end to end" if step == TOTAL else step: {"ms": p50, "p50": p50, "p90": p90} for step, (p50, p90) in steps.items()},
        "ms_per_image_by_batch": {str(batch): round(statistics.median(graphs[batch]), 2) for batch in arguments.batches},
        "outside_graphs": round(outside, 4),
    }


def _idle(running: Sequence[tuple[float, float]], streams: int) -> float:
    """The share of the streams' time in which they run no graph, in the middle 80 % of a run, its steady state."""
    first, last = min(began for began, _ in running), max(ended for _, ended in running)
    begin, end = first + 0.1 * (last - first), last - 0.1 * (last - first)
    busy = sum(max(0.0, min(ended, end) - max(began, begin)) for began, ended in running)
    return 1 - busy / (streams * (end - begin))


_WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "naive": _naive,
    "reference": _reference,
    "compiled": _compiled,
    "stages": _stages,
}

if __name__ == "__main__":
    raise SystemExit(main())

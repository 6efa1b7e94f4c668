"""Resident memory by phase, of the runtime and of the PyTorch reference, each in a process of its own; where a GPU is, also its memory.

    python -m benchmarks.memory [--bundle DIR] [--frames DIR] [--checkpoint PTH --base DIR --sam2 PT]

Both run on the CPU, the runtime in the bundle's precision, the reference in FP32, and segment the same frames one at a time. Phases are
what is done so far: everything imported, the model loaded, the first image segmented, all of them. Peak and present size are VmHWM and
VmRSS of /proc/self/status, so mapped files count as far as they were read; Linux only. The GPU's memory is what the whole device has less
of than before the process began, so nothing else may run there; it is set against `vessel-rt plan` for one image at once. Figures of the
CPU are the medians of three runs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from benchmarks.measure import process_field, publish
from vessel_rt.errors import VesselError

if TYPE_CHECKING:  # a worker imports what it measures, and little else
    from vessel_rt.formats.bundle import Bundle

_MIB = 2**20
_RUNS = 3  # of each worker: what an allocator keeps differs by a tenth from one run to the next


def main() -> int:
    arguments = _arguments()
    try:
        if arguments.worker:
            print(json.dumps({phase: _memory(arguments.gpu) for phase in _WORKERS[arguments.worker](arguments)}))
        else:
            publish("memory", _compare(arguments))
    except VesselError as e:
        print(e, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError:  # a worker, which has said why
        return 1
    return 0


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    from vessel_rt.formats.bundle import Bundle

    bundle = Bundle.load(arguments.bundle)
    runtime, reference = (_median([_measure(worker) for _ in range(_RUNS)]) for worker in ("runtime", "reference"))
    return {
        "bundle": bundle.folder.resolve().name,
        "precision": bundle.precision,
        "images": len(_frames(arguments.frames)),
        "runs": _RUNS,
        "runtime_mib": runtime,
        "reference_mib": reference,
        "peak_reference_over_runtime": {phase: round(reference[phase]["peak"] / runtime[phase]["peak"], 2) for phase in runtime},
        "gpus": list(_gpu_rows(bundle)),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").partition("\n")[0])
    tiny = Path("examples/tiny")
    parser.add_argument("--bundle", type=Path, default=Path("engines/tiny-fp32"), metavar="DIR")
    parser.add_argument("--frames", type=Path, default=tiny / "frames", metavar="DIR", help="a folder of images, and of nothing else")
    parser.add_argument("--checkpoint", type=Path, default=tiny / "iter_1000.pth", metavar="PTH", help="what the bundle was made from")
    parser.add_argument("--base", type=Path, default=tiny / "base", metavar="DIR")
    parser.add_argument("--sam2", type=Path, default=tiny / "sam2_tiny.pt", metavar="PT")
    parser.add_argument("--worker", choices=_WORKERS, help="be the process that is measured: print its memory by phase")
    parser.add_argument("--device", default="cpu", help="of the runtime's worker")
    parser.add_argument("--gpu", type=int, metavar="N", help="the worker prints the free bytes of GPU N, not its own memory")
    return parser.parse_args()


def _measure(worker: str, *options: str) -> dict[str, Any]:
    """What a worker prints, given this command's own options and `options`."""
    print(f"{worker} {' '.join(options)}".rstrip(), file=sys.stderr)
    command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--worker", worker, *options]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return measured


def _median(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of what several runs of a worker print: the median of every number."""
    return {phase: {name: statistics.median(run[phase][name] for run in runs) for name in runs[0][phase]} for phase in runs[0]}


def _runtime(arguments: argparse.Namespace) -> Iterator[str]:
    """Yields the name of each phase when it is over, and goes on when its memory has been read."""
    from vessel_rt.device.deployment import deploy
    from vessel_rt.device.providers import Device, onnxruntime
    from vessel_rt.formats.bundle import Bundle
    from vessel_rt.inputs.images import read_image
    from vessel_rt.model.segmenter import Segmenter

    onnxruntime()
    yield "import"
    bundle = Bundle.load(arguments.bundle)
    with Segmenter(deploy(bundle, Device.parse(arguments.device), batch=1)) as segmenter:
        yield "load"
        for number, path in enumerate(_progress(arguments.frames)):
            segmenter.segment(read_image(path), bundle.prompt.default_question)
            if number == 0:
                yield "first_image"
        yield "all_images"


def _reference(arguments: argparse.Namespace) -> Iterator[str]:
    """The same of the PyTorch model."""
    from PIL import Image

    from vessel_export.parity.reference import Reference
    from vessel_rt.formats.bundle import Bundle

    yield "import"
    bundle = Bundle.load(arguments.bundle)
    reference = Reference.load(arguments.checkpoint, arguments.base, arguments.sam2, lora_alpha=bundle.provenance.lora_alpha)
    yield "load"
    for number, path in enumerate(_progress(arguments.frames)):
        with Image.open(path) as image:
            reference.segment(image, bundle.prompt.default_question, max_new_tokens=bundle.language_model.max_new_tokens)
        if number == 0:
            yield "first_image"
    yield "all_images"


_WORKERS = {"runtime": _runtime, "reference": _reference}


def _progress(folder: Path) -> tqdm[Path]:
    return tqdm(_frames(folder), unit="image", disable=None)


def _frames(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _memory(gpu: int | None) -> dict[str, float] | int:
    """`peak` and `resident` of this process in MiB; the free bytes of a GPU if one is given."""
    if gpu is not None:
        return _free_bytes(gpu)
    return {name: round(process_field(os.getpid(), "status", key) / 1024, 1) for name, key in (("peak", "VmHWM:"), ("resident", "VmRSS:"))}


def _gpu_rows(bundle: Bundle) -> Iterator[dict[str, Any]]:
    """Each GPU under each kind of device that runs `bundle` there: what is taken after each phase, and what was planned."""
    from vessel_rt.device.deployment import AUTO
    from vessel_rt.device.device_report import list_devices
    from vessel_rt.device.memory_plan import make_plan

    for report in list_devices(bundle):
        if report.gpu is None or report.fault or report.device.kind not in AUTO:  # `tensorrt` would build engines in the worker first
            continue
        before = _free_bytes(report.gpu.index)  # this process keeps the context that it makes here, so the worker's own shows
        free = _measure("runtime", "--device", str(report.device), "--gpu", str(report.gpu.index))
        taken, planned = {phase: before - free[phase] for phase in free}, make_plan(bundle, 1, report.gpu.memory).total
        yield {
            "device": str(report.device),
            "gpu": report.gpu.name,
            "taken_mib": {phase: round(size / _MIB, 1) for phase, size in taken.items()},
            "planned_mib": round(planned / _MIB, 1),
            "taken_over_planned": round(taken["all_images"] / planned, 3),
        }


def _free_bytes(gpu: int) -> int:
    """The memory that GPU `gpu`, of CUDA's order, has free, counting in what this process's context takes (ONNX Runtime uses the same)."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context, free, total = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    codes = (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), gpu),
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        cuda.cuCtxPushCurrent_v2(context),
        cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
        cuda.cuCtxPopCurrent_v2(ctypes.byref(context)),
    )
    if any(codes):
        raise VesselError(f"NVIDIA's driver does not tell the free memory of GPU {gpu} (CUDA errors {codes}): nvidia-smi may say why")
    return free.value


if __name__ == "__main__":
    raise SystemExit(main())

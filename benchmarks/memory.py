"""Memory of the runtime and of the PyTorch reference by phase, each in its own process, and GPU memory if there is a GPU.

    python -m benchmarks.memory [--bundle DIR] [--frames DIR] [--checkpoint PTH --base DIR --sam2 PT]

Both run on the CPU, the runtime in the bundle's precision, the reference in FP32, and segment the same frames one at a time. A phase ends
when everything is imported, when the model is loaded, after the first image, and after all images. Peak and current size are VmHWM and
VmRSS of /proc/self/status, so mapped files count as far as they were read; Linux only. GPU memory is the decrease of the device's free
memory since the process started, so nothing else may run there; it is compared with `vessel-rt plan` for one image at once. CPU figures are
medians of three runs. The last line is JSON.
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

if TYPE_CHECKING:  # a worker imports little besides what it measures
    from vessel_rt.formats.bundle import Bundle

_MIB = 2**20
_RUNS = 3  # of each worker: the memory that an allocator holds varies by a tenth between runs


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
    except subprocess.CalledProcessError:  # a worker, which has printed the reason
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
    parser.add_argument("--frames", type=Path, default=tiny / "frames", metavar="DIR", help="a folder with only images")
    parser.add_argument(
        "--checkpoint", type=Path, default=tiny / "iter_1000.pth", metavar="PTH", help="the checkpoint that the bundle was exported from"
    )
    parser.add_argument("--base", type=Path, default=tiny / "base", metavar="DIR")
    parser.add_argument("--sam2", type=Path, default=tiny / "sam2_tiny.pt", metavar="PT")
    parser.add_argument("--worker", choices=_WORKERS, help="run as the measured process and print its memory by phase")
    parser.add_argument("--device", default="cpu", help="device of the runtime's worker")
    parser.add_argument("--gpu", type=int, metavar="N", help="the worker prints the free bytes of GPU N, not its own memory")
    return parser.parse_args()


def _measure(worker: str, *options: str) -> dict[str, Any]:
    """The output of a worker with this command's options and `options`."""
    print(f"{worker} {' '.join(options)}".rstrip(), file=sys.stderr)
    command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--worker", worker, *options]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return measured


def _median(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The median of every number over several runs of a worker."""
    return {phase: {name: statistics.median(run[phase][name] for run in runs) for name in runs[0][phase]} for phase in runs[0]}


def _runtime(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the name of each phase at its end; the caller then reads the memory."""
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
    """As `_runtime`, for the PyTorch model."""
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
    """`peak` and `resident` of this process in MiB, or the free bytes of `gpu` if it is given."""
    if gpu is not None:
        return _free_bytes(gpu)
    return {name: round(process_field(os.getpid(), "status", key) / 1024, 1) for name, key in (("peak", "VmHWM:"), ("resident", "VmRSS:"))}


def _gpu_rows(bundle: Bundle) -> Iterator[dict[str, Any]]:
    """For each GPU and each kind of device that runs `bundle` on it: the memory taken after each phase, and the plan."""
    from vessel_rt.device.deployment import AUTO
    from vessel_rt.device.device_report import list_devices
    from vessel_rt.device.memory_plan import make_plan

    for report in list_devices(bundle):
        if report.gpu is None or report.fault or report.device.kind not in AUTO:  # `tensorrt` would first build engines in the worker
            continue
        before = _free_bytes(report.gpu.index)  # creates this process's context, so that only the worker's adds to it
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
    """The free memory of GPU `gpu` in CUDA's order, after this process's context, which ONNX Runtime also uses, is created."""
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
        raise VesselError(f"GPU {gpu}: cannot read its free memory (CUDA errors {codes}); nvidia-smi may show the reason")
    return free.value


if __name__ == "__main__":
    raise SystemExit(main())

"""The memory that a bundle takes on a CPU: an estimate, and a refusal of bundles that do not fit. Does not load anything.

Without this check, Linux kills the process in the middle of loading, without a message.

The estimate is of anonymous memory, which the system cannot take back; mapped files come on top of it as far as there is room. Its
constants were fitted to `python -m benchmarks.host_memory` with ONNX Runtime 1.32. (examples/tiny takes 230 MiB in FP32, planned 241, and
206 in FP16, planned 246.)

- weights: ONNX Runtime copies matrices to the layout of its kernels. It has no FP16 kernels for a CPU, so FP16 becomes FP32.
  sam2_image_encoder's FP32 matrices are not copied (see deployment).
- cache: a key and a value per layer and stream, [kv_heads, capacity, head_dim], for an image of all tiles.
- activations: the stages run one after the other and share an arena, so the largest stage counts, once per stream. Attention is not fused
  on a CPU, and the arena grows in powers of two; together that takes about twice the exporter's estimate.
- cines: the weights of their stages, the memories of an object, and the scores of sam2_memory_attention, of every position of a frame to
  every position of its memories and every pointer. They grow from frame to frame, so they do not fit into what the other stages left in
  the arena. Everything else of these stages does. (`python -m benchmarks.host_memory --model examples/tiny --forms fp32 fp16 --propagate
  sa2va`: 27 frames of 1024x1024 pixels are planned at 0.99 of what they take in FP32, and at 0.93 in FP16.)
"""

from __future__ import annotations

import math
from pathlib import Path

from vessel_rt.device.memory_plan import BYTES, Item, Plan
from vessel_rt.errors import BundleError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.profiles import CPU_TILES, CPU_TOKENS, MASKS_AN_IMAGE, conditioning_frames

__all__ = [
    "anonymous_memory",
    "available_memory",
    "make_host_plan",
    "needed_memory",
    "require_host_fit",
    "require_memory",
    "stage_memory",
    "total_memory",
]

_MEMINFO, _STATUS = Path("/proc/meminfo"), Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup")  # of a container: the root of its own hierarchy (cgroup v2)

_PROCESS = 160 << 20  # bytes: Python, the libraries, the tokenizer, an image
_PROCESS_OF_CINES = 140 << 20  # most frames of a cine are read without tiles
_COPIES = {"fp32": 1.0, "fp16": 2.2, "bf16": 2.2, "int8": 1.03, "int4": 1.03}  # bytes over the bytes of a stage's files
_MAPPED = ("sam2_image_encoder",)  # in FP32
_ACTIVATIONS = 2.0
_FUSED = 4096  # positions of a frame from which attention is one operator, whose scores become their softmax in place; in FP32 it always is
_FP32 = BYTES["fp32"]
_GB = 1e9


def make_host_plan(bundle: Bundle, streams: int = 1, processes: int = 1, memory: int | None = None, propagate: str | None = None) -> Plan:
    """Estimate what `processes` processes take that run `bundle` on a CPU with `streams` images at a time each.

    `memory` is the host's, in bytes; None: what is available now, or the estimate itself if the system does not tell. `propagate`: how
    objects are tracked through cines (`best-frame`, `sa2va`).

    Raises:
        BundleError: an older version exported the bundle, without the sizes that a plan needs, or without the stages of cines.
    """
    sizes, sized = bundle.language_model, bundle.sized_stages()
    quantized = bundle.quantization.matrices if bundle.quantization else {}
    items = [Item("process", processes * (_PROCESS_OF_CINES if propagate else _PROCESS))]
    for name in sized:
        kind = f", {bundle.weights}" if name in quantized else ""
        items.append(Item(f"weights: {name}{kind}", processes * stage_memory(bundle, name)))
    images = processes * streams
    items.append(Item("cache", images * _FP32 * 2 * sizes.layers * sizes.kv_heads * sizes.capacity * sizes.head_dim))
    units = {"vision_encoder": CPU_TILES, "language_model": CPU_TOKENS, "sam2_image_encoder": 1, "sam2_mask_decoder": MASKS_AN_IMAGE}
    largest = max(units[name] * stage.activation_bytes for name, stage in sized.items()) * _FP32 // BYTES[bundle.precision]
    items.append(Item("activations", int(images * _ACTIVATIONS * largest)))
    if propagate:
        items += _of_cines(bundle, propagate)
    total = sum(item.bytes for item in items)
    return Plan(str(bundle.folder), images, sizes.capacity, memory or available_memory() or total, tuple(items), bool(propagate))


def _of_cines(bundle: Bundle, propagate: str) -> list[Item]:
    """Of one process, which tracks one object at a time."""
    cine, conditioning = bundle.require_cine(), conditioning_frames(bundle, propagate)
    attention = cine.stages["sam2_memory_attention"]
    (channels, *side), (width,) = attention.input("memories").fixed, attention.input("object_pointers").fixed
    memories, pointers, positions = conditioning + cine.memories - 1, conditioning + cine.pointers - 1, math.prod(side)
    keys = memories * positions + pointers * (width // channels)
    fused = bundle.precision == "fp32" or positions >= _FUSED
    scores = _FP32 * positions * keys * (1 if fused else 2)
    items = [Item(f"weights: {name}", stage_memory(bundle, name)) for name in cine.stages]
    bank = _FP32 * (memories * channels * positions + pointers * width)
    return [*items, Item("memory bank", bank), Item("attention to memories", scores)]


def needed_memory(bundle: Bundle) -> int | None:
    """The bytes that one process takes with one image at a time; None for bundles of older versions, which do not tell."""
    try:
        return make_host_plan(bundle).total
    except BundleError:
        return None


def stage_memory(bundle: Bundle, stage: str) -> int:
    """The bytes that the weights of `stage` take in the memory of a process."""
    quantized = bundle.quantization and bundle.quantization.matrices.get(stage)
    kind = bundle.weights if quantized else bundle.precision
    return 0 if kind == "fp32" and stage in _MAPPED else int(_COPIES[kind] * bundle.weight_bytes(stage))


def total_memory() -> int | None:
    """The memory of the host in bytes, without swap; None if the system does not tell."""
    return _kilobytes(_MEMINFO, "MemTotal")


def anonymous_memory() -> int | None:
    """The memory of this process in bytes, without files that are mapped: the system cannot take it back. None if it does not tell."""
    return _kilobytes(_STATUS, "RssAnon")


def _kilobytes(path: Path, field: str) -> int | None:
    try:
        line = next(line for line in path.read_text(encoding="ascii").splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return None


def available_memory() -> int | None:
    """Bytes of memory and swap that this process can still take, within the limit of its container; None if the system does not tell."""
    memory, swap = (_kilobytes(_MEMINFO, name) for name in ("MemAvailable", "SwapFree"))
    if memory is None or swap is None:
        return None
    free = memory + swap
    try:
        limit, used = (int((_CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])  # counted as used, but given back when needed
        return min(free, limit - used + cached)
    except (OSError, KeyError, ValueError):  # no container, or no limit: memory.max is `max`
        return free


def require_memory(bundle: Bundle, streams: int = 1, processes: int = 1, propagate: str | None = None) -> None:
    """Raise BundleError if `make_host_plan` says that `bundle` does not fit in the memory that is available now.

    Nothing is refused if the estimate is unknown: on other systems than Linux, or for bundles of older versions.
    """
    try:
        plan = make_host_plan(bundle, streams, processes, propagate=propagate)
    except BundleError:
        return
    require_host_fit(bundle, plan)


def require_host_fit(bundle: Bundle, plan: Plan) -> None:
    """Raise a BundleError that says what to lower if `plan`, made for `bundle`, does not fit."""
    if plan.fits:
        return
    advice = "use a GPU, or a machine with more memory"
    if not bundle.quantization:
        advice = f"export it with --recipe cpu-int8, {advice}"
    if plan.batch > 1:
        advice = f"use fewer streams or processes (--streams, --devices), {advice}"
    raise BundleError(
        f"{bundle.folder}: needs about {plan.total / _GB:.1f} GB of memory on a CPU; {plan.memory / _GB:.1f} GB are available: {advice}"
    )

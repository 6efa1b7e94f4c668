"""The minimum time of each stage, on this machine and on NVIDIA's GPUs according to their data sheets.

    python -m benchmarks.floor [--bundle DIR] [--tiles 1 10]

A stage's floor is the larger of operations / rate and bytes / bandwidth (vessel_export.graphs.costs defines what is counted). An image's
prompt has the tokens of its tiles and 64 more. The language model has three runs: `prefill` of the prompt, `decode` of its last token,
and `draft` of the prompt and 16 tokens, whose states are returned. This machine's rates are measured: FP32 products with NumPy and copies
with all threads, and, if there is a CUDA GPU and torch, FP16 products and copies on it. Data sheets' rates are those of FP16 (the same as
BF16) with FP32 sums; for an FP32 bundle they are too high, and the floor too low. A bundle that fits in a processor's cache, such as the
tiny ones, can be read faster than memory.

A tracked frame of a cine (`vessel-rt infer --propagate`) attends to the memories of three frames that were asked about and of the last six.
Its memory encoder is FP32 in every bundle, so that its floor, too, is too low.

The result is saved as floor-<layers>-layers.json. If results/latency.json has latencies of this bundle on this machine, MFU and MBU are the
shares of rate and bandwidth that they reached. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.measure import RESULTS, machine, publish
from vessel_export.graphs.costs import counted_cost
from vessel_rt.device.rates import DATA_SHEETS, Rates
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.profiles import BEST_FRAMES, MOST_KEPT, OPT_TEXT_TOKENS
from vessel_rt.formats.stage_cost import Cost

_RUNS = 30  # short ones; the fastest counts, since other load slows most of them
_COPIED = 1 << 30  # bytes: more than any cache holds
_SIDE, _GPU_SIDE = 2048, 8192  # of the square matrices multiplied


_PROJECTED = "RTX 3090"
_IMAGE = ("vision_encoder", "draft", "sam2_image_encoder", "sam2_mask_decoder")  # the runs of one image whose draft is accepted
_ASSUMED = {"of_flops": 0.5, "of_bytes": 0.8}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=Path("engines/tiny-fp32"), metavar="DIR")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 10], metavar="N", help="tiles of an image (default: 1 10)")
    arguments = parser.parse_args()
    bundle = Bundle.load(arguments.bundle)
    costs = _costs(bundle, arguments.tiles)
    here = _here()
    rates = {**here, **DATA_SHEETS}
    name = bundle.folder.resolve().name
    result = {
        "bundle": name,
        "precision": bundle.precision,
        "layers": bundle.language_model.layers,
        "rates": {
            key: {"tflops": _short(value.flops / 1e12), "gb_per_s": _short(value.bytes / 1e9), "measured": key in here}
            for key, value in rates.items()
        },
        "stages": {str(tiles): {stage: _floors(cost, rates) for stage, cost in stages.items()} for tiles, stages in costs.items()},
        "projection": _projection(costs),
        "cine": _cine(bundle, rates),
    }
    used = _used(name, costs, here)
    publish(f"floor-{bundle.language_model.layers}-layers", result | ({"used": used} if used else {}))
    return 0


def _runs(bundle: Bundle, tiles: int) -> dict[str, tuple[str, dict[str, int]]]:
    """The runs for one image of `tiles` tiles: name -> stage and the sizes of its dynamic axes."""
    prompt = tiles * bundle.tiles.tokens_per_tile + OPT_TEXT_TOKENS
    drafted = prompt + MOST_KEPT
    return {
        "vision_encoder": ("vision_encoder", {"tiles": tiles}),
        "prefill": ("language_model", {"batch": 1, "sequence": prompt, "live": prompt, "kept": 1}),
        "decode": ("language_model", {"batch": 1, "sequence": 1, "live": prompt, "kept": 1}),
        "draft": ("language_model", {"batch": 1, "sequence": drafted, "live": drafted, "kept": MOST_KEPT}),
        "sam2_image_encoder": ("sam2_image_encoder", {"images": 1}),
        "sam2_mask_decoder": ("sam2_mask_decoder", {"images": 1, "masks": 1}),
    }


def _costs(bundle: Bundle, counts: list[int]) -> dict[int, dict[str, Cost]]:
    """Tiles -> run -> cost."""
    costs: dict[int, dict[str, Cost]] = {}
    wanted = [(tiles, name, stage, sizes) for tiles in counts for name, (stage, sizes) in _runs(bundle, tiles).items()]
    for tiles, name, stage, sizes in tqdm(wanted, desc="counting", file=sys.stderr):
        costs.setdefault(tiles, {})[name] = counted_cost(bundle, stage, sizes)
    return costs


def _floors(cost: Cost, rates: Mapping[str, Rates]) -> dict[str, Any]:
    return {"flops": cost.flops, "bytes": cost.bytes, "floor_ms": {key: _short(value.floor_ms(cost)) for key, value in rates.items()}}


def _cine(bundle: Bundle, rates: Mapping[str, Rates]) -> dict[str, Any]:
    """The runs of a tracked frame late in a cine, and the sum of their floors beside that of a frame of one tile by itself."""
    cine, runs = bundle.require_cine(), _runs(bundle, 1)
    sizes = {
        "sam2_image_encoder": {"images": 1},
        "sam2_memory_attention": {"memories": BEST_FRAMES + cine.memories - 1, "pointers": BEST_FRAMES + cine.pointers - 1},
        "sam2_tracking_decoder": {},
        "sam2_memory_encoder": {},
    }
    tracked = {stage: counted_cost(bundle, stage, of_stage) for stage, of_stage in sizes.items()}
    alone = [counted_cost(bundle, *runs[run]) for run in _IMAGE]
    sums = {key: [sum(map(value.floor_ms, costs)) for costs in (alone, tracked.values())] for key, value in rates.items()}
    return {
        **sizes["sam2_memory_attention"],
        "stages": {stage: _floors(cost, rates) for stage, cost in tracked.items()},
        "frame_ms": {key: dict(zip(("alone", "tracked"), map(_short, both), strict=True)) for key, both in sums.items()},
        "ratio": {key: round(both[0] / both[1], 2) for key, both in sums.items()},
    }


def _projection(costs: Mapping[int, Mapping[str, Cost]]) -> dict[str, Any]:
    """Milliseconds of one image whose draft is accepted, by tiles: the sum of the floors of its runs."""
    rates = DATA_SHEETS[_PROJECTED]

    def total(**shares: float) -> dict[str, float]:
        return {str(tiles): _short(sum(rates.floor_ms(stages[run], **shares) for run in _IMAGE)) for tiles, stages in costs.items()}

    assumed = f"an assumption, not measured: {_ASSUMED['of_flops']} of the data sheet's rate, {_ASSUMED['of_bytes']} of its bandwidth"
    return {
        "gpu": _PROJECTED,
        "runs": list(_IMAGE),
        "tokens_after_prompt": MOST_KEPT,
        "cases": [
            {"assumption": "at the data sheet's rates", "ms": total()},
            {"assumption": assumed, "ms": total(**_ASSUMED)},
        ],
    }


def _used(bundle: str, costs: Mapping[int, Mapping[str, Cost]], here: Mapping[str, Rates]) -> dict[str, Any]:
    """MFU and MBU of this machine's latencies of `bundle`; empty if there are none."""
    path = RESULTS / "latency.json"
    if not path.exists():
        return {}
    latency = json.loads(path.read_text(encoding="utf-8"))
    this = machine()
    if latency.get("bundle") != bundle or any(latency.get("machine", {}).get(key) != this[key] for key in ("cpu", "cores")):
        return {}
    device = "cpu" if latency.get("device", "cpu") == "cpu" else "gpu"
    if device not in here:
        return {}
    rates = here[device]
    return {
        str(tiles): {
            run: {  # drafts were on, so the language model ran `draft`
                "ms": ms,
                **dict(zip(("mfu", "mbu"), map(_short, rates.used(cost, ms)), strict=True)),
            }
            for run, cost in stages.items()
            if (ms := latency.get("stages", {}).get(str(tiles), {}).get(run.replace("draft", "language_model"), {}).get("ms"))
        }
        for tiles, stages in costs.items()
    }


def _here() -> dict[str, Rates]:
    """This machine's measured rates: its CPU's in FP32, and its GPU's in FP16 if torch finds one."""
    rates = {"cpu": Rates(_cpu_flops(), _cpu_bandwidth())}
    gpu = _gpu()
    return rates if gpu is None else {**rates, "gpu": gpu}


def _best(what: str, run: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs, after one to warm up."""
    seconds = []
    for _ in tqdm(range(_RUNS + 1), desc=what, file=sys.stderr):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _cpu_flops() -> float:
    a, b = np.random.default_rng(0).standard_normal((2, _SIDE, _SIDE), dtype=np.float32)
    out = np.empty_like(a)
    return 2 * _SIDE**3 / _best("FP32 products", lambda: np.matmul(a, b, out=out))


def _cpu_bandwidth() -> float:
    """Bytes per second read and written by copies with all threads."""
    threads = os.cpu_count() or 1
    source, target = np.ones(_COPIED, np.uint8), np.ones(_COPIED, np.uint8)  # ones, so that all pages are allocated
    pairs = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best("copies", lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs)))
    return 2 * _COPIED / seconds


def _gpu() -> Rates | None:
    """The first CUDA GPU's rates: FP16 products, and copies in its memory; None without one, or without torch."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    a, b = torch.randn(2, _GPU_SIDE, _GPU_SIDE, dtype=torch.float16, device="cuda")
    out = torch.empty_like(a)
    source = torch.ones(_COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def product() -> None:
        torch.matmul(a, b, out=out)
        torch.cuda.synchronize()

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return Rates(2 * _GPU_SIDE**3 / _best("FP16 products, GPU", product), 2 * _COPIED / _best("copies, GPU", copy))


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


if __name__ == "__main__":
    sys.exit(main())

"""Exports a full-size model: memory, time and bytes, compared with copying the result and with an export without this project.

    python -m benchmarks.export --model DIR [--peer-layers 2 4 8 16]

benchmarks.synth writes DIR. The peer is `PeftModel.merge_and_unload` and `torch.onnx.export` of the language model alone, with each number
of `--peer-layers` until one does not fit in memory. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Usage, publish, run

_SCRIPT = Path(sys.executable).with_name("vessel-export")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model written by `python -m benchmarks.synth`")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the bundle to make, which is not removed (default: next to the model)")
    parser.add_argument("--recipe", type=Path, default=Path("engines/rtx3090.toml"), metavar="TOML")
    parser.add_argument("--peer-layers", type=int, nargs="*", default=[], metavar="N", help="numbers of layers for the peer")
    parser.add_argument("--peer-limit-gib", type=float, default=20, metavar="GIB", help="anonymous memory at which the peer is killed")
    arguments = parser.parse_args()
    out = arguments.out or arguments.model.with_name(arguments.model.name + "-bundle")
    result = _ours(arguments.model, arguments.recipe, out)
    if result and arguments.peer_layers:
        result["peer"] = _peers(arguments.model, arguments.peer_layers, int(arguments.peer_limit_gib * 2**30), out.with_name("peer"))
    if result:
        publish("export", result)
    return 0 if result else 1


def _ours(model: Path, recipe: Path, out: Path) -> dict[str, Any]:
    """The export, then a copy of its result. Both read from the disk and end when the last byte is on it."""
    [checkpoint], [sam2] = model.glob("iter_*.pth"), model.glob("sam2_*.pt")
    command: list[str | Path] = [
        _SCRIPT,
        "export",
        "--ckpt",
        checkpoint,
        "--base",
        model / "base",
        "--sam2",
        sam2,
        "--recipe",
        recipe,
        "--out",
        out,
        "--no-golden",
    ]
    shutil.rmtree(out, ignore_errors=True)  # files of an older bundle would be linked, not written
    _drop_from_cache(model)
    usage = run(command)
    synced = time.perf_counter()
    os.sync()
    seconds = usage.seconds + time.perf_counter() - synced
    if usage.exit_code:
        print(usage.errors, file=sys.stderr)
        return {}
    copied = min(_copy(out) for _ in range(2))  # a virtual machine's memory is slow at first use, which must not favour the export
    bundle = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "layers": _layers(model),
        "bundle_bytes": bundle,
        "seconds": round(seconds, 1),
        "copy_seconds": round(copied, 1),
        "time_over_copy": round(seconds / copied, 2),
        "peak_anonymous_gib": round(usage.peak_anonymous_bytes / 2**30, 2),
        "bytes_written_over_bundle": round(usage.bytes_written / bundle, 3),
    }


def _copy(folder: Path) -> float:
    """Seconds to copy `folder` on its own disk."""
    copy = folder.with_name(f".{folder.name}.copy")
    shutil.rmtree(copy, ignore_errors=True)
    _drop_from_cache(folder)
    began = time.perf_counter()
    shutil.copytree(folder, copy)
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(copy)
    return seconds


def _drop_from_cache(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that they are read from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _layers(model: Path) -> int:
    return int(json.loads((model / "base" / "config.json").read_text())["llm_config"]["num_hidden_layers"])


def _peers(model: Path, depths: list[int], limit: int, out: Path) -> list[dict[str, Any]]:
    """The peer at each depth, up to and including the first that does not fit."""
    rows = []
    for layers in sorted(depths):
        usage = run([sys.executable, "-m", "benchmarks.export_peer", model, str(layers), out], limit_bytes=limit)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else 0
        shutil.rmtree(out, ignore_errors=True)
        rows.append(_row(layers, usage, size))
        print(f"peer, {layers} layers: {rows[-1]}", file=sys.stderr)
        if usage.exit_code:
            break
    return rows


def _row(layers: int, usage: Usage, size: int) -> dict[str, Any]:
    return {
        "layers": layers,
        "fits": usage.exit_code == 0,
        "seconds": round(usage.seconds, 1),
        "peak_anonymous_gib": round(usage.peak_anonymous_bytes / 2**30, 2),
        "bytes": size,
        "end": usage.errors.strip().rpartition("\n")[2][:200] if usage.exit_code else "",
    }


if __name__ == "__main__":
    raise SystemExit(main())

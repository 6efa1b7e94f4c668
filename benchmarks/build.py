"""Builds a bundle's engines, stage by stage: seconds, peak memory of the build and all its processes, size of the engine.

    python -m benchmarks.build --bundle DIR [--recipe engines/rtx3090-int8.toml] [--describe sm86] [--partitions 4 8]

All engines are built in a folder of hard links next to the bundle; each is removed after it is measured. `--partitions` builds the language
model once for each number of partitions, instead of the recipe's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import Usage, publish, run
from vessel_rt.formats.bundle import CINE_STAGES, STAGES, Bundle
from vessel_rt.formats.engine_sidecar import ENGINES, Engine
from vessel_rt.formats.recipe import load_recipe

_SCRIPT = Path(sys.executable).with_name("vessel-export")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.build", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    parser.add_argument("--recipe", type=Path, default=Path("engines/rtx3090.toml"), metavar="TOML")
    parser.add_argument("--describe", metavar="ARCH", help="build for a GPU that this machine does not have")
    parser.add_argument("--stage", action="append", choices=(*STAGES, *CINE_STAGES), help="only this stage; may be repeated (default: all)")
    parser.add_argument("--partitions", type=int, nargs="+", metavar="N", help="of the language model (default: the recipe's)")
    arguments = parser.parse_args()
    engines = load_recipe(arguments.recipe).engines
    if engines is None:
        parser.error(f"{arguments.recipe}: has no [engines]; give --recipe one that has")
    bundle = Bundle.load(arguments.bundle)
    copy = _linked_copy(bundle)
    rows = []
    try:
        for stage in arguments.stage or bundle.all_stages:
            for partitions in (arguments.partitions or [engines.language_model_partitions]) if stage == "language_model" else [1]:
                row = _measure(copy, stage, arguments.recipe, partitions, arguments.describe)
                if row is None:
                    return 1
                rows.append(row)
                print(
                    "{stage}, {partitions} partitions: {seconds} s, {peak_anonymous_gib} GiB, {engine_bytes} bytes".format(**row),
                    flush=True,
                )
    finally:
        shutil.rmtree(copy)
    quantized = f"-{bundle.quantization.weights}" if bundle.quantization else ""
    publish(
        f"build-{engines.architecture}{quantized}-{bundle.language_model.layers}-layers",
        {
            "architecture": engines.architecture,
            "stub_gpu": arguments.describe is not None,
            "precision": bundle.precision,
            "weights": bundle.weights,
            "layers": bundle.language_model.layers,
            "bundle_bytes": sum(record.bytes for record in bundle.files.values()),
            "stages": rows,
        },
    )
    return 0


def _linked_copy(bundle: Bundle) -> Path:
    copy = Path(tempfile.mkdtemp(prefix=f".{bundle.folder.name}.", dir=bundle.folder.parent))
    for name in (*bundle.files, "bundle.json"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(bundle.folder / name, copy / name)
    return copy


def _measure(bundle: Path, stage: str, recipe: Path, partitions: int, describe: str | None) -> dict[str, Any] | None:
    """Build one stage in `bundle` and remove it again."""
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / recipe.name
        changed.write_text(re.sub(r"language_model_partitions *= *\d+", f"language_model_partitions = {partitions}", recipe.read_text()))
        command: list[str | Path] = [_SCRIPT, "build", "--bundle", bundle, "--recipe", changed, "--stage", stage]
        usage: Usage = run([*command, *(["--describe", describe] if describe else [])])
    if usage.exit_code:
        print(usage.errors, file=sys.stderr)
        return None
    [sidecar] = bundle.glob(f"{ENGINES}/*/{stage}.json")
    files = Engine.load(sidecar).files
    shutil.rmtree(bundle / ENGINES)
    return {
        "stage": stage,
        "partitions": len(files) - 1,
        "seconds": round(usage.seconds, 1),
        "peak_anonymous_gib": round(usage.peak_anonymous_bytes / 2**30, 2),
        "weights_bytes": Bundle.load(bundle).weight_bytes(stage),
        "engine_bytes": sum(record.bytes for record in files.values()),
    }


if __name__ == "__main__":
    sys.exit(main())

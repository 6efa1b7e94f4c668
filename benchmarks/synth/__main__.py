"""Write a random model of the real size: base model, SAM2 and checkpoint.

python -m benchmarks.synth --out out/full/model
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.synth.random_model import LAYERS, full_size, write_synth
from vessel_rt.errors import VesselError

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Write the model; returns the exit code: 0 on success, 1 if it cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synth", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make (20 GB at full size)")
    parser.add_argument(
        "--layers", type=int, default=LAYERS, metavar="N", help=f"depth, at the real model's widths (default: {LAYERS}, all)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed gives the same bytes (default: 0)")
    parser.add_argument("--no-outliers", dest="outliers", action="store_false", help="no activations beyond FP16's range")
    arguments = parser.parse_args(argv)
    try:
        size = write_synth(arguments.out, full_size(arguments.layers, seed=arguments.seed, outliers=arguments.outliers))
    except VesselError as e:
        print(f"benchmarks.synth: error: {e}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: random model of {arguments.layers} layers, {size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Where the repository and its small trained model are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """The paths of examples/tiny."""

    base: Path
    sam2: Path
    checkpoint: Path
    frames: Path
    annotations: Path

"""Writes run.json. Does not know whether its content comes from one run or from merged shards."""

from __future__ import annotations

import json
from pathlib import Path

from vessel_rt.io.files import replacing, writing
from vessel_rt.results.reader import RUN_FILE
from vessel_rt.results.schema import RunFile

__all__ = ["write_run"]


def write_run(output: Path, run: RunFile) -> None:
    """Write run.json into an output folder. Raises VesselError."""
    path = output / RUN_FILE
    with writing(path), replacing(path, sync=True) as temporary:
        temporary.write_text(json.dumps(run, indent=1) + "\n", encoding="ascii")

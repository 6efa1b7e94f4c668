"""Whether this file system grants read leases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vessel_rt.io.checked_files import leases


def has_leases(path: Path) -> bool:
    held: dict[str, bool] = {}
    with leases([path]):
        child = subprocess.run(
            [sys.executable, "-c", f"import os; os.open({str(path)!r}, os.O_WRONLY | os.O_NONBLOCK)"], capture_output=True
        )
        held["it"] = child.returncode != 0
    return held["it"]

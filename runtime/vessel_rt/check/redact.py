"""Messages without what they tell of the machine and its user: paths outside the bundle, and host names. Does not know who says them."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

__all__ = ["redactor"]

_HOST = re.compile(r"hostname=[^\s;,]+", re.IGNORECASE)  # in ONNX Runtime's errors about CUDA
# Absolute paths of every system. A path ends at a blank, a quote or a sign that ends a clause.
_PATH = re.compile(r"(?<![\w.:/\\-])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\:;,'\"()<>|]+)+[/\\]?")


def redactor(bundle: Path) -> Callable[[str], str]:
    """A function that shortens a message: the bundle's folder becomes `bundle`, other paths their last component, and host names vanish."""
    folders = sorted({str(bundle), os.path.abspath(bundle), os.path.realpath(bundle)}, key=len, reverse=True)
    known = re.compile("|".join(rf"(?<![\w.-]){re.escape(folder)}(?![\w.-])" for folder in folders))
    host = platform.node()

    def redact(message: str) -> str:
        text = _PATH.sub(_last, _HOST.sub("hostname=...", known.sub("bundle", message)))
        return re.sub(rf"(?<!\w){re.escape(host)}(?!\w)", "...", text) if len(host) > 3 else text

    return redact


def _last(found: re.Match[str]) -> str:
    return f".../{re.split(r'[/\\]', found[0].rstrip('/\\'))[-1]}"

"""Messages without what they tell of the machine and its user: paths outside the bundle, and host names. Does not know who says them."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["redactor"]

_HOST = re.compile(r"hostname=[^\s;,]+", re.IGNORECASE)  # in ONNX Runtime's errors about CUDA
# Absolute paths of every system, and those below the home folder; not the addresses of pages. They end at a blank, a quote, or a sign that
# ends a clause: folders whose names have blanks are known ones.
_PATH = re.compile(
    r"(?<![\w./\\-])(?<!https:)(?<!http:)(?:~|[A-Za-z]:|\.\.\.)?[/\\]{1,2}[^\s/\\:;,'\"()<>|]+(?:[/\\][^\s/\\:;,'\"()<>|]+)*[/\\]?"
)


def redactor(bundle: Path) -> Callable[[str], str]:
    """A function that shortens a message: the bundle's folder becomes `bundle`, other paths their last component, and host names vanish."""
    own = _pattern({str(bundle), os.path.abspath(bundle), os.path.realpath(bundle)})
    others = _pattern({str(folder) for folder in (Path.home(), Path.cwd(), sys.prefix, sys.base_prefix) if len(Path(folder).parts) > 1})
    host = platform.node()

    def redact(message: str) -> str:
        text = others.sub("...", own.sub("bundle", _HOST.sub("hostname=...", message)))
        text = _PATH.sub(lambda found: ".../" + found[0].replace("\\", "/").rstrip("/").rpartition("/")[2], text)
        return re.sub(rf"(?<!\w){re.escape(host)}(?!\w)", "...", text) if len(host) > 3 else text

    return redact


def _pattern(folders: Iterable[str]) -> re.Pattern[str]:
    """Matches the whole names of folders, the longest first."""
    found = "|".join(re.escape(folder) for folder in sorted(folders, key=len, reverse=True))
    return re.compile(rf"(?<![\w.-])(?:{found})(?![\w.-])")

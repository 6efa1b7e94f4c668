"""Runs cases in child processes and judges how they end.

A case is a kind and a seed. It is acceptable that it is done or refused; it is not that it ends by a traceback, a signal, a wrong exit
code, after the time limit, or with a good result lost. A child runs many cases, since starting Python takes longer than most of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

__all__ = ["Outcome", "run_cases"]

ACCEPTABLE = ("done", "refused")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the case `seed` of `kind` ended: `done`, `refused`, or else what was wrong; `output` is what it printed."""

    kind: str
    seed: int
    verdict: str
    output: str = ""
    folder: Path | None = None

    @property
    def acceptable(self) -> bool:
        return self.verdict in ACCEPTABLE


def run_cases(kind: str, first: int, count: int, *, seconds: float, keep: Path) -> Iterator[Outcome]:
    """Run the cases first, first + 1, ...; each may take `seconds`. The folder of an unacceptable one is copied to `keep`."""
    seed, end = first, first + count
    while seed < end:
        with tempfile.TemporaryDirectory(prefix=f"fuzz-{kind}-") as folder:
            for outcome in _in_one_child(kind, seed, end, Path(folder), seconds):
                if not outcome.acceptable:
                    outcome = dataclasses.replace(outcome, folder=_kept(outcome, Path(folder), keep))
                yield outcome
                seed = outcome.seed + 1


def _in_one_child(kind: str, first: int, end: int, folder: Path, seconds: float) -> Iterator[Outcome]:
    """The outcomes until the end, or until the child dies or is killed: then the case it was at is the last."""
    command = [sys.executable, "-m", "tests.fuzz.child", kind, str(first), str(end), str(folder)]
    environment = os.environ | {"VESSEL_KEY": str(folder / "study-codes.key"), "PYTHONFAULTHANDLER": "1"}
    log = folder / "output.txt"
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    ) as child:
        assert child.stdout
        seed, buffer = first, b""
        waiting = selectors.DefaultSelector()
        waiting.register(child.stdout, selectors.EVENT_READ)
        try:
            while seed < end:
                # The first answer waits for imports and for what the kind prepares.
                if not waiting.select(seconds if seed > first else seconds + 120):
                    yield Outcome(kind, seed, f"took more than {seconds:.0f} s", _read(log))
                    return
                piece = os.read(child.stdout.fileno(), 1 << 16)
                if not piece:
                    yield Outcome(kind, seed, f"the process ended: {child.wait()}", _read(log))
                    return
                *lines, buffer = (buffer + piece).split(b"\n")
                for line in lines:
                    outcome = Outcome(**json.loads(line))
                    yield outcome
                    seed = outcome.seed + 1
                    if not outcome.acceptable:  # the child ends with it
                        return
        finally:
            child.kill()


def _read(path: Path) -> str:
    return path.read_text(errors="replace")[-4000:] if path.exists() else ""


def _kept(outcome: Outcome, folder: Path, keep: Path) -> Path:
    place = keep / f"{outcome.kind}-{outcome.seed}"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "case", place, symlinks=True, dirs_exist_ok=True) if (folder / "case").exists() else place.mkdir(parents=True)
    (place / "OUTCOME.txt").write_text(f"{outcome.verdict}\n\n{outcome.output}\n", errors="replace")
    return place

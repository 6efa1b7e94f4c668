"""`python -m tests.fuzz.child KIND FIRST END FOLDER`: runs cases and writes an Outcome, as JSON, a line each, to standard output."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import traceback
from pathlib import Path

from tests.fuzz.kinds import KINDS, Unacceptable

_MOST_MEMORY = 12 << 30  # bytes of address space: a case that wants more gets a MemoryError rather than the machine's last page


def main(kind: str, first: int, end: int, folder: Path) -> None:
    replies = os.fdopen(os.dup(1), "w")
    log = os.open(folder / "output.txt", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):  # what C libraries print, too
        os.dup2(log, descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    case, prepared = folder / "case", folder / "prepared"
    prepared.mkdir()
    target = KINDS[kind](prepared)
    for seed in range(first, end):
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        os.ftruncate(log, 0)
        os.lseek(log, 0, os.SEEK_SET)
        try:
            verdict = target(random.Random(f"{kind}-{seed}"), case)
        except Unacceptable as e:
            verdict = str(e)
        except Exception:
            verdict = traceback.format_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        said = (folder / "output.txt").read_text(errors="replace")
        if "Traceback (most recent call last)" in said and verdict in ("done", "refused"):
            verdict = "printed a traceback"
        replies.write(json.dumps({"kind": kind, "seed": seed, "verdict": verdict, "output": said[-4000:]}) + "\n")
        replies.flush()
        if verdict not in ("done", "refused"):  # the case's folder is to be looked at
            return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))

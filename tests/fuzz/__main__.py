"""`python -m tests.fuzz --minutes 60`: cases of every kind in turn, then counts. The exit code is 1 if any was unacceptable."""

from __future__ import annotations

import argparse
import collections
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.kinds import KINDS
from tests.fuzz.runner import Outcome, run_cases

_AT_ONCE = 50  # cases of one kind before the next has its turn


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="may be repeated (default: all)")
    parser.add_argument("--first", type=int, default=100_000, help="the first seed; those of the tests are below it")
    parser.add_argument("--count", type=int, help="this many cases of each kind, whatever the time")
    parser.add_argument("--jobs", type=int, default=2, help="processes at one time")
    parser.add_argument("--seconds", type=float, default=10, help="that a case may take")
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="where unacceptable cases are kept")
    arguments = parser.parse_args()
    kinds = arguments.kind or sorted(KINDS)
    deadline = time.monotonic() + 60 * arguments.minutes
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in kinds}
    bad: list[Outcome] = []
    lock = threading.Lock()

    def run(kind: str, first: int) -> None:
        count = min(_AT_ONCE, arguments.count or _AT_ONCE)
        for outcome in run_cases(kind, first, count, seconds=arguments.seconds, keep=arguments.keep):
            with lock:
                counts[kind][outcome.verdict if outcome.acceptable else "UNACCEPTABLE"] += 1
                if not outcome.acceptable:
                    bad.append(outcome)
                    print(f"{kind} {outcome.seed}: {outcome.verdict.strip().splitlines()[-1]} (see {outcome.folder})", flush=True)
            if time.monotonic() > deadline and arguments.count is None:
                return

    rounds = range(arguments.first, arguments.first + (arguments.count or 10**9), _AT_ONCE)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for first in rounds:
            if time.monotonic() > deadline and arguments.count is None:
                break
            list(pool.map(run, kinds, [first] * len(kinds)))
    for kind, counted in counts.items():
        print(f"{kind:14}", ", ".join(f"{number} {verdict}" for verdict, number in sorted(counted.items())))
    print(f"{sum(counted.total() for counted in counts.values())} cases, {len(bad)} unacceptable")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

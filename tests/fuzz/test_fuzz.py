"""A fixed few cases of every kind. `make fuzz MINUTES=60` runs new ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.kinds import KINDS
from tests.fuzz.runner import run_cases

SECONDS = 120  # for one case: a case that hangs never ends, and a busy machine is slow


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_damaged_input_is_done_or_refused(kind: str, tmp_path: Path) -> None:
    outcomes = list(run_cases(kind, 0, 40, seconds=SECONDS, keep=tmp_path))
    assert [(outcome.seed, outcome.verdict, outcome.output) for outcome in outcomes if not outcome.acceptable] == []
    assert len(outcomes) == 40

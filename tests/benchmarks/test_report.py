"""The tables of docs/performance.md match benchmarks/results/."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report


def test_the_document_is_what_the_results_say() -> None:
    document = Path("docs/performance.md").read_text(encoding="utf-8")
    assert report.filled(document) == document
    assert all(f"<!-- {name} -->" in document for name in report._TABLES)


def test_a_table_that_is_not_known() -> None:
    with pytest.raises(KeyError, match="nothing"):
        report.filled("<!-- nothing -->\n<!-- /nothing -->")

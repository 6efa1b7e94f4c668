"""The tables of the documents match benchmarks/results/."""

from __future__ import annotations

import pytest

from benchmarks import report


def test_the_document_is_what_the_results_say() -> None:
    text = "".join(document.read_text(encoding="utf-8") for document in report.DOCUMENTS)
    assert report.filled(text) == text
    assert all(f"<!-- {name} -->" in text for name in report._TABLES)


def test_a_table_that_is_not_known() -> None:
    with pytest.raises(KeyError, match="nothing"):
        report.filled("<!-- nothing -->\n<!-- /nothing -->")

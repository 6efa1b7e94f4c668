"""What can be checked of the documents: that links lead somewhere, and that the two READMEs say the same things in the same order."""

from __future__ import annotations

import re
from typing import Any, get_type_hints

import pytest

from docs.make_formats import FILES, PAGE, documented, page, reachable
from tests.support.paths import ROOT
from vessel_export.cli import main as export_main
from vessel_rt.cli import main as runtime_main

FOLDERS = (".", "docs", "engines", "examples/tiny")
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
KINDS = dict.fromkeys(found for _, kinds in FILES for kind in kinds for found in reachable(kind))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    document = ROOT / name
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_the_chinese_readme_is_true_to_the_english_one() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    for pattern in (
        r"^\$ (.*?)\s*(?:#.*)?$",  # commands
        r"^(#+) ",  # headings
        r"^\| `(\w+)` \|.*\| `([^`<]*)",  # variables of make, and their defaults
        r"^  ([\w.]+)[ 、,/]",  # outputs
        r"\]\((?!README)([^)]+)\)",  # links
        r"`(--[\w-]+)",  # options
    ):
        found = re.findall(pattern, english, re.MULTILINE)
        assert found
        assert found == re.findall(pattern, chinese, re.MULTILINE), pattern


def test_the_page_of_formats_is_that_of_the_types() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_is_described(kind: type) -> None:
    summary, described = documented(kind)
    assert summary
    assert list(described) == list(get_type_hints(kind)), kind


@pytest.mark.parametrize(("program", "main"), [("vessel-rt", runtime_main), ("vessel-export", export_main)])
def test_every_command_and_option_in_the_documents_is_there(program: str, main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    lines = set(re.findall(rf"^\$ (?:\.venv/bin/)?{program} (\w[^#\n]+)", text, re.MULTILINE))
    assert lines
    for line in lines:
        with pytest.raises(SystemExit):
            main([line.split()[0], "--help"])
        told = capsys.readouterr().out
        for option in re.findall(r"\s(--?[a-z][\w-]*)", line):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", told), line

"""The notebook in examples/, cell by cell, as someone runs it who has done `make demo`; no Jupyter is needed."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.paths import ROOT, Tiny

NOTEBOOK = ROOT / "examples" / "segment.ipynb"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `IPython.display.display` is given."""
    values: list[Any] = []
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    display.display = values.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return values


@pytest.mark.parametrize("opened_from", [".", "examples"])
def test_the_notebook_runs(
    tiny: Tiny,
    fp32_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shown: list[Any],
    capsys: pytest.CaptureFixture[str],
    opened_from: str,
) -> None:
    for link, target in (("engines/tiny-fp32", fp32_bundle), ("examples/tiny", tiny.frames.parent)):
        (tmp_path / link).parent.mkdir()
        (tmp_path / link).symlink_to(target)
    monkeypatch.chdir(tmp_path / opened_from)
    names: dict[str, Any] = {}
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert len(shown) == 6
    assert all(isinstance(picture, Image.Image) for picture in shown)
    assert names["mask"].area > 0
    assert capsys.readouterr().out.count("% of the image") == 4


def test_the_notebook_is_small_and_stores_no_output() -> None:
    assert NOTEBOOK.stat().st_size < 100_000
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None

"""A page with measurements that loads and runs nothing: its frame, and the panel about the machine. Does not know what was measured."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from string import Template

from vessel_rt.io.files import replacing, writing
from vessel_rt.measure.schema import MachineFacts

__all__ = ["machine_panel", "page", "tiles_text", "write_texts"]


def page(title: str, outcome: str, verdict: str, about: str, sections: Iterable[str], style: str = "") -> str:
    """The text of a page. `outcome` is `pass`, `fail` or `skip`. The same content gives the same bytes.

    Args:
        title: the program.
        outcome: how the verdict is coloured.
        verdict: the result in one line, as text.
        about: what was measured, as text.
        sections: panels in HTML; empty ones are left out.
        style: more rules in CSS.
    """
    template = Template(importlib.resources.files("vessel_rt.measure").joinpath("page.html").read_text(encoding="utf-8"))
    panels = "\n".join(filter(None, sections))
    return template.substitute(title=title, outcome=outcome, verdict=escape(verdict), about=escape(about), sections=panels, style=style)


def machine_panel(machine: MachineFacts, more: Mapping[str, str], heading: str = "Machine") -> str:
    """The panel about the machine; `more` are facts that are shown after its own."""
    gib = 2**30
    gpus = [f"{gpu.name}, {gpu.architecture}, {gpu.memory_bytes / gib:.1f} GiB" for gpu in machine.gpus]
    facts = {
        "system": machine.system,
        "processor": machine.cpu,
        "cores": str(machine.cores),
        "instruction sets": " ".join(machine.features),
        "memory": None if machine.memory_bytes is None else f"{machine.memory_bytes / gib:.1f} GiB",
        "GPUs": "; ".join(gpus),
        "NVIDIA driver": machine.driver,
    }
    return (
        f'<section class="panel"><h2>{escape(heading)}</h2><dl class="pairs">{"".join(_pairs({**facts, **more}))}</dl>'
        f'<h3>Versions</h3><dl class="pairs">{"".join(_pairs(machine.versions))}</dl></section>'
    )


def _pairs(facts: Mapping[str, str | None] | Mapping[str, str]) -> Iterator[str]:
    for name, value in facts.items():
        if value:
            yield f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"


def tiles_text(count: int) -> str:
    """A number of tiles in words."""
    return f"{count} tile{'s' * (count > 1)}"


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files into `folder`, each in one step. Raises VesselError."""
    for name, text in texts.items():
        path = folder / name
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")

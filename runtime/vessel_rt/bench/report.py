"""Writes bench.json, and bench.html: one page with the table and the plots that loads nothing. Does not know how anything is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from vessel_rt.bench.plots import STYLE, by_batch, by_step
from vessel_rt.bench.schema import BENCH_FILE, BenchFile, BenchRun
from vessel_rt.bench.table import TEXTS, Line, columns, describe, fault_place, lines_of
from vessel_rt.formats.schema import to_json
from vessel_rt.measure import page as measure_page
from vessel_rt.measure.page import machine_panel, tiles_text, write_texts

__all__ = ["BENCH_PAGE", "page", "write_bench"]

BENCH_PAGE = "bench.html"
_STYLE = """main { max-width: 1280px; }
.wide { margin-bottom: 8px; }
.wide td, .wide th { padding-right: 12px; }
.wide .text { white-space: nowrap; }
@media (max-width: 720px) { .panel .wide tr { display: table-row; } .panel .wide tr > * { padding: 4px 16px 4px 0; } }
"""


def write_bench(output: Path, found: BenchFile) -> None:
    """Write both files into the folder `output`, each in one step. Raises VesselError."""
    write_texts(output, {BENCH_FILE: to_json(found), BENCH_PAGE: page(found)})


def page(found: BenchFile) -> str:
    """The text of bench.html. The same content gives the same bytes."""
    lines = lines_of(found)
    measured = [line for line in lines if not line.row.fault]
    finished = all(run.finished for run in found.runs)
    outcome = "skip" if not finished else "pass" if measured else "fail"
    verdict = _verdict(measured) if finished else "NOT FINISHED"
    about = "; ".join(f"{number}: {describe(run)}" if len(found.runs) > 1 else describe(run) for number, run in enumerate(found.runs, 1))
    sections = [_table(lines), *_plots(measured), *_machines(found.runs)]
    return measure_page.page("vessel-rt bench", outcome, verdict, about, sections, _STYLE + STYLE)


def _verdict(measured: Sequence[Line]) -> str:
    """The fastest row, of the frames with the fewest tiles."""
    if not measured:
        return "Nothing could be measured"
    tiles = min(line.row.tiles or 0 for line in measured)
    fastest = max((line for line in measured if line.row.tiles == tiles), key=lambda line: line.row.images_per_second or 0.0)
    row, machine = fastest.row, f", machine {fastest.machine}" if fastest.machine else ""
    images = "one image" if row.batch == 1 else f"{row.batch} images"
    return f"{row.images_per_second:.2f} images/s of {tiles_text(tiles)}: {fastest.bundle} on {fastest.device}{machine}, {images} at once"


def _table(lines: Sequence[Line]) -> str:
    shown = columns(lines)
    head = "".join(f"<th{_aligned(title)}>{escape(title)}</th>" for title, _ in shown)
    rows = []
    for line in lines:
        if line.row.fault:
            rows.append(f'<tr><td colspan="{len(shown)}"><p class="fail">{escape(f"{fault_place(line)}: {line.row.fault}")}</p></td></tr>')
        else:
            rows.append(f"<tr>{''.join(f'<td{_aligned(title)}>{escape(text(line))}</td>' for title, text in shown)}</tr>")
    note = (
        '<p class="dim">Medians, in milliseconds per image. Host: the peak of the process\'s anonymous memory up to that batch size; '
        "device mem.: that of the GPU's. Least IoU: with the masks of the FP32 bundle.</p>"
    )
    table = f'<table class="wide"><thead><tr>{head}</tr></thead>{"".join(rows)}</table>'
    return f'<section class="panel"><h2>Measurements</h2>{table}{note}</section>'


def _aligned(title: str) -> str:
    return ' class="text"' if title in TEXTS else ' class="number"'


def _plots(measured: Sequence[Line]) -> Iterator[str]:
    """A panel of each plot for every number of tiles."""
    for tiles in sorted({line.row.tiles or 0 for line in measured}):
        lines = [line for line in measured if line.row.tiles == tiles]
        for title, plot in (("Images per second", by_batch(lines)), ("Time of an image", by_step(lines))):
            if plot:
                yield f'<section class="panel"><h2>{title}, {tiles_text(tiles)}</h2>{plot}</section>'


def _machines(runs: Sequence[BenchRun]) -> Iterator[str]:
    for number, run in enumerate(runs, start=1):
        bundles = [
            f"{bundle.checkpoint}, {bundle.precision}, {bundle.weights} weights, {bundle.layers} layers, {bundle.sha256[:12]}"
            for bundle in run.bundles
            if bundle
        ]
        frames = ", ".join(f"{each.count} of {tiles_text(each.tiles)}" for each in run.frames)
        more = {
            "measured": f"{run.started.replace('T', ' ').replace('+00:00', ' UTC')}, {run.seconds:.0f} s, {run.rounds} rounds",
            "frames": f"{frames} ({'the goldens' if run.source == 'goldens' else 'given'})",
            "question": run.question,
            "bundles": "; ".join(bundles),
        }
        yield machine_panel(run.machine, more, f"Machine {number}" if len(runs) > 1 else "Machine")

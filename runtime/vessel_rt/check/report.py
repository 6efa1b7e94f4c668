"""Writes check.json, and check.html: one page that shows the same and loads nothing. Does not know how anything is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from vessel_rt.check.schema import CHECK_FILE, CheckFile, CheckLine, StageError, StepTime
from vessel_rt.formats.schema import to_json
from vessel_rt.measure import page as measure_page
from vessel_rt.measure.page import machine_panel, tiles_text, write_texts

__all__ = ["CHECK_PAGE", "page", "write_check"]

CHECK_PAGE = "check.html"
_SIGNS = {"pass": "✓ pass", "fail": "✗ fail", "skip": "· skip"}
_FAINTEST = 1e-3  # of a tolerance: the left end of the bars of errors


def write_check(output: Path, found: CheckFile) -> None:
    """Write both files into the folder `output`, each in one step. Raises VesselError."""
    write_texts(output, {CHECK_FILE: to_json(found), CHECK_PAGE: page(found)})


def page(found: CheckFile) -> str:
    """The text of check.html. The same content gives the same bytes."""
    outcome = "skip" if not found.finished else "pass" if found.passed else "fail"
    sections = (_lines(found), _times(found), _batches(found), _errors(found), _machine(found))
    return measure_page.page("vessel-rt check", outcome, found.verdict, _about(found), sections)


def _about(found: CheckFile) -> str:
    parts = []
    if bundle := found.bundle:
        weights = f", {bundle.weights} weights" if bundle.weights != bundle.precision else ""
        parts.append(f"{bundle.checkpoint}, {bundle.precision}{weights}, {bundle.layers} layers")
    if devices := _devices(found.lines):
        parts.append(f"on {', '.join(devices)}")
    parts.append(f"{found.started.replace('T', ' ').replace('+00:00', ' UTC')}, {found.seconds:.0f} s")
    return " · ".join(parts)


def _devices(lines: Sequence[CheckLine]) -> list[str]:
    return list(dict.fromkeys(line.device for line in lines if line.device))


def _lines(found: CheckFile) -> str:
    """The table of all checks, with a grade's name once."""
    several, rows, last = len(_devices(found.lines)) > 1, [], ""
    for line in found.lines:
        reason = f'<p class="{"fail" if line.outcome == "fail" else "dim"}">{escape(line.reason)}</p>' if line.reason else ""
        device = f"<td>{escape(line.device or '')}</td>" if several else ""
        figure = f"<p>{escape(line.figure)}</p>" if line.figure else ""
        rows.append(
            f'<tr{" class=same" if line.grade == last else ""}><td class="grade">{line.grade}</td>{device}'
            f'<td class="outcome {line.outcome}">{_SIGNS[line.outcome]}</td><td class="name">{escape(line.name.replace("_", " "))}</td>'
            f"<td>{figure}{reason}</td></tr>"
        )
        last = line.grade
    return f'<section class="panel"><h2>Checks</h2><table>{"".join(rows)}</table></section>'


def _times(found: CheckFile) -> str:
    """Bars of the steps: the median, up to the 90th percentile in a lighter colour, and a mark at the floor."""
    groups: dict[tuple[str, int], list[StepTime]] = {}
    for time in found.times:
        groups.setdefault((time.device, time.tiles), []).append(time)
    if not groups:
        return ""
    parts = []
    for (device, tiles), times in groups.items():
        longest = max(time.p90_ms for time in times) or 1.0
        rows = "".join(_time_row(time, longest) for time in times)
        which = f", {escape(device)}" if len(_devices(found.lines)) > 1 else ""
        parts.append(f'<div><h3>{tiles_text(tiles)}{which}</h3><div class="bars">{rows}</div></div>')
    floor = "; the mark is the floor that the card's data sheet sets" if any(time.floor_ms for time in found.times) else ""
    note = f'<p class="dim">Median in milliseconds, one image at a time; the lighter part ends at the 90th percentile{floor}.</p>'
    return f'<section class="panel"><h2>Time of an image</h2><div class="columns">{"".join(parts)}</div>{note}</section>'


def _time_row(time: StepTime, longest: float) -> str:
    total = ' class="total"' if time.step == "total" else ""
    mark = f'<u style="left:{_percent(time.floor_ms / longest)}"></u>' if time.floor_ms else ""
    shares = [f"{name} {share:.0%}" for name, share in (("MFU", time.mfu), ("MBU", time.mbu)) if share is not None]
    told = f"{time.p50_ms:.1f}" + (f' <span class="dim">{", ".join(shares)}</span>' if shares else "")
    return (
        f"<span{total}>{escape(time.step.replace('_', ' '))}</span>"
        f'<span class="bar"><i class="more" style="width:{_percent(time.p90_ms / longest)}"></i>'
        f'<i style="width:{_percent(time.p50_ms / longest)}"></i>{mark}</span><span class="number">{told}</span>'
    )


def _batches(found: CheckFile) -> str:
    if not found.batches:
        return ""
    most = max(batch.images_per_second for batch in found.batches) or 1.0
    several = len(_devices(found.lines)) > 1
    rows = "".join(
        f"<span>{batch.batch} at once, {tiles_text(batch.tiles)}{f', {escape(batch.device)}' if several else ''}</span>"
        f'<span class="bar"><i style="width:{_percent(batch.images_per_second / most)}"></i></span>'
        f'<span class="number">{batch.images_per_second:.2f}</span>'
        for batch in found.batches
    )
    return f'<section class="panel"><h2>Images per second</h2><div class="bars">{rows}</div></section>'


def _errors(found: CheckFile) -> str:
    """The error of each output beside its tolerance, on a logarithmic scale that ends at the tolerance."""
    if not found.stages:
        return ""
    rows = "".join(_error_row(error, len(_devices(found.lines)) > 1) for error in found.stages)
    note = (
        '<p class="dim">|output - reference| / |reference|, the largest of all golden cases. Bars are logarithmic; '
        "a full one is the tolerance, and an empty one a thousandth of it.</p>"
    )
    return f'<section class="panel"><h2>Errors of the stages</h2><div class="bars">{rows}</div>{note}</section>'


def _error_row(error: StageError, several: bool) -> str:
    off = error.error is None or error.error > error.limit
    share = 1.0 if error.error is None else 1 - math.log(max(error.error / error.limit, _FAINTEST)) / math.log(_FAINTEST)
    told = "not a number" if error.error is None else f"{error.error:.1e}" if error.error else "0"
    device = f", {escape(error.device)}" if several else ""
    return (
        f"<span>{escape(error.stage.replace('_', ' '))}: {escape(error.output)}{device}</span>"
        f'<span class="bar"><i{" class=fail" if off else ""} style="width:{_percent(share)}"></i></span>'
        f'<span class="number">{told} <span class="dim">of {error.limit:g}</span></span>'
    )


def _machine(found: CheckFile) -> str:
    if found.machine is None:
        return ""
    return machine_panel(found.machine, {"bundle.json": f"SHA-256 {found.bundle.sha256}"} if found.bundle else {})


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"

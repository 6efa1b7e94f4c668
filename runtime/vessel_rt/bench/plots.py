"""Two plots in SVG: the images per second by batch size, and where the time of an image goes. Does not know how it is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from vessel_rt.bench.table import STEPS, Line, step_ms
from vessel_rt.measure.timing import TOTAL

__all__ = ["STYLE", "by_batch", "by_step"]

# Okabe and Ito's colours, and one of a line's own mark besides, for those who cannot tell them apart.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_MARKS = (
    '<circle r="4.5"/>',
    '<rect x="-4" y="-4" width="8" height="8"/>',
    '<path d="M0-5.5L5.5 4H-5.5z"/>',
    '<path d="M0-5.5L5.5 0 0 5.5-5.5 0z"/>',
    '<path d="M0 5.5L5.5-4H-5.5z"/>',
)
_WIDTH = 960
_LETTER = 6.8  # pixels: the mean width of a letter at 13 pixels

STYLE = f"""svg {{ display: block; width: 100%; min-width: 640px; height: auto; font: 13px system-ui, sans-serif; }}
svg text {{ fill: var(--text); }}
svg .dim {{ fill: var(--dim); }}
svg .grid {{ stroke: var(--line); fill: none; }}
svg .mark {{ stroke: var(--text); stroke-width: 2; }}
svg .line {{ fill: none; stroke-width: 2; }}
{"".join(f".c{i} {{ fill: {colour}; stroke: {colour}; }}" for i, colour in enumerate(_COLOURS))}
svg .step {{ stroke: none; }}
"""


def by_batch(lines: Sequence[Line]) -> str:
    """Images per second over images at once, a line for each bundle, device and machine; empty if there is only one batch size."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        if line.row.batch and line.row.images_per_second is not None:
            series.setdefault(_name(line), []).append((line.row.batch, line.row.images_per_second))
    batches = sorted({batch for points in series.values() for batch, _ in points})
    if len(batches) < 2:
        return ""
    legend = min(_WIDTH // 2, 50 + _LETTER * max(map(len, series)))
    left, right, top, bottom = 62.0, _WIDTH - legend, 14.0, 290.0
    ticks = _ticks(max(rate for points in series.values() for _, rate in points))
    low, high = math.log2(batches[0]), math.log2(batches[-1])

    def x(batch: int) -> float:
        return left + 24 + (right - left - 48) * (math.log2(batch) - low) / (high - low)

    def y(rate: float) -> float:
        return bottom - (bottom - top) * rate / ticks[-1]

    parts = [
        f'<path class="grid" d="M{left:g} {y(tick):.1f}H{right:g}"/>'
        f'<text x="{left - 8:g}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    ]
    parts += [f'<text x="{x(batch):.1f}" y="{bottom + 18:g}" text-anchor="middle">{batch}</text>' for batch in batches]
    parts.append(_text((left + right) / 2, bottom + 38, "images at once", "middle"))
    middle = (top + bottom) / 2
    parts.append(f'<text class="dim" transform="translate(14 {middle:g}) rotate(-90)" text-anchor="middle">images per second</text>')
    for number, (name, points) in enumerate(series.items()):
        style = f"c{number % len(_COLOURS)}"
        path = "L".join(f"{x(batch):.1f} {y(rate):.1f}" for batch, rate in points)
        mark = _MARKS[number % len(_MARKS)]
        parts.append(f'<path class="{style} line" style="fill:none" d="M{path}"/>')
        parts += [f'<g class="{style}" transform="translate({x(batch):.1f} {y(rate):.1f})">{mark}</g>' for batch, rate in points]
        at = top + 8 + 22 * number
        parts.append(f'<g class="{style}" transform="translate({right + 22:g} {at:g})">{mark}</g>')
        parts.append(f'<text x="{right + 36:g}" y="{at + 4:g}">{escape(name)}</text>')
    return _svg("images per second by images at once", max(bottom + 46, top + 22 * len(series) + 8), parts)


def by_step(lines: Sequence[Line]) -> str:
    """A bar of the steps' median times for each bundle, device, batch size and machine, with a mark at the time of an image."""
    if not lines:
        return ""
    labels = [f"{_name(line)}, batch {line.row.batch}" for line in lines]
    left, right, top, step = 16 + _LETTER * max(map(len, labels)), _WIDTH - 150.0, 34.0, 28.0
    bottom = top + step * len(lines)
    sums = [sum(step_ms(line.row, name) or 0.0 for name in STEPS) for line in lines]
    ticks = _ticks(max([*sums, *(step_ms(line.row, TOTAL) or 0.0 for line in lines)]))

    def x(ms: float) -> float:
        return left + (right - left) * ms / ticks[-1]

    parts = list(_legend(left))
    parts += [
        f'<path class="grid" d="M{x(tick):.1f} {top:g}V{bottom:g}"/>'
        f'<text x="{x(tick):.1f}" y="{bottom + 18:g}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks
    ]
    parts.append(_text((left + right) / 2, bottom + 38, "milliseconds per image, median; the mark is the whole image", "middle"))
    for number, (line, label) in enumerate(zip(lines, labels, strict=True)):
        y, at = top + step * number + 5, 0.0
        parts.append(f'<text x="{left - 10:.1f}" y="{y + 13:g}" text-anchor="end">{escape(label)}</text>')
        for colour, name in enumerate(STEPS):
            ms = step_ms(line.row, name) or 0.0
            parts.append(f'<rect class="step c{colour}" x="{x(at):.1f}" y="{y:g}" width="{x(ms) - left:.1f}" height="18"/>')
            at += ms
        total = step_ms(line.row, TOTAL) or 0.0
        parts.append(f'<path class="mark" d="M{x(total):.1f} {y - 2:g}v22"/>')
        parts.append(
            f'<text x="{x(max(total, at)) + 8:.1f}" y="{y + 13:g}">{_short(total)} ms, {line.row.images_per_second or 0:.2f}/s</text>'
        )
    return _svg("milliseconds per image by step", bottom + 46, parts)


def _legend(left: float) -> Iterator[str]:
    at = left
    for colour, name in enumerate(STEPS):
        yield f'<rect class="step c{colour}" x="{at:.1f}" y="6" width="12" height="12"/>'
        yield f'<text x="{at + 17:.1f}" y="16">{escape(name)}</text>'
        at += 36 + _LETTER * len(name)


def _name(line: Line) -> str:
    return f"{line.bundle}, {line.device}" + (f", machine {line.machine}" if line.machine else "")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="dim" x="{x:.1f}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 to `most` or a little more, four to seven of them."""
    most = most if most > 0 else 1.0
    power = 10 ** math.floor(math.log10(most))
    step = next(factor * power for factor in (0.2, 0.25, 0.5, 1, 2) if most / (factor * power) <= 6)
    return [round(number * step, 10) for number in range(math.ceil(most / step) + 1)]


def _short(ms: float) -> str:
    return f"{ms:.1f}" if ms < 1000 else f"{ms:,.0f}"


def _svg(label: str, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'

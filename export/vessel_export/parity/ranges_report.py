"""The report of FP16 ranges: peaks, the exponents that follow, ranges.json and the table. Does not know how peaks are measured."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping

__all__ = ["LARGEST_EXPONENT", "LIMIT", "RANGES_FILE", "Product", "Ranges", "StageRanges", "exponent_for"]

RANGES_FILE = "ranges.json"
LIMIT = 65504.0  # FP16's largest number
HEADROOM = 4.0  # other images may have higher peaks than those measured
LARGEST_EXPONENT = 10  # larger ones make ordinary values subnormal: on examples/tiny they double the rounding error (docs/numerics.md)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product that is added to a residual stream: the unscaled peaks of its input and output, and the exponent that follows from them."""

    input: float
    output: float
    exponent: int


@dataclasses.dataclass(frozen=True)
class StageRanges:
    """The peaks of one graph: of unscaled FP16 values, of products, and, for information, of FP32 sums."""

    fp16: dict[str, float]
    products: dict[str, Product]
    fp32: dict[str, float]

    @property
    def beyond(self) -> dict[str, float]:
        """The values that FP16 may not hold: peaks above LIMIT / HEADROOM that no exponent can lower."""
        named = {name: max(product.input, product.output) for name, product in self.products.items() if product.exponent > LARGEST_EXPONENT}
        return named | {name: peak for name, peak in self.fp16.items() if peak > LIMIT / HEADROOM}


@dataclasses.dataclass(frozen=True)
class Ranges:
    """The measurements on `images` images and one question, by stage."""

    images: int
    question: str
    stages: dict[str, StageRanges]

    def to_json(self) -> str:
        """The text of `ranges.json`."""
        return json.dumps({"limit": LIMIT, "headroom": HEADROOM, **dataclasses.asdict(self)}, indent=1) + "\n"

    def table(self, rows: int = 6) -> str:
        """As text: each graph's products and its `rows` kinds of FP16 values with the highest peaks, with the layer of each peak."""
        lines = [("graph", "value", "peak", "of 65504", "where", "exponents")]
        for stage, ranges in self.stages.items():
            lines += [(stage, *line) for line in _product_lines(ranges.products)]
            lines += [(stage, *line, "") for i, (line, peak) in enumerate(_value_lines(ranges.fp16)) if i < rows or peak > LIMIT / HEADROOM]
            if ranges.fp32:
                where = max(ranges.fp32, key=lambda name: ranges.fp32[name])
                lines.append((stage, "sums in FP32", f"{ranges.fp32[where]:.4g}", "", where, ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _product_lines(products: Mapping[str, Product]) -> Iterator[tuple[str, str, str, str, str]]:
    for kind, names in _by_kind(products).items():
        peaks = {name: max(products[name].input, products[name].output) for name in names}
        where = max(peaks, key=lambda name: peaks[name])
        exponents = sorted({products[name].exponent for name in names})
        yield f"{kind} (scaled)", f"{peaks[where]:.4g}", f"{peaks[where] / LIMIT:.2%}", where, " ".join(map(str, exponents))


def _value_lines(values: Mapping[str, float]) -> list[tuple[tuple[str, str, str, str], float]]:
    """A line for each kind of value, with its peak, the highest first."""
    lines = []
    for kind, names in _by_kind(values).items():
        where = max(names, key=lambda name: values[name])
        peak = values[where]
        lines.append(((kind, f"{peak:.4g}", f"{peak / LIMIT:.2%}", where), peak))
    return sorted(lines, key=lambda line: line[1], reverse=True)


def _by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Names grouped by kind: the name with its first number, the layer's, replaced by *."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name, count=1), []).append(name)
    return groups


def exponent_for(peak: float) -> int:
    """The smallest s >= 0 with peak / 2^s <= LIMIT / HEADROOM."""
    return max(0, math.ceil(math.log2(peak * HEADROOM / LIMIT))) if peak else 0

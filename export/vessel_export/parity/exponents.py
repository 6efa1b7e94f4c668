"""The exponents of a bundle's graphs: the powers of two of every `ResidualLinear`, read from the graphs and written to them.

They are two scalars in the graph's own file, so weights never change. Does not know how peaks are measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from vessel_export.bundle.reuse import link_engines
from vessel_export.io.files import link_or_copy, staging
from vessel_export.parity.ranges_report import LARGEST_EXPONENT, RANGES_FILE, Product, Ranges
from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.formats.golden import GOLDEN_ARRAYS, GOLDEN_FILE
from vessel_rt.io.checked_files import sha256_of

__all__ = ["apply", "exponents_of", "set_exponents"]


def exponents_of(graph: ir.Graph) -> dict[str, int]:
    """The exponent of each ResidualLinear of a graph, by name."""
    found = {}
    for name, value in graph.initializers.items():
        if name.endswith(".shrink") and value.const_value is not None:
            found[name.removesuffix(".shrink")] = -round(math.log2(float(value.const_value.numpy())))
    return found


def set_exponents(graph: ir.Graph, exponents: Mapping[str, int]) -> None:
    """Set the exponent of each ResidualLinear in `exponents`, in both of its scalars."""
    for prefix, exponent in exponents.items():
        for name, array in (("shrink", np.array(2.0**-exponent, np.float16)), ("grow", np.array(2.0**exponent, np.float32))):
            value = graph.initializers[f"{prefix}.{name}"]
            value.const_value = ir.tensor(array, name=value.name)


def apply(bundle: Bundle, ranges: Ranges) -> tuple[str, ...]:
    """Write `ranges.json` to the bundle and the exponents to its graphs; returns the stages whose graphs changed.

    A folder with the changed graphs and hard links to all other files replaces the bundle in one step. Engines that were built from changed
    graphs are left out, since the runtime would not load them.

    Raises:
        OSError: the disk is full or not writable.
    """
    with staging(bundle.folder.resolve()) as folder:
        changed = tuple(name for name, measured in ranges.stages.items() if _write_graph(bundle, name, measured.products, folder))
        (folder / RANGES_FILE).write_text(ranges.to_json(), encoding="utf-8")
        written = [RANGES_FILE, *(bundle.stages[name].file for name in changed)]
        records = {name: FileRecord((folder / name).stat().st_size, sha256_of(folder / name)) for name in written}
        goldens = (GOLDEN_FILE, GOLDEN_ARRAYS) if bundle.golden else ()
        for name in [*(bundle.files.keys() - records.keys()), *goldens]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(bundle.folder / name, folder / name)
        files = dict(sorted((bundle.files | records).items()))
        link_engines(folder, files, [bundle])
        (folder / BUNDLE_FILE).write_text(msgspec.structs.replace(bundle, files=files).to_json(), encoding="utf-8")
    return changed


def _write_graph(bundle: Bundle, stage: str, products: Mapping[str, Product], folder: Path) -> bool:
    """Write the stage's graph with new exponents; returns False if it has them already."""
    file = bundle.stages[stage].file
    model = ir.load(bundle.folder / file)
    wanted = {name: product.exponent for name, product in products.items() if product.exponent <= LARGEST_EXPONENT}
    before = exponents_of(model.graph)
    if before == before | wanted:
        return False
    set_exponents(model.graph, wanted)
    ir.save(model, folder / file)
    return True

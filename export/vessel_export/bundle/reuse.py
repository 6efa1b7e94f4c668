"""Reuse of files and engines from the bundles in the same folder as a new one. Does not know how they are made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vessel_rt.errors import BundleError, EngineError
from vessel_rt.formats.bundle import BUNDLE_FILE, Bundle
from vessel_rt.formats.engine_sidecar import ENGINES, Engine
from vessel_rt.formats.file_record import FileRecord
from vessel_rt.formats.recipe import Recipe

__all__ = ["find_neighbours", "link_engines", "older_file"]


def find_neighbours(out: Path, base: str, recipe: Recipe) -> list[Bundle]:
    """The bundles in the folder of `out`, itself included: those of the same base model and types first, then the newest."""
    found: list[tuple[bool, float, Bundle]] = []
    for path in out.parent.glob(f"*/{BUNDLE_FILE}"):
        if path.parent.name.startswith("."):
            continue
        with contextlib.suppress(BundleError):  # a damaged neighbour cannot be used, and is not an error of this export
            bundle = Bundle.load(path.parent)
            types = bundle.precision, bundle.weights
            alike = (bundle.provenance.base, types) == (base, (recipe.precision, recipe.weights or recipe.precision))
            found.append((alike, path.stat().st_mtime, bundle))
    return [bundle for _, _, bundle in sorted(found, key=lambda entry: entry[:2], reverse=True)]


def older_file(neighbours: Sequence[Bundle], file: str, size: int) -> Path | None:
    """The first neighbour's file with this name and size; the new file may equal it."""
    for bundle in neighbours:
        if file in bundle.files and bundle.files[file].bytes == size and (bundle.folder / file).is_file():
            return bundle.folder / file
    return None


def link_engines(folder: Path, files: Mapping[str, FileRecord], neighbours: Sequence[Bundle]) -> tuple[str, ...]:
    """Hard-link the neighbours' engines that were built from files equal to `files`; returns their names."""
    linked: list[str] = []
    for sidecar in (path for bundle in neighbours for path in sorted(bundle.folder.glob(f"{ENGINES}/*/*.json"))):
        target = folder / ENGINES / sidecar.parent.name
        name = f"{sidecar.parent.name}/{sidecar.stem}"
        with contextlib.suppress(EngineError, OSError):  # damaged, or on a disk without hard links: it is built again
            engine = Engine.load(sidecar)
            if name in linked or any(source not in files or files[source].sha256 != sha for source, sha in engine.sources.items()):
                continue
            target.mkdir(parents=True, exist_ok=True)
            for file in (*engine.files, sidecar.name):
                os.link(sidecar.parent / file, target / file)
            linked.append(name)
    return tuple(linked)

"""Which engines of a bundle are up to date and need no build. Does not know graphs and compilers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vessel_rt.errors import EngineError
from vessel_rt.formats.bundle import Bundle
from vessel_rt.formats.engine_sidecar import Engine, Target
from vessel_rt.io.checked_files import check_files

__all__ = ["Expected", "find_up_to_date"]


@dataclasses.dataclass(frozen=True)
class Expected:
    """The engine that a build would make: its sidecar without `files`, and the number of its partitions."""

    sidecar: Engine
    partitions: int


def find_up_to_date(bundle: Bundle, target: Target, expected: Sequence[Expected], *, rebuild: bool) -> dict[str, Engine]:
    """The existing engines that match `expected`, by stage.

    Raises:
        EngineError: an engine exists that does not match, and `rebuild` is not set; every difference is named.
    """
    folder = target.folder(bundle)
    found: dict[str, Engine] = {}
    faults: list[str] = []
    for wanted in expected:
        stage = wanted.sidecar.stage
        path = folder / f"{stage}.json"
        if not path.exists():
            continue
        try:
            engine = Engine.load(path)
        except EngineError as e:
            faults.append(str(e))
            continue
        differences = engine.differences(folder, bundle, target) + _differences(engine, wanted)
        differences = differences or list(check_files(folder, engine.files)[1])  # gigabytes: read only if nothing else differs
        faults += [f"{stage}: {difference}" for difference in differences]
        if not differences:
            found[stage] = engine
    if faults and not rebuild:
        raise EngineError(f"{folder}: {'; '.join(faults)}; --rebuild builds these engines again")
    return found


def _differences(engine: Engine, wanted: Expected) -> list[str]:
    """How a build with this recipe and this bundle would differ, in words."""
    found = []
    if engine.stage != wanted.sidecar.stage or engine.sources.keys() != wanted.sidecar.sources.keys():
        found.append("it was built from other files")
    found += [
        f"its shapes of {name} are {engine.profile.get(name)}, the recipe's are {text}"
        for name, text in wanted.sidecar.profile.items()
        if engine.profile.get(name) != text
    ]
    if engine.partitions != wanted.partitions:
        found.append(f"it has {engine.partitions} partitions, the recipe asks for {wanted.partitions}")
    return found[:2]  # the caches of all layers have the same shapes

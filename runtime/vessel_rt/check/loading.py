"""Loads a bundle once, stage by stage, and shares the sessions: for several segmenters, and with someone who watches the outputs.

Does not know what is checked with them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from vessel_rt.check.record import Record
from vessel_rt.device.deployment import Deployment
from vessel_rt.device.host_memory import stage_memory
from vessel_rt.device.providers import PROVIDERS
from vessel_rt.device.session import Session, Value
from vessel_rt.errors import PlacementError, VesselError
from vessel_rt.formats.bundle import STAGES
from vessel_rt.measure.memory import MemoryWatch, size

if TYPE_CHECKING:
    from onnxruntime import OrtValue

__all__ = ["LoadedDeployment", "Tap", "load"]

Tap: TypeAlias = "Callable[[str, Mapping[str, Any]], object]"
"""Called with a stage and its outputs after each run: arrays, or OrtValues for those that stay on the device."""


class _Shared(Session):
    """A session that someone watches. Unless it is `owned`, it belongs to someone else: leaving it frees nothing."""

    def __init__(self, session: Session, tap: Callable[[Mapping[str, Any]], object] | None, *, owned: bool) -> None:
        self._shared, self._tap, self._owned = session, tap, owned
        self.placement = session.placement

    @property
    def signature(self) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        return self._shared.signature

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._owned:
            self._shared.__exit__(kind, error, traceback)

    def run(self, feeds: Mapping[str, Value], *, keep: Collection[str] = (), into: Mapping[str, OrtValue] | None = None) -> dict[str, Any]:
        outputs = self._shared.run(feeds, keep=keep, into=into)
        if self._tap:
            self._tap(outputs)
        return outputs

    def zeros(self, shape: Sequence[int], dtype: str) -> OrtValue:
        return self._shared.zeros(shape, dtype)


@dataclasses.dataclass(frozen=True)
class LoadedDeployment(Deployment):
    """A deployment whose sessions are loaded already; they are shared by all segmenters that are made of it."""

    loaded: Mapping[str, Session] = dataclasses.field(default_factory=dict)
    tap: Tap | None = None

    @classmethod
    def of(cls, deployment: Deployment, loaded: Mapping[str, Session]) -> LoadedDeployment:
        """`deployment`, with these sessions."""
        own = {field.name: getattr(deployment, field.name) for field in dataclasses.fields(Deployment)}
        return cls(**own, loaded=loaded)

    def tapped(self, tap: Tap) -> LoadedDeployment:
        """The same, with someone who watches the outputs."""
        return dataclasses.replace(self, tap=tap)

    def session(self, stage: str, threads: int = 0) -> Session:
        """The session of a stage that is loaded, whatever `threads`; one of another stage belongs to who asks for it."""
        tap, shared = self.tap, self.loaded.get(stage)
        session = shared or super().session(stage, threads)
        return _Shared(session, (lambda outputs: tap(stage, outputs)) if tap else None, owned=shared is None)


@contextmanager
def load(record: Record, deployment: Deployment, threads: int, watch: MemoryWatch) -> Iterator[LoadedDeployment | None]:
    """Load all stages, one after the other; None if one cannot be loaded. Makes the lines of `providers`, then those of `loading`."""
    loaded: dict[str, Session] = {}
    lines: list[tuple[str, str, str | None]] = []
    with ExitStack() as stack:
        for stage in STAGES:
            before, began = watch.now(), time.perf_counter()
            try:
                loaded[stage] = stack.enter_context(deployment.session(stage, threads))
            except PlacementError as e:
                record.failed("providers", stage, str(e))
                continue
            except VesselError as e:
                record.skipped("providers", stage, "it could not be loaded: see loading")
                lines.append((stage, "", f"{e}"))
                continue
            seconds, after = time.perf_counter() - began, watch.now()
            record.passed("providers", stage, _placed(loaded[stage]))
            lines.append((stage, f"{seconds:.2f} s{_grown(deployment, stage, before, after)}", None))
        for stage, figure, fault in lines:
            record.judged("loading", stage, figure, fault)
        yield LoadedDeployment.of(deployment, loaded) if loaded.keys() == set(STAGES) else None


def _placed(session: Session) -> str:
    """How many nodes run where, and which operators are on the CPU beside a GPU."""
    names = {provider.name: kind for kind, provider in PROVIDERS.items()}
    parts = []
    for provider, operators in session.placement.items():
        which = f" ({', '.join(sorted(operators))})" if names.get(provider) == "cpu" and len(session.placement) > 1 else ""
        parts.append(f"{operators.total()} nodes on {names.get(provider, provider)}{which}")
    return ", ".join(parts)


def _grown(deployment: Deployment, stage: str, before: int | None, after: int | None) -> str:
    """The memory that a stage took while it was loaded, and what was planned for its weights."""
    if before is None or after is None:
        return ""
    planned = stage_memory(deployment.bundle, stage) if deployment.device.kind == "cpu" else deployment.bundle.weight_bytes(stage)
    return f", {size(max(after - before, 0))} (planned for the weights: {size(planned)})"

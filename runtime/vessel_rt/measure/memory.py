"""The memory in use on a device, and its peak. Does not know what is run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from vessel_rt.device.host_memory import anonymous_memory, available_memory
from vessel_rt.device.nvml import gpu_monitor
from vessel_rt.device.providers import Device
from vessel_rt.errors import VesselError

__all__ = ["MemoryWatch", "gpu_memory_in_use", "size"]

_INTERVAL = 0.02  # seconds between readings


def size(count: int) -> str:
    """Bytes as text: GB (10^9 bytes) from a tenth of one on, else MB."""
    return f"{count / 1e9:.2f} GB" if abs(count) >= 1e8 else f"{count / 1e6:.1f} MB"


def gpu_memory_in_use(index: int) -> int | None:
    """Bytes in use on a GPU by all processes; None if it cannot be read. Takes no memory there."""
    try:
        return gpu_monitor(index)().used
    except VesselError:
        return None


class MemoryWatch:
    """Reads the memory in use until it is left, and keeps the peak.

    On a GPU it is the memory of the card, all processes together; on a CPU the anonymous memory of this process. `missing` says why there
    are no readings. `available` is the host's memory that was free at the start. On a GPU, `at_start` is what was in use before the device
    was tried, which already takes memory; without it, what is in use now.
    """

    def __init__(self, device: Device, at_start: int | None = None) -> None:
        self._read: Callable[[], int | None] = anonymous_memory
        self.missing: str | None = None
        if device.kind != "cpu":
            try:
                monitor = gpu_monitor(device.index)
                self._read = lambda: monitor().used
            except VesselError as e:
                self._read, self.missing = lambda: None, str(e)
        self.at_start, self.available = self.now() if at_start is None else at_start, available_memory()
        if self.at_start is None and self.missing is None:
            self.missing = "the system does not tell"
        self.peak = self.at_start or 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._left.set()
        self._thread.join()

    def now(self) -> int | None:
        """Bytes in use; None if it cannot be read."""
        try:
            return self._read()
        except VesselError:
            return None

    def _watch(self) -> None:
        while self.at_start is not None and not self._left.wait(_INTERVAL):
            self.peak = max(self.peak, self.now() or 0)

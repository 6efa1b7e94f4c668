"""SAM2's memory bank of one object: what sam2_memory_attention attends to on each tracked frame of a cine.

The rules are those of sam2's SAM2Base._prepare_memory_conditioned_features with SAM 2.0's settings, which Sa2VA's inference shares
(projects/sa2va/hf/models/sam2.py):

- memories: those of all conditioning frames, at the last temporal position, then those of the last frames (6 in SAM 2.0) that were
  tracked, the earliest first; the temporal position of the frame just before is 0.
- object pointers: those of the conditioning frames that are not ahead of the current one, then those of the last frames (15 in SAM 2.0)
  that were tracked, the latest first. They have no temporal position.

"Before" and "last" follow the direction of tracking. What no later frame attends to is dropped, so a bank does not grow with the cine.
Does not know graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vessel_rt.formats.bundle import CineSpec

__all__ = ["Memory", "MemoryBank"]


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
    """What is remembered of an object on a frame: `features` [1, M, H, W] of sam2_memory_encoder, `pointer` [1, C] of a mask decoder."""

    features: npt.NDArray[Any]
    pointer: npt.NDArray[Any]


class MemoryBank:
    """The memories of one object in one pass through a cine. Frames are named by their place in the cine.

    Args:
        spec: how many memories and pointers are attended to.
        conditioning: the memories of the conditioning frames, which are kept for the whole pass; at least one.
        reverse: whether frames are tracked from the last to the first.
    """

    def __init__(self, spec: CineSpec, conditioning: Mapping[int, Memory], *, reverse: bool = False) -> None:
        self._spec, self._step = spec, -1 if reverse else 1
        self._conditioning = dict(sorted(conditioning.items()))
        self._tracked: dict[int, Memory] = {}
        self._pointers: dict[int, npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        """How many memories of tracked frames it holds."""
        return len(self._tracked)

    def feeds(self, frame: int) -> dict[str, npt.NDArray[Any]]:
        """The inputs of sam2_memory_attention for `frame`: memories [memories, M, H, W], temporal_positions int64 [memories],
        object_pointers [pointers, C].

        Raises:
            ValueError: no conditioning frame comes before `frame` in the direction of tracking, and none was tracked before it.
        """
        memories, positions = list(self._conditioning.values()), [self._spec.memories - 1] * len(self._conditioning)
        for ago in range(self._spec.memories - 1, 0, -1):
            if memory := self._tracked.get(frame - ago * self._step):
                memories.append(memory)
                positions.append(ago - 1)
        pointers = [memory.pointer for place, memory in self._conditioning.items() if (frame - place) * self._step >= 0]
        before = (frame - ago * self._step for ago in range(1, self._spec.pointers))
        pointers += [self._pointers[place] for place in before if place in self._pointers]
        if not pointers:
            raise ValueError(f"frame {frame} has no object pointer: it is tracked before every conditioning frame")
        return {
            "memories": np.concatenate([memory.features for memory in memories]),
            "temporal_positions": np.array(positions, np.int64),
            "object_pointers": np.concatenate(pointers),
        }

    def add(self, frame: int, memory: Memory) -> None:
        """Remember the tracked `frame`, and drop what no frame after it attends to."""
        self._tracked[frame], self._pointers[frame] = memory, memory.pointer
        for place in [place for place in self._tracked if (frame - place) * self._step >= self._spec.memories - 1]:
            del self._tracked[place]
        for place in [place for place in self._pointers if (frame - place) * self._step >= self._spec.pointers - 1]:
            del self._pointers[place]

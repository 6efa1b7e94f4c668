"""The memory bank against sam2's rules, spelled out once more without dropping anything."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from vessel_rt.formats.bundle import CineSpec
from vessel_rt.model.memory import Memory, MemoryBank

SPEC = CineSpec(prompted_frames=5, memories=7, pointers=16, stages={})


def memory(frame: int) -> Memory:
    """One whose numbers name its frame."""
    return Memory(np.full((1, 2, 3, 3), frame, np.float32), np.full((1, 8), frame, np.float32))


def bank_of(conditioning: Iterable[int], *, reverse: bool = False) -> MemoryBank:
    return MemoryBank(SPEC, {frame: memory(frame) for frame in conditioning}, reverse=reverse)


def expected(frame: int, conditioning: list[int], tracked: set[int], step: int) -> tuple[list[tuple[int, int]], list[int]]:
    """The frames and temporal positions of the memories, and the frames of the pointers."""
    memories = [(place, 6) for place in conditioning]
    memories += [(frame - ago * step, ago - 1) for ago in (6, 5, 4, 3, 2, 1) if frame - ago * step in tracked]
    pointers = [place for place in conditioning if place * step <= frame * step]
    return memories, pointers + [frame - ago * step for ago in range(1, 16) if frame - ago * step in tracked]


@pytest.mark.parametrize(
    ("conditioning", "order", "reverse"),
    [
        (range(5), range(5, 60), False),
        ([7, 3], [4, 5, 6, *range(8, 40)], False),
        ([20, 24, 30], [29, 28, 27, 26, 25, 23, 22, 21, *range(19, -1, -1)], True),
    ],
    ids=["the first frames", "two frames", "backward"],
)
def test_what_each_frame_attends_to(conditioning: Iterable[int], order: Iterable[int], reverse: bool) -> None:
    bank, tracked = bank_of(conditioning, reverse=reverse), set[int]()
    for frame in order:
        feeds = bank.feeds(frame)
        memories, pointers = expected(frame, sorted(conditioning), tracked, -1 if reverse else 1)
        assert [
            (int(each[0, 0, 0]), position) for each, position in zip(feeds["memories"], feeds["temporal_positions"], strict=True)
        ] == memories
        assert feeds["object_pointers"][:, 0].tolist() == pointers
        assert feeds["temporal_positions"].dtype == np.int64
        bank.add(frame, memory(frame))
        tracked.add(frame)
    assert len(bank) == 6


def test_a_bank_does_not_grow_with_the_cine() -> None:
    bank = bank_of(range(5))
    for frame in range(5, 500):
        bank.add(frame, memory(frame))
    assert len(bank) == 6
    assert len(bank._pointers) == 15
    assert bank.feeds(500)["memories"].shape[0] == 5 + 6
    assert bank.feeds(500)["object_pointers"].shape[0] == 5 + 15


def test_a_frame_before_every_conditioning_frame_has_no_pointer() -> None:
    with pytest.raises(ValueError, match="frame 2"):
        bank_of([3]).feeds(2)
    with pytest.raises(ValueError, match="frame 4"):
        bank_of([3], reverse=True).feeds(4)

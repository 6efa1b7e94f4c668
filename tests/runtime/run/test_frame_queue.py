from __future__ import annotations

import threading

import pytest

from tests.support.frames import placed
from vessel_rt.run.frame_queue import FrameQueue


def sizes(frames: int, workers: int, round_size: int) -> list[int]:
    """Of the shares of workers that are as fast as each other."""
    shares, found = FrameQueue(placed(*map(str, range(frames))), workers, threading.Event()), []
    while share := shares.take(round_size):
        found.append(len(share))
        shares.done()
    return found


@pytest.mark.parametrize("frames", [1, 7, 16, 17, 50, 999])
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("round_size", [1, 4, 8])
def test_shares_are_whole_rounds_but_the_last_ones_which_are_even(frames: int, workers: int, round_size: int) -> None:
    found = sizes(frames, workers, round_size)
    assert sum(found) == frames
    partial = [size for size in found if size % round_size]
    assert len(partial) <= workers
    assert found[: len(found) - workers] == [size for size in found[: len(found) - workers] if size % round_size == 0]
    if frames >= workers:
        assert max(found[-workers:]) - min(found[-workers:]) <= max(1, workers - 1) or not partial
    assert max(found) <= max(frames // (2 * workers), round_size)


def test_a_worker_waits_for_what_another_may_lose() -> None:
    a, b = placed("a", "b")
    shares = FrameQueue([a, b], 2, threading.Event())
    assert shares.take(1) == [a]
    assert shares.take(1) == [b]
    shares.done()
    taken: list[object] = []
    waiting = threading.Thread(target=lambda: taken.append(shares.take(8)))
    waiting.start()
    assert shares.lose([a]) == []
    shares.done()
    waiting.join(timeout=60)
    assert taken == [[a]]
    assert shares.lose([a]) == [a]
    shares.done()
    assert shares.take(1) == []


def test_a_run_that_is_stopped_hands_out_nothing() -> None:
    stop = threading.Event()
    shares = FrameQueue(placed("a"), 1, stop)
    stop.set()
    assert shares.take(1) == []
    assert not shares.empty

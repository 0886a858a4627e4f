"""Times of single calls, on the CPU by the clock, on a GPU by events with a cold L2 cache."""

import time
from collections.abc import Callable
from typing import Any

import torch

MOST = 100  # calls of one slice
COLD_BYTES = 2**28  # more than any L2 cache


def sample(call: Callable[[], Any], count: int, device: str) -> list[float]:
    """Seconds of each of `count` calls.

    On a GPU each call is preceded by a write that empties the L2 cache and lets the host run
    ahead; nothing waits between calls.
    """
    if device == "cpu":
        return [_clock(call) for _ in range(count)]
    cold = torch.empty(COLD_BYTES, dtype=torch.int8, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        cold.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def repeats(call: Callable[[], Any], device: str, seconds: float) -> int:
    """How many calls fill a slice of so many seconds, of a call that has run before."""
    once = sample(call, 1, device)[0]
    if once < seconds / 10:
        once = min(sample(call, 5, device))
    return max(1, min(MOST, int(seconds / max(once, 1e-9))))


def _clock(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin

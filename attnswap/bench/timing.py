"""Time two calls alternately, so that other load on the machine affects both."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from attnswap.bench.calls import TimedCall

SAMPLE_SECONDS = 0.02
"""Minimum duration of a sample, which repeats a short call: timers and thread wake-ups cost microseconds."""


@dataclass(frozen=True)
class Round:
    """Seconds of one call of the baseline (``sdpa``) and of the case (``ours``), measured right after one another."""

    sdpa: float
    ours: float


def sample(call: TimedCall, repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns the mean seconds of a call over ``repeats`` calls in a row."""
    with call.context():
        started = clock()
        for _ in range(repeats):
            call()
        return (clock() - started) / repeats


def warm_up(call: TimedCall, clock: Callable[[], float] = time.perf_counter) -> int:
    """Runs a call twice, and returns how often a sample repeats it.

    The first call includes compilation and memory allocation, so that only the second one is timed.
    """
    sample(call, 1, clock)
    return max(1, math.ceil(SAMPLE_SECONDS / max(sample(call, 1, clock), 1e-9)))


def interleave(
    sdpa: TimedCall, ours: TimedCall, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[Round]:
    """Times two calls alternately: A B A B ...

    Args:
        sdpa: The baseline.
        ours: The call that is compared with it.
        rounds: Number of pairs of samples.
        clock: Returns the time in seconds.
    """
    repeats = [warm_up(call, clock) for call in (sdpa, ours)]
    collecting = gc.isenabled()
    gc.disable()
    try:
        return [Round(sample(sdpa, repeats[0], clock), sample(ours, repeats[1], clock)) for _ in range(rounds)]
    finally:
        if collecting:
            gc.enable()

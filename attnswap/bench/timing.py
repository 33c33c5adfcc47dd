"""Times of two calls in turn, so that what slows the machine slows both."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from attnswap.bench.calls import Call

SAMPLE_SECONDS = 0.02
"""A sample repeats a short call until it lasts about this long: timers and wake-ups cost microseconds."""


@dataclass(frozen=True)
class Round:
    """Seconds of one call each, measured right after one another."""

    sdpa: float
    ours: float


def sample(call: Call, repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns the mean seconds of a call over ``repeats`` calls in a row."""
    with call.context():
        started = clock()
        for _ in range(repeats):
            call()
        return (clock() - started) / repeats


def warm_up(call: Call, clock: Callable[[], float] = time.perf_counter) -> int:
    """Runs a call until nothing is compiled or allocated for the first time, and returns how often a sample repeats it.

    The first call pays for compilation and fresh memory, so that the second one tells how long a call takes.
    """
    sample(call, 1, clock)
    return max(1, math.ceil(SAMPLE_SECONDS / max(sample(call, 1, clock), 1e-9)))


def interleave(sdpa: Call, ours: Call, rounds: int, clock: Callable[[], float] = time.perf_counter) -> list[Round]:
    """Measures two calls in turn: A B A B ...

    Args:
        sdpa: What is compared with.
        ours: What is measured.
        rounds: How many pairs of samples.
        clock: Returns seconds.
    """
    repeats = [warm_up(call, clock) for call in (sdpa, ours)]
    collecting = gc.isenabled()
    gc.disable()
    try:
        return [Round(sample(sdpa, repeats[0], clock), sample(ours, repeats[1], clock)) for _ in range(rounds)]
    finally:
        if collecting:
            gc.enable()

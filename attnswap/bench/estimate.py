"""Estimate the duration of a benchmark from short calls, and skip measurements that would be too expensive."""

import time
from dataclasses import dataclass, replace

import psutil

from attnswap.bench.calls import build, draw_tensors
from attnswap.bench.cases import Case, Setting
from attnswap.bench.memory import extra_memory
from attnswap.bench.peers import Peer
from attnswap.bench.timing import SAMPLE_SECONDS, sample
from attnswap.errors import ConfigError
from attnswap.evaluation.estimate import Growth

PROBES = (256, 1024)
"""Lengths of the calls that are timed for the estimate."""


@dataclass(frozen=True)
class Forecast:
    """The estimated time of one call of a case in one shape, dtype and mode.

    Attributes:
        seconds: Seconds by length; None if the case cannot run.
        refused: The reason why it cannot run.
    """

    seconds: Growth | None
    refused: str | None = None

    def at(self, length: int) -> float:
        """Returns the seconds of one call."""
        return self.seconds.at(length) if self.seconds else 0.0


def forecast(case: Case, setting: Setting, backend: str) -> Forecast:
    """Times two short calls of a case, which also compile its kernels."""
    lengths = PROBES if setting.length >= PROBES[-1] else (max(1, setting.length // 2), setting.length)
    seconds = []
    for length in lengths:
        short = replace(setting, length=length)
        try:
            call = build(case, short, draw_tensors(short), backend)
            sample(call, 1)
        except ConfigError as error:
            return Forecast(None, str(error))
        seconds.append(sample(call, 2))
    return Forecast(Growth.fit(lengths, seconds))


def cell_seconds(ours: Forecast, sdpa: Forecast, setting: Setting, rounds: int) -> float:
    """Returns the seconds of one cell: two calls each to warm up, then the rounds."""
    calls = [forecast.at(setting.length) * setting.batch for forecast in (ours, sdpa)]
    return 2 * sum(calls) + rounds * sum(max(seconds, SAMPLE_SECONDS) for seconds in calls)


def reason_to_skip(peer: Peer, setting: Setting, seconds: float, limit: float) -> str | None:
    """Returns why a peer is not measured: it needs more than half of the free memory, or too much time; else None."""
    needed = peer.score_matrices * 4 * setting.shape.heads * setting.length**2
    free = psutil.virtual_memory().available
    if needed > free / 2:
        return f"needs about {needed / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB that are free"
    if seconds > limit:
        return f"would take about {seconds:.0f} s, more than the limit of {limit:.0f} s"
    return None


def process_seconds(case: Case, setting: Setting, backend: str, threads: int, flush: bool) -> float:
    """Times one measurement of memory at a short length, which is mostly the start of a process."""
    started = time.perf_counter()
    extra_memory(case, replace(setting, length=min(PROBES[0], setting.length)), backend, threads, flush)
    return time.perf_counter() - started

"""Estimate the time and memory of an evaluation from a few short windows, and show its progress."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from tqdm import tqdm

from attnswap.evaluation.scoring import Scorer
from attnswap.evaluation.windows import Window

PROBES = (256, 1024, 4096)
"""Lengths of the timed windows. The estimate uses the last two that were timed; a shorter window warms up first."""

PROBE_SHARE = 0.15
"""A third window is timed if it takes at most this share of the run: some costs only appear at long lengths."""


@dataclass(frozen=True)
class Growth:
    """A cost of a forward pass, as ``linear * tokens + quadratic * tokens ** 2``."""

    linear: float
    quadratic: float

    @classmethod
    def fit(cls, lengths: Sequence[int], values: Sequence[float]) -> "Growth":
        """Fits the curve to two measurements; a part that comes out negative, due to noise, is set to 0."""
        (short, long), (low, high) = lengths, values
        if short == long:
            return cls(high / long, 0.0)
        quadratic = max(0.0, (high / long - low / short) / (long - short))
        linear = high / long - quadratic * long
        return cls(linear, quadratic) if linear >= 0 else cls(0.0, high / long**2)

    def at(self, tokens: int) -> float:
        """Returns the cost of one window."""
        return self.linear * tokens + self.quadratic * tokens**2


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of an evaluation.

    Attributes:
        seconds: Duration of the run.
        memory_bytes: Peak memory in addition to the loaded weights.
        available_bytes: Free memory at the time of the estimate.
        window_seconds: Seconds of one window by the number of positions that the model reads.
    """

    seconds: float
    memory_bytes: int
    available_bytes: int
    window_seconds: Growth

    def __str__(self) -> str:
        line = f"estimate: {duration(self.seconds)}, up to {self.memory_bytes / 2**30:.1f} GiB on top of the weights"
        if self.memory_bytes > self.available_bytes:
            line += f", but only {self.available_bytes / 2**30:.1f} GiB are free: leave out the longest contexts"
        return line


def estimate(
    scorer: Scorer, ids: torch.Tensor, windows: Sequence[Window], prefix_id: int | None, batch_size: int
) -> Estimate:
    """Times two or three short windows of the text and extrapolates.

    Args:
        scorer: Scores the windows.
        ids: Token ids of the text.
        windows: All windows that will be scored.
        prefix_id: Id of the prefix token.
        batch_size: Windows per forward pass.
    """
    longest = min(max(window.fed for window in windows), len(ids) - 1)
    _measure(scorer, ids, prefix_id, min(64, longest))
    lengths: list[int] = []
    seconds: list[float] = []
    memory: list[float] = []
    cost = Growth(0.0, 0.0)
    for length in (min(length, longest) for length in PROBES):
        total = sum(cost.at(window.fed) for window in windows)
        if len(lengths) > 1 and (length == lengths[-1] or cost.at(length) > PROBE_SHARE * total):
            break
        spent, peak = _measure(scorer, ids, prefix_id, length)
        lengths.append(length)
        seconds.append(spent)
        memory.append(float(peak))
        if len(lengths) > 1:
            cost = Growth.fit(lengths[-2:], seconds[-2:])
    growth = Growth.fit(lengths[-2:], memory[-2:])
    return Estimate(
        seconds=sum(cost.at(window.fed) for window in windows),
        memory_bytes=max(int(batch_size * growth.at(longest)), scorer.chunk_bytes(batch_size * longest)),
        available_bytes=_available(scorer.device),
        window_seconds=cost,
    )


def _measure(scorer: Scorer, ids: torch.Tensor, prefix_id: int | None, length: int) -> tuple[float, int]:
    """Returns seconds and peak memory of a window that reads ``length`` tokens and scores half of them."""
    window = Window(0, (length + 1) // 2, length + 1, prefix=False)
    with peak_memory(scorer.device, interval=0.002) as peak:
        started = time.perf_counter()
        scorer.score(ids, [window], prefix_id)
        spent = time.perf_counter() - started
    return spent, peak.bytes


class Progress:
    """A progress bar in tokens. Its remaining time weighs each window by its estimated cost.

    Args:
        windows: All windows that will be scored.
        cost: The estimated cost of a window.
        show: Whether to draw the bar.
    """

    def __init__(self, windows: Sequence[Window], cost: Growth, show: bool) -> None:
        self.cost, self.left = cost, sum(cost.at(window.fed) for window in windows)
        self.spent, self.started = 0.0, time.perf_counter()
        self.bar = tqdm(
            total=sum(window.fed for window in windows),
            unit="tok",
            unit_scale=True,
            disable=not show,
            file=sys.stderr,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]",
        )

    def advance(self, what: str, windows: Sequence[Window]) -> None:
        """Marks windows as done."""
        cost = sum(self.cost.at(window.fed) for window in windows)
        self.spent, self.left = self.spent + cost, self.left - cost
        elapsed = time.perf_counter() - self.started
        self.bar.set_description_str(what, refresh=False)
        self.bar.set_postfix_str(f"{duration(max(0.0, self.left) * elapsed / self.spent)} left", refresh=False)
        self.bar.update(sum(window.fed for window in windows))

    def close(self) -> None:
        """Removes the bar."""
        self.bar.close()


@contextmanager
def token_progress(tokens: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar and yields a function that advances it by a number of tokens."""
    with tqdm(total=tokens, unit="tok", unit_scale=True, disable=not show, file=sys.stderr) as bar:

        def advance(read: int) -> None:
            bar.update(read)

        yield advance


@dataclass
class Peak:
    """Peak memory in bytes, above the memory at the start of the measurement."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device, interval: float = 0.05) -> Iterator[Peak]:
    """Measures the peak memory of a ``with`` block, above the memory in use at its start.

    On CUDA the allocator reports the peak; elsewhere the resident size of the process is sampled.

    Args:
        device: The device to measure.
        interval: Seconds between two samples.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        try:
            yield peak
        finally:
            torch.cuda.synchronize(device)
            peak.bytes = torch.cuda.max_memory_allocated(device) - held
        return
    process, done = psutil.Process(), threading.Event()
    held = process.memory_info().rss

    def sample() -> None:
        while not done.wait(interval):
            peak.bytes = max(peak.bytes, process.memory_info().rss - held)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


def duration(seconds: float) -> str:
    """Formats a duration as ``4 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    total = round(seconds)
    hours, minutes = total // 3600, total % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {total % 60} s" if minutes else f"{total} s"


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)

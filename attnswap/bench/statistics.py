"""Medians with confidence intervals, and the exponents of power laws."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Ratio:
    """A median with the ends of its confidence interval."""

    median: float
    lo: float
    hi: float


def median_interval(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Ratio:
    """Returns the median and its 95% percentile bootstrap interval.

    Args:
        values: One value per round.
        seed: Seed of the resampling.
        resamples: Number of bootstrap samples.
    """
    array = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    tail = (1 - LEVEL) / 2
    lo, hi = np.quantile(np.median(array[drawn], axis=1), [tail, 1 - tail])
    return Ratio(float(np.median(array)), float(lo), float(hi))


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """Fits ``values ~ lengths ** e`` by least squares of the logarithms.

    Returns:
        e, or None if there are fewer than two lengths, or if a value is not positive.
    """
    if len(set(lengths)) < 2 or min(values) <= 0:
        return None
    x, y = np.log(np.asarray(lengths, dtype=np.float64)), np.log(np.asarray(values, dtype=np.float64))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())

"""What the project promises of its speed beside torch's attention, and whether a cell keeps it."""

from typing import Literal

from attnswap.bench.cases import Case, Setting
from attnswap.bench.statistics import Ratio

Verdict = Literal["pass", "fail", "report only"]

BOUNDS: dict[str, tuple[float, float]] = {
    "ssmax": (1.10, 1.10),
    "selective-temperature": (1.10, 1.10),
    "sigmoid": (1.15, 1.15),
    "softpick": (1.15, 1.15),
    "forgetting-gate": (1.15, 1.15),
}
"""Largest ratio of the time to SDPA's by swap: forward, and forward with backward."""

ROUTES: dict[str, tuple[float, float]] = {"row": (1.8, 2.2)}
"""The same for every other swap of a route."""

LENGTHS = (2048, 8192)
"""From where to where the bounds hold: shorter calls are over before they are measured well."""

DTYPE = "float32"
"""The dtype the bounds hold for; others are only reported."""


def bound(case: Case, setting: Setting) -> float | None:
    """Returns the bound of a cell, or None where nothing is promised."""
    traits = case.traits
    if traits is None or setting.dtype != DTYPE or not LENGTHS[0] <= setting.length <= LENGTHS[1]:
        return None
    found = BOUNDS.get(case.swap["name"], ROUTES.get(traits.route))
    return None if found is None else found[setting.backward]


def verdict(limit: float | None, ratio: Ratio) -> Verdict:
    """Judges a cell: it passes only if the whole interval lies below its bound."""
    if limit is None:
        return "report only"
    return "pass" if ratio.hi < limit else "fail"

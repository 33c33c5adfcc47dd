"""What the project promises of its speed beside torch's attention, and whether a cell keeps it."""

from dataclasses import dataclass
from typing import Literal

from attnswap.bench.cases import Case, Setting
from attnswap.bench.statistics import Ratio

Verdict = Literal["pass", "fail", "report only"]


@dataclass(frozen=True)
class Bound:
    """Largest ratios of the time to SDPA's.

    Attributes:
        forward: Of the forward pass.
        backward: Of forward and backward together; None: nothing is promised.
        dtypes: Where they hold.
        lengths: From where to where they hold: shorter calls are over before they are measured well.
    """

    forward: float
    backward: float | None
    dtypes: tuple[str, ...] = ("float32",)
    lengths: tuple[int, int] = (2048, 8192)


FOLDED = Bound(1.10, 1.10, ("float32", "bfloat16"))
BOUNDS: dict[str, Bound] = {
    "ssmax": FOLDED,
    "selective-temperature": FOLDED,
    "sigmoid": Bound(1.15, 1.15),
    "softpick": Bound(1.15, 1.15),
    "forgetting-gate": Bound(1.15, 1.15, lengths=(2048, 16384)),
}
"""By swap."""

ROUTES: dict[str, Bound] = {"row": Bound(1.8, 2.2)}
"""The same for every other swap of a route."""

PRUNED = Bound(0.5, 0.5, lengths=(16384, 16384))
"""For a gate that forgets half of everything at each token, so that most keys need not be read."""
HALVED = -0.69

TILED = Bound(1.8, None)
"""For elementwise swaps without a compiler."""


def bound(case: Case, setting: Setting, backend: str | None = None) -> float | None:
    """Returns the bound of a cell, or None where nothing is promised.

    Args:
        case: What is measured.
        setting: Where.
        backend: What serves it.
    """
    traits = case.traits
    if traits is None:
        return None
    limit = TILED if backend == "tiled" else BOUNDS.get(case.swap["name"], ROUTES.get(traits.route))
    if case.fill.get("log_forget", 0.0) < HALVED and setting.length >= PRUNED.lengths[0] and backend != "tiled":
        limit = PRUNED
    if limit is None or setting.dtype not in limit.dtypes:
        return None
    if not limit.lengths[0] <= setting.length <= limit.lengths[1]:
        return None
    return limit.backward if setting.backward else limit.forward


def verdict(limit: float | None, ratio: Ratio) -> Verdict:
    """Judges a cell: it passes only if the whole interval lies below its bound."""
    if limit is None:
        return "report only"
    return "pass" if ratio.hi < limit else "fail"

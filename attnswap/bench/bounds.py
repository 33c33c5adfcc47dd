"""The speed that the project promises relative to torch's attention, and whether a measurement keeps the promise."""

from dataclasses import dataclass
from typing import Literal

from attnswap.bench.cases import Case, Setting
from attnswap.bench.statistics import Ratio

Verdict = Literal["pass", "fail", "report only"]


@dataclass(frozen=True)
class Bound:
    """Upper bounds of the time relative to SDPA.

    Attributes:
        forward: Bound for the forward pass.
        backward: Bound for forward and backward together; None: no bound.
        dtypes: The dtypes for which the bounds hold.
        lengths: The smallest and largest length for which they hold. Shorter calls are too short to measure well.
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
"""Bounds by name of the swap."""

ROUTES: dict[str, Bound] = {"row": Bound(1.8, 2.2)}
"""Bounds of all other swaps, by their route."""

PRUNED = Bound(0.5, 0.5, lengths=(16384, 16384))
"""Bound for a forgetting gate that forgets half or more at each token, so that most keys need not be read."""
LOG_HALF = -0.69

TILED = Bound(1.8, None)
"""Bound for elementwise swaps in plain torch, which runs if there is no compiler."""


GOALS = {"sigmoid": 1.0, "softpick": 1.0, "forgetting-gate": 1.1, "entmax": 1.3}
"""Goals on a GPU, forward and backward together, in bf16 at head_dim 128 and 16384 tokens. They are no promise.

That of the forgetting gate is for gates that forget nothing, so that all keys are read.
"""


def goal(case: Case, setting: Setting) -> float | None:
    """Returns the goal of a measurement on a GPU, or None."""
    here = (setting.dtype, setting.shape.head_dim, setting.length, setting.backward) == ("bfloat16", 128, 16384, True)
    return GOALS.get(case.swap["name"]) if here and not any(case.fill.values()) else None


def bound(case: Case, setting: Setting, backend: str | None = None) -> float | None:
    """Returns the bound of a measurement, or None if nothing is promised.

    Args:
        case: The case.
        setting: The setting.
        backend: Name of the backend that computes it.
    """
    traits = case.traits
    if traits is None:
        return None
    if setting.device != "cpu":
        return goal(case, setting)
    limit = TILED if backend == "tiled" else BOUNDS.get(case.swap["name"], ROUTES.get(traits.route))
    if case.fill.get("log_forget", 0.0) < LOG_HALF and setting.length >= PRUNED.lengths[0] and backend != "tiled":
        limit = PRUNED
    if limit is None or setting.dtype not in limit.dtypes:
        return None
    if not limit.lengths[0] <= setting.length <= limit.lengths[1]:
        return None
    return limit.backward if setting.backward else limit.forward


def verdict(limit: float | None, ratio: Ratio) -> Verdict:
    """Returns "pass" if the confidence interval of a ratio is entirely below its bound, else "fail"."""
    if limit is None:
        return "report only"
    return "pass" if ratio.hi < limit else "fail"

"""Named statistics of a row of scores, on which the weights of the row may depend.

A swap returns them by name from :meth:`attnswap.swaps.base.Swap.statistics`. They are computed in that order, and the
functions of later ones, ``weight``, ``norm`` and ``null`` read them as attributes of the numbers ``p``. Each runs over
the visible keys of a row. A model's own sink takes part in :class:`Sum`, :class:`Max` and :class:`Root` with its logit
as score; swaps with any other statistic are refused for models that have sinks.

Only what the result depends on is a statistic: the shift that keeps exponentials finite is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Curve = Callable[[Any, Any, Any], Any]
"""A function of score, shift and the numbers ``p``, written in the vocabulary of ``attnswap.swaps.expression``."""


@dataclass(frozen=True)
class Sum:
    """The sum of a function of the scores.

    Attributes:
        of: The function.
    """

    of: Curve


@dataclass(frozen=True)
class Max:
    """The largest score; equal scores share its gradient."""


@dataclass(frozen=True)
class Min:
    """The smallest score; equal scores share its gradient."""


@dataclass(frozen=True)
class Root:
    """The number r at which the sum of a function f(s, r) is ``target``; differentiated implicitly.

    Attributes:
        of: The function of score, r and the numbers ``p``. It must not rise with r.
        bracket: Returns a lower bound of r, where the sum is ``target`` or more, and an upper bound, given the row's
            largest score, the number of its keys (both with the model's sink) and ``p``.
        target: The sum, positive.
        power: Returns the power of the sum that is closest to linear in r, for the steps of the solver; 0 means its
            logarithm.
    """

    of: Curve
    bracket: Callable[[Any, Any, Any], tuple[Any, Any]]
    target: float = 1.0
    power: Callable[[Any], Any] = lambda p: 1.0


@dataclass(frozen=True)
class Rank:
    """The k-th largest score, or the smallest one of a row with fewer keys; without gradients, for comparisons.

    Attributes:
        k: At least 1.
    """

    k: int


@dataclass(frozen=True)
class Scan:
    """For each key the sum of a function over the scores of the visible keys after it.

    Attributes:
        of: The function.
    """

    of: Curve


Statistic = Sum | Max | Min | Root | Rank | Scan
WITHOUT_SINKS = (Min, Rank, Scan)
"""The statistics in which a model's sink has no place."""

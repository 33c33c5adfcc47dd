"""Which cases of a grid of parameters ``make test`` runs, where the test is marked ``thinned(n)``."""

from collections.abc import Hashable, Sequence

import pytest


def kept(cases: Sequence[tuple[Hashable, ...]], n: int) -> set[int]:
    """Chooses about one of n cases of a grid so that each value of each axis stays.

    Args:
        cases: The cases in order, each as its values along the axes. With one axis, every n-th is chosen.
        n: How many cases one chosen case stands for.

    Returns:
        The positions of the chosen cases.
    """
    orders = [{value: i for i, value in enumerate(dict.fromkeys(axis))} for axis in zip(*cases, strict=True)]
    sums = [sum(order[value] for order, value in zip(orders, case, strict=True)) for case in cases]
    chosen = {i for i, total in enumerate(sums) if total % n == 0}
    if len(orders) == 1:
        return chosen
    met = {pair for i in chosen for pair in enumerate(cases[i])}
    while missing := [pair for case in cases for pair in enumerate(case) if pair not in met]:
        best = max(range(len(cases)), key=lambda i: len(set(missing).intersection(enumerate(cases[i]))))
        chosen.add(best)
        met.update(enumerate(cases[best]))
    return chosen


def axes_of(item: pytest.Function) -> tuple[Hashable, ...]:
    """Returns what one case has along each axis, which is one ``parametrize`` each."""
    # Not callspec.indices: pytest counts through all cases there, whatever the axis.
    found = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        found.append(tuple(id(item.callspec.params[name.strip()]) for name in names))
    return tuple(found)

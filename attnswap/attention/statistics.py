"""The statistics of a row of scores in plain torch, with their gradients."""

from typing import Any

import torch
from torch import Tensor

from attnswap.attention.roots import Found, find_root, roots, with_sinks
from attnswap.swaps.base import Numbers, Swap
from attnswap.swaps.statistics import WITHOUT_SINKS, Max, Min, Rank, Root, Scan, Statistic, Sum

Known = dict[str, Found]
"""The roots among the statistics of some rows, by name."""


def sinks_refused(swap: Swap) -> str | None:
    """Returns the name of a statistic in which a model's own sinks have no place, if the swap has one."""
    return next((name for name, kind in swap.statistics().items() if isinstance(kind, WITHOUT_SINKS)), None)


def with_statistics(
    swap: Swap, s: Tensor, visible: Tensor, sinks: Tensor | None, shift: Any, p: Numbers, known: Known | None = None
) -> Numbers:
    """Returns the numbers with the statistics of some rows among them.

    Args:
        swap: The swap that names them.
        s: Scores, shape (batch, heads, rows, keys).
        visible: Which keys count, broadcastable to the scores.
        sinks: Scores of the null keys, (heads, 1, 1) or (batch, heads, rows, 1), or None.
        shift: Each row's shift, (batch, heads, rows, 1).
        p: The numbers that do not depend on scores.
        known: What :func:`find_roots` returned, if it was asked before.

    Returns:
        Numbers in which each statistic is (batch, heads, rows, 1), or (batch, heads, rows, keys) for a scan.
    """
    for name, kind in swap.statistics().items():
        p = p.plus(**{name: _compute(kind, s, visible, sinks, shift, p, (known or {}).get(name))})
    return p


@torch.no_grad()
def find_roots(swap: Swap, s: Tensor, visible: Tensor, sinks: Tensor | None, shift: Any, p: Numbers) -> Known:
    """Solves for the roots among the statistics; the arguments are those of :func:`with_statistics`."""
    found = {}
    for name, kind in swap.statistics().items():
        if isinstance(kind, Root):
            found[name] = find_root(kind, *with_sinks(s, visible, sinks), p)
        value = found[name][0] if name in found else _compute(kind, s, visible, sinks, shift, p, None)
        p = p.plus(**{name: value})
    return found


def _compute(
    kind: Statistic, s: Tensor, visible: Tensor, sinks: Tensor | None, shift: Any, p: Numbers, known: Found | None
) -> Tensor:
    """Returns one statistic; for rows without a key or sink some finite number."""
    if isinstance(kind, Root):
        return roots(kind, *with_sinks(s, visible, sinks), p, known)
    if isinstance(kind, Sum | Scan):
        each = torch.where(visible, kind.of(torch.where(visible, s, shift), shift, p), 0.0)
        if isinstance(kind, Scan):
            return _sum_of_later(each)
        total = each.sum(-1, keepdim=True)
        if sinks is not None:
            return total + kind.of(sinks, shift, p)
        return torch.where(visible.any(-1, keepdim=True), total, 1.0)  # weights divide by it
    if isinstance(kind, Max):
        return _largest(*with_sinks(s, visible, sinks))
    if isinstance(kind, Min):
        return -_largest(-s, visible.expand(s.shape))
    assert isinstance(kind, Rank)
    return _ranked(s.detach(), visible.expand(s.shape), kind.k)


def _sum_of_later(each: Tensor) -> Tensor:
    """Returns for each key the sum over the keys after it. Without a difference: that would lose small sums."""
    later = torch.cat([each[..., 1:], torch.zeros_like(each[..., :1])], -1)
    return later.flip(-1).cumsum(-1).flip(-1)


def _largest(s: Tensor, visible: Tensor) -> Tensor:
    if not s.shape[-1]:
        return s.new_zeros(*s.shape[:-1], 1)
    # The smallest finite number, not -inf: where all are equal, each would get a share of the gradient of infinity.
    lowest = torch.finfo(s.dtype).min
    return torch.where(visible.any(-1, keepdim=True), s.masked_fill(~visible, lowest).amax(-1, keepdim=True), 0.0)


def _ranked(s: Tensor, visible: Tensor, k: int) -> Tensor:
    if not s.shape[-1]:
        return s.new_zeros(*s.shape[:-1], 1)
    largest = s.masked_fill(~visible, -torch.inf).topk(min(k, s.shape[-1]), -1).values
    last = visible.sum(-1, keepdim=True).clamp(1, largest.shape[-1]) - 1
    return torch.where(visible.any(-1, keepdim=True), largest.gather(-1, last), 0.0)

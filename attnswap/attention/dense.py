"""The dense reference: what a swap is, in plain torch, for any dtype and with autograd.

Run in fp64 it is the oracle of every other backend. The chunked backend calls the same block of rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnswap.attention.statistics import Known, find_roots, with_statistics
from attnswap.swaps.base import Numbers, Pair, Terms

if TYPE_CHECKING:
    from attnswap.attention.problem import Problem  # which gives its logsumexp by way of this module


@dataclass(frozen=True)
class Block:
    """Queries ``start`` to ``stop`` against keys ``k0`` to ``k1``."""

    start: int
    stop: int
    k0: int
    k1: int


def grouped_matmul(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """Multiplies per query head with matrices held per key/value head, without repeating the latter.

    Args:
        a: Shape (batch, heads, m, k).
        b: Shape (batch, heads / groups, k, n).
        groups: Query heads per key/value head.

    Returns:
        Shape (batch, heads, m, n).
    """
    batch, heads, rows, inner = a.shape
    folded = a.reshape(batch, heads // groups, groups * rows, inner)
    return torch.matmul(folded, b).reshape(batch, heads, rows, b.shape[-1])


def scores(problem: Problem, terms: Terms, block: Block, p: Numbers | None = None) -> Tensor:
    """Returns ``a_i A_ij cap(scaling q.k) + b_i + c_j + B_ij`` of a block, shape (batch, heads, rows, keys).

    Args:
        problem: The call.
        terms: Its terms.
        block: Which rows and keys.
        p: The per-head values, for the pair stage; None: without that stage.
    """
    rows, keys = slice(block.start, block.stop), slice(block.k0, block.k1)
    dtype = problem.dtype
    if problem.content is None:
        query, key = problem.query[:, :, rows].to(dtype), problem.key[:, :, keys].to(dtype)
        s = grouped_matmul(query, key.transpose(-1, -2), problem.groups) * problem.scaling
    else:
        s = problem.content[:, :, rows, keys]
    if problem.softcap is not None:
        s = torch.tanh(s / problem.softcap) * problem.softcap
    if terms.query_scale is not None:
        s = s * terms.query_scale[..., rows, None]
    if p is None or "pair" not in problem.swap.stages:
        return s + bias(problem, terms, block)
    pair = problem.pair(block.start, block.stop, block.k0, block.k1)
    scale = problem.swap.pair_scale(pair, p)
    s = (s if scale is None else s * scale) + bias(problem, terms, block)
    for added in (pair_bias(problem, pair, p), problem.distance_bias(pair)):
        s = s if added is None else s + added
    return s


def pair_bias(problem: Problem, pair: Pair, p: Numbers) -> Tensor | None:
    """Returns the swap's own bias of a block's pairs, broadcastable to its scores; None: there is none."""
    swap = problem.swap
    return None if swap.random and pair.uniform is None else swap.pair_bias(pair, p)


def bias(problem: Problem, terms: Terms, block: Block) -> Tensor | float:
    """Returns ``b_i + c_j + B_ij`` of a block in the computing dtype.

    The two parts of a large cumulative sum meet in fp64, where their difference is exact, before they are rounded.
    """
    rows, keys = slice(block.start, block.stop), slice(block.k0, block.k1)
    total: Tensor | float = 0.0
    if terms.query_bias is not None:
        total = total + terms.query_bias[..., rows, None]
    if terms.key_bias is not None:
        total = total + terms.key_bias[..., None, keys]
    if isinstance(total, Tensor):
        total = total.to(problem.dtype)
    if problem.visibility.bias is not None:
        total = total + problem.visibility.bias[:, :, rows, keys].to(problem.dtype)
    return total


def sink_column(problem: Problem, block: Block) -> Tensor | None:
    """Returns the scores of the null keys, (heads, 1, 1) or (batch, heads, rows, 1), in the computing dtype."""
    if problem.sinks is None or problem.sinks.ndim == 1:
        return None if problem.sinks is None else problem.per_head(problem.sinks, 2)
    return problem.sinks[:, :, block.start : block.stop, None].to(problem.dtype)


def row_numbers(problem: Problem, block: Block, p: Numbers) -> Numbers:
    """Returns the numbers that the maths of a block's rows reads, before their statistics."""
    return p.plus(n=problem.visibility.n[..., block.start : block.stop, None].to(problem.dtype))


def block_roots(problem: Problem, terms: Terms, p: Numbers, block: Block) -> Known | None:
    """Returns the roots of a block's rows, if the swap has any."""
    if "statistics" not in problem.swap.stages:
        return None
    with torch.no_grad():
        visible = problem.visibility.mask(block.start, block.stop, block.k0, block.k1)
        s, sinks = scores(problem, terms, block, p), sink_column(problem, block)
        shift = reference_shift(problem, s, visible, sinks, p)
        return find_roots(problem.swap, s, visible, sinks, shift, row_numbers(problem, block, p))


def attend_block(
    problem: Problem, terms: Terms, p: Numbers, block: Block, known: Known | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the rows of a block over keys that include every visible one.

    Args:
        problem: The call.
        terms: Its terms.
        p: The per-head values.
        block: Which rows and keys.
        known: What :func:`block_roots` found, if it was asked before.

    Returns:
        Output (batch, heads, rows, value_dim) and weights (batch, heads, rows, keys), in the computing dtype.
    """
    swap, dtype = problem.swap, problem.dtype
    visible = problem.visibility.mask(block.start, block.stop, block.k0, block.k1)
    s, sinks = scores(problem, terms, block, p), sink_column(problem, block)
    shift = reference_shift(problem, s, visible, sinks, p)
    p = row_numbers(problem, block, p)
    if "statistics" in swap.stages:
        p = with_statistics(swap, s, visible, sinks, shift, p, known)
    s = torch.where(visible, s, shift)  # a finite stand-in, so that no masked score can poison a gradient
    weight = torch.where(visible, swap.weight(s, shift, p), 0.0)
    total = torch.where(visible, swap.norm(s, shift, p), 0.0).sum(-1, keepdim=True)
    if sinks is not None:
        total = total + swap.norm(sinks, shift, p)
    total = total + swap.null(shift, p.n, p)
    weights = torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), total * 0)  # NaN stays NaN
    if problem.dropout:
        weights = torch.nn.functional.dropout(weights, problem.dropout)
    value = problem.value[:, :, block.k0 : block.k1].to(dtype)
    if terms.value_scale is not None:
        value = value * terms.value_scale[..., block.k0 : block.k1, None].to(dtype)
    return grouped_matmul(weights, value, problem.groups), weights


def reference_shift(problem: Problem, s: Tensor, visible: Tensor, sinks: Tensor | None, p: Numbers) -> Tensor:
    """Returns each row's shift, a constant: its largest visible score, at least the swap's floor and the sink."""
    swap = problem.swap
    if not swap.shifted:
        return s.new_zeros(())
    hidden = s.masked_fill(~visible, -torch.inf)
    shift = hidden.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
    if sinks is not None:
        shift = torch.maximum(shift, sinks)
    floor = swap.shift_floor(p)
    if floor is not None:
        shift = torch.maximum(shift, shift.new_tensor(floor) if not isinstance(floor, Tensor) else floor)
    return torch.where(torch.isneginf(shift), 0.0, shift).detach()  # 0 for a row without keys


def attend(problem: Problem, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
    """Computes everything at once; memory grows with queries times keys.

    Returns:
        Output (batch, heads, queries, value_dim) in the dtype of the values and, if asked for, the weights.
    """
    problem = problem.regular()
    block = Block(0, problem.visibility.q_length, 0, problem.visibility.k_length)
    out, weights = attend_block(problem, *problem.shared(), block)
    return out.to(problem.value.dtype), weights if need_weights else None

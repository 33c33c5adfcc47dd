"""The native CPU backend: any elementwise swap in tiles of C++, forward and backward."""

import torch
from torch import Tensor

from attnswap.attention.native import build, ops
from attnswap.attention.problem import Problem
from attnswap.swaps.base import Swap

PLAIN = Swap()
"""Softmax: what every swap that only changes scores and values is computed by."""


def refusal(problem: Problem) -> str | None:
    """Says why these kernels cannot compute a call, or None where they can."""
    if problem.query.device.type != "cpu":
        return "it runs on the CPU alone"
    if problem.dropout:
        return "it has no dropout"
    if problem.swap.shift_gradient:
        return f'the result of "{problem.swap.name}" depends on the shift, which it takes as a constant'
    if problem.visibility.bias is not None and problem.visibility.bias.requires_grad:
        return "it gives no gradient to an additive mask"
    return build.unavailable()


def attend(problem: Problem) -> Tensor:
    """Computes a call with memory linear in its length, forward and backward.

    Half precision is computed in fp32, from fp32 copies of queries, keys and values.

    Returns:
        Output (batch, heads, queries, value_dim) in the dtype of the values, laid out (batch, queries, heads, ...).
    """
    swap = PLAIN if problem.swap.softmax_weighted else problem.swap
    terms, visibility = problem.terms, problem.visibility
    queries, dtype, scale = problem.query.shape[2], problem.dtype, terms.query_scale
    query, key, value = (x.to(dtype) for x in (problem.query, problem.key, problem.value))
    if scale is not None and problem.softcap is None:
        query, scale = query * scale[..., None], None
    if terms.value_scale is not None:
        value = value * terms.value_scale[..., None]
    row_bias = terms.query_bias
    if row_bias is not None and swap is PLAIN and problem.sinks is None:
        row_bias = row_bias.detach()  # it cancels: its gradient is 0, and would come out as rounding errors
    first, last = visibility.spans
    return ops.forward(
        build.program(swap, isinstance(problem.ramp, float) and problem.ramp == 1.0),
        *(_rows(x) for x in (query, key, value)),
        first,
        last,
        visibility.holes,
        None if visibility.dense is None else _rows(visibility.dense),
        None if visibility.bias is None else _rows(visibility.bias.to(dtype)),
        None if scale is None else _whole(scale.to(dtype), queries, problem),
        None if row_bias is None else _whole(row_bias.double(), queries, problem),
        None if terms.key_bias is None else _whole(terms.key_bias.double(), problem.key.shape[2], problem),
        None if problem.sinks is None else problem.sinks.to(dtype).contiguous(),
        _numbers(problem, swap),
        visibility.n.to(dtype).contiguous(),
        problem.scaling,
        problem.softcap or 0.0,
        # Tiles of decayed keys are skipped while what they could add stays below rounding.
        torch.finfo(dtype).eps if swap is PLAIN else 0.0,
    ).to(problem.value.dtype)


def _rows(x: Tensor) -> Tensor:
    """Returns a tensor whose last dimension lies in one piece; masks may be expanded."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _whole(x: Tensor, length: int, problem: Problem) -> Tensor:
    """Expands per-query or per-key values to (batch, heads, length)."""
    return x.expand(*problem.query.shape[:2], length).contiguous()


def _numbers(problem: Problem, swap: Swap) -> Tensor:
    """Returns the numbers the maths reads for each head, shape (heads, numbers); see :func:`codegen.parameters`."""
    if swap is PLAIN:
        return torch.ones(problem.query.shape[1], 1, dtype=problem.dtype, device=problem.query.device)
    heads = problem.query.shape[1]
    found = (torch.as_tensor(x, device=problem.query.device) for x in problem.numbers().values())
    return torch.stack([x.to(problem.dtype).expand(heads) for x in found], 1)

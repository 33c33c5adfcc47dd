"""The backend for machines without a compiler: any elementwise swap in tiles of plain torch, forward and backward."""

import torch
from torch import Tensor

from attnswap.attention import operands
from attnswap.attention.operands import whole
from attnswap.attention.problem import Problem
from attnswap.attention.tiled.engine import Attend
from attnswap.attention.tiled.scores import Setup


def refusal(problem: Problem) -> str | None:
    """Says why these tiles cannot compute a call, or None where they can."""
    if torch.compiler.is_compiling():
        return "it is not traced; the chunked backend is what torch.compile makes fast"
    return operands.refusal(problem)


def attend(problem: Problem) -> Tensor:
    """Computes a call with memory linear in its length, forward and backward.

    Returns:
        Output (batch, heads, queries, value_dim) in the dtype of the values, laid out (batch, queries, heads, ...).
    """
    problem = problem.regular()
    terms, dtype = problem.terms, problem.dtype
    scale, keys, sinks = terms.query_scale, terms.key_bias, problem.sinks
    setup = Setup(
        operands.kernel_swap(problem),
        problem.whole,
        problem.visibility,
        problem.scaling,
        problem.softcap,
    )
    return Attend.apply(
        setup,
        problem.query,
        problem.key,
        problem.scaled_value(),
        None if scale is None else whole(scale.to(dtype), problem.query.shape[2], problem),
        operands.row_bias(problem),
        None if keys is None else whole(keys.double(), problem.key.shape[2], problem),
        None if sinks is None else sinks.to(dtype),
        operands.numbers(problem),
    ).to(problem.value.dtype)

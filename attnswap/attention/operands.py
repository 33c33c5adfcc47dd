"""What the kernels of our own, native and Triton, take from a call in the same way."""

from collections.abc import Callable

import torch
from torch import Tensor

from attnswap.attention.codegen import maths_refusal, parameters
from attnswap.attention.modes import mode_of
from attnswap.attention.problem import Problem
from attnswap.swaps.base import Swap
from attnswap.swaps.softmax import Softmax

PLAIN = Softmax()
"""Softmax: what every swap that only changes scores and values is computed by."""


def refusal(problem: Problem) -> str | None:
    """Says what keeps any of these kernels from computing a call, or None."""
    if problem.dropout:
        return "it has no dropout"
    if not problem.query.shape[0]:
        return "the batch is empty"
    if problem.sinks is not None and problem.sinks.ndim > 1:
        return "it takes one sink for each head, and the model has one for each query"
    reason = maths_refusal(kernel_swap(problem))
    if reason:
        return reason
    if problem.visibility.bias is not None and problem.visibility.bias.requires_grad:
        return "it gives no gradient to an additive mask"
    mode = mode_of(problem.tensors())
    return None if mode is None else f"it takes no part in {mode}"


def kernel_swap(problem: Problem) -> Swap:
    """Returns the swap whose weights are computed: softmax's one for all that are softmax but for their terms."""
    return PLAIN if problem.swap.softmax_weighted else problem.swap.weighing[0]


def row_bias(problem: Problem) -> Tensor | None:
    """Returns the per-query bias, fp64 (batch, heads, queries), or None.

    In a softmax without sinks it cancels: its gradient is 0, and would come out as rounding errors.
    """
    bias = problem.terms.query_bias
    if bias is None:
        return None
    cancels = problem.swap.softmax_weighted and problem.sinks is None
    return whole((bias.detach() if cancels else bias).double(), problem.query.shape[2], problem)


def rows(x: Tensor) -> Tensor:
    """Returns a tensor whose last dimension lies in one piece; masks may be expanded."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def apart(x: Tensor) -> Tensor:
    """Returns a tensor whose rows lie in one piece each and do not overlap, as products of matrices take them."""
    fits = (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) >= x.shape[3]
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def whole(x: Tensor, length: int, problem: Problem) -> Tensor:
    """Expands per-query or per-key values to (batch, heads, length)."""
    return x.expand(*problem.query.shape[:2], length).contiguous()


def numbers(problem: Problem, reads: Callable[[str], bool] = lambda name: True) -> Tensor:
    """Returns the numbers the maths reads for each head, (heads, numbers); see :func:`codegen.parameters`.

    Args:
        problem: The call.
        reads: Whether the kernels need the gradient of a number; that of others comes from the score's terms alone.
    """
    heads, device = problem.query.shape[1], problem.query.device
    if problem.swap.softmax_weighted:
        return torch.ones(heads, 1, dtype=problem.dtype, device=device)
    swap, names = problem.swap.weighing
    given = {name: problem.numbers()[names.get(name, name)] for name in parameters(swap)}
    found = {name: torch.as_tensor(x, dtype=problem.dtype, device=device) for name, x in given.items()}
    used = (x if reads(name) else x.detach() for name, x in found.items())
    return torch.stack([x.expand(heads) for x in used], 1)

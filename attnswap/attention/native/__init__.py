"""The native CPU backend: any elementwise swap in tiles of C++, forward and backward."""

import torch
from torch import Tensor

from attnswap.attention import operands
from attnswap.attention.native import build, ops
from attnswap.attention.operands import apart, rows, whole
from attnswap.attention.problem import Problem


def refusal(problem: Problem) -> str | None:
    """Says why these kernels cannot compute a call, or None where they can."""
    if problem.query.device.type != "cpu":
        return "it runs on the CPU alone"
    whole = problem.whole or not problem.swap.native_ramp  # what blends two outputs is computed at lambda 1
    return operands.refusal(problem) or build.refusal(operands.kernel_swap(problem), whole)


def attend(problem: Problem) -> Tensor:
    """Computes a call with memory linear in its length, forward and backward.

    In bf16 the products run on matrix units (AMX) or vectors of bf16 (AVX512_BF16) where the processor has them, with
    fp32 scores, weights and sums. Without them, and in fp16, queries, keys and values are copied to fp32.

    Returns:
        Output (batch, heads, queries, value_dim) in the dtype of the values, laid out (batch, queries, heads, ...).
    """
    if problem.swap.traits.per_kv_head:  # the values of the heads it is for are scaled, which makes new ones
        problem = problem.regular()
    swap = operands.kernel_swap(problem)
    terms, visibility = problem.terms, problem.visibility
    queries, dtype, scale = problem.query.shape[2], problem.dtype, terms.query_scale
    held = torch.bfloat16 if problem.query.dtype == torch.bfloat16 else dtype
    query, key, value = (x.to(held) for x in (problem.query, problem.key, problem.value))
    if scale is not None and problem.softcap is None and held == dtype:
        query, scale = query * scale[..., None], None
    if terms.value_scale is not None:
        value = (value * terms.value_scale[..., None]).to(held)
    first, last = visibility.spans
    return ops.forward(
        build.program(swap, problem.whole),
        *(apart(x) for x in (query, key, value)),
        list(problem.kv_heads or ()),
        first,
        last,
        visibility.holes,
        None if visibility.dense is None else rows(visibility.dense),
        None if visibility.bias is None else rows(visibility.bias.to(dtype)),
        None if scale is None else whole(scale.to(dtype), queries, problem),
        operands.row_bias(problem),
        None if terms.key_bias is None else whole(terms.key_bias.double(), problem.key.shape[2], problem),
        None if problem.sinks is None else problem.sinks.to(dtype).contiguous(),
        operands.numbers(problem),
        visibility.n.to(dtype).contiguous(),
        problem.scaling,
        problem.softcap or 0.0,
        # Tiles of decayed keys are skipped while what they could add stays below rounding.
        torch.finfo(dtype).eps if swap is operands.PLAIN else 0.0,
    ).to(problem.value.dtype)

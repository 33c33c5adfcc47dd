"""The Triton backend: any elementwise swap in tiles on NVIDIA and AMD GPUs, forward and backward.

The kernels are checked against the fp64 reference in Triton's interpreter and compiled ahead of time for sm_80, sm_90,
sm_100 and gfx942 (``recipes/results/triton/``). They have not run on a GPU: their speed has not been measured.
"""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from attnswap.attention.problem import Problem
from attnswap.attention.triton import ops, program
from attnswap.attention.triton.tiles import WIDEST
from attnswap.swaps.base import Swap

PLAIN = Swap()
"""Softmax: what every swap that only changes scores and values is computed by."""


def refusal(problem: Problem) -> str | None:
    """Says why these kernels cannot compute a call, or None where they can."""
    if problem.query.device.type != "cuda" and not (problem.query.device.type == "cpu" and interpreted()):
        return "it runs on CUDA and ROCm devices (on a CPU only where TRITON_INTERPRET=1 is set, for checking)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if problem.query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in fp32, bf16 and fp16, not {problem.query.dtype}"
    width = max(problem.query.shape[3], problem.value.shape[3])
    if width > WIDEST:
        return f"it takes heads of at most {WIDEST} dimensions, not {width}"
    if problem.swap.threshold:
        return f'"{problem.swap.name}" needs the threshold of a whole row, which these kernels do not solve for'
    if problem.dropout:
        return "it has no dropout"
    if problem.swap.shift_gradient:
        return f'the result of "{problem.swap.name}" depends on the shift, which it takes as a constant'
    if problem.visibility.bias is not None and problem.visibility.bias.requires_grad:
        return "it gives no gradient to an additive mask"
    return None


def is_fast(problem: Problem) -> bool:
    """Whether the call is on a GPU: in the interpreter the kernels are for checking alone."""
    return problem.query.device.type == "cuda"


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, step by step, as ``TRITON_INTERPRET=1`` asks for."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def attend(problem: Problem) -> Tensor:
    """Computes a call with memory linear in its length, forward and backward.

    Returns:
        Output (batch, heads, queries, value_dim) in the dtype of the values, laid out (batch, queries, heads, ...).
    """
    return ops.forward(*operands(problem))[0]


def operands(problem: Problem) -> tuple[Any, ...]:
    """Returns what the operator takes, in the order of ``ops.ORDER``."""
    swap = PLAIN if problem.swap.softmax_weighted else problem.swap
    terms, visibility, value = problem.terms, problem.visibility, problem.value
    queries, keys = problem.query.shape[2], problem.key.shape[2]
    if terms.value_scale is not None:
        value = (value * terms.value_scale[..., None]).to(value.dtype)
    scale, row_bias, key_bias = terms.query_scale, terms.query_bias, terms.key_bias
    if row_bias is not None and swap is PLAIN and problem.sinks is None:
        row_bias = row_bias.detach()  # it cancels: its gradient is 0, and would come out as rounding errors
    return (
        _source(swap),
        swap.shifted,
        *(_rows(x) for x in (problem.query, problem.key, value)),
        *visibility.spans,
        visibility.holes,
        visibility.dense,
        visibility.bias,
        None if scale is None else _whole(scale.float(), queries, problem),
        None if row_bias is None else _whole(row_bias.double(), queries, problem),
        None if key_bias is None else _whole(key_bias.double(), keys, problem),
        None if problem.sinks is None else problem.sinks.float().contiguous(),
        _numbers(problem, swap),
        visibility.n.float().contiguous(),
        problem.scaling,
        problem.softcap or 0.0,
    )


@torch.compiler.assume_constant_result
def _source(swap: Swap) -> str:
    return program.source(swap)


@torch.compiler.assume_constant_result
def _reads(swap: Swap, name: str) -> bool:
    return program.reads(swap, name)


def _rows(x: Tensor) -> Tensor:
    """Returns a tensor whose last dimension lies in one piece."""
    return x if x.stride(3) == 1 else x.contiguous()


def _whole(x: Tensor, length: int, problem: Problem) -> Tensor:
    """Expands per-query or per-key values to (batch, heads, length)."""
    return x.expand(*problem.query.shape[:2], length).contiguous()


def _numbers(problem: Problem, swap: Swap) -> Tensor:
    """Returns the numbers the maths reads for each head, fp32 (heads, numbers); see :func:`codegen.parameters`."""
    heads, device = problem.query.shape[1], problem.query.device
    if swap is PLAIN:
        return torch.ones(heads, 1, device=device)
    found = {"ramp": torch.as_tensor(problem.ramp, device=device)}
    found |= {k: problem.features[k] for k, f in swap.features().items() if f.per == "head"}
    # What only the score's terms read gets its gradient there; the kernels need not look for another.
    used = (x if _reads(swap, name) else x.detach() for name, x in found.items())
    return torch.stack([x.float().expand(heads) for x in used], 1)

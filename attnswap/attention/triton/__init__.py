"""The Triton backend: any elementwise or row swap in tiles on NVIDIA and AMD GPUs, forward and backward.

The kernels are checked against the fp64 reference in Triton's interpreter and compiled ahead of time for sm_80, sm_90,
sm_100 and gfx942 (``results/triton/``). They have not run on a GPU: their speed has not been measured.
"""

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from attnswap.attention import operands as shared
from attnswap.attention.codegen import solved
from attnswap.attention.lazy import constant
from attnswap.attention.operands import rows, whole
from attnswap.attention.problem import Problem
from attnswap.attention.triton import ops, program
from attnswap.attention.triton.tiles import WIDEST
from attnswap.swaps.base import Swap

OLDEST = (3, 5)
"""The first version of triton whose compiler can be told not to hoist loads, as the backward kernel needs."""


def refusal(problem: Problem) -> str | None:
    """Says why these kernels cannot compute a call, or None where they can."""
    if problem.query.device.type != "cuda" and not (problem.query.device.type == "cpu" and interpreted()):
        return "it runs on CUDA and ROCm devices (on a CPU only where TRITON_INTERPRET=1 is set, for checking)"
    if not _installed():
        return "triton is not installed (pip install triton)"
    if _version() < OLDEST:
        return f"triton {'.'.join(map(str, _version()))} is too old (pip install 'triton>=3.5')"
    if problem.query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in fp32, bf16 and fp16, not {problem.query.dtype}"
    width = max(problem.query.shape[3], problem.value.shape[3])
    if width > WIDEST:
        return f"it takes heads of at most {WIDEST} dimensions, not {width}"
    return shared.refusal(problem)


@constant
@functools.cache
def _version() -> tuple[int, ...]:
    import triton  # its distributions for ROCm and nightly builds go by other names

    return tuple(int(x) for x in triton.__version__.split(".")[:2])


def is_fast(problem: Problem) -> bool:
    """Whether the call is on a GPU: in the interpreter the kernels are for checking alone."""
    return problem.query.device.type == "cuda"


@constant
@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


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
    problem = problem.regular()  # the kernels know equal groups alone
    swap = shared.kernel_swap(problem)
    terms, visibility = problem.terms, problem.visibility
    queries, keys = problem.query.shape[2], problem.key.shape[2]
    scale, key_bias = terms.query_scale, terms.key_bias
    arguments = (
        _source(swap, problem.whole),
        swap.shifted,
        solved(swap) is not None,
        *(rows(x) for x in (problem.query, problem.key, problem.scaled_value())),
        *visibility.spans,
        visibility.holes,
        visibility.dense,
        visibility.bias,
        None if scale is None else whole(scale.float(), queries, problem),
        shared.row_bias(problem),
        None if key_bias is None else whole(key_bias.double(), keys, problem),
        None if problem.sinks is None else problem.sinks.float().contiguous(),
        shared.numbers(problem, functools.partial(_reads, swap, problem.whole)),
        visibility.n.float().contiguous(),
        problem.scaling,
        problem.softcap or 0.0,
        # Tiles of decayed keys are left out while what they could add stays below rounding.
        torch.finfo(torch.float32).eps if swap is shared.PLAIN else 0.0,
    )
    return *arguments, torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


@constant
def _source(swap: Swap, whole_ramp: bool) -> str:
    return program.source(swap, whole_ramp)


@constant
def _reads(swap: Swap, whole_ramp: bool, name: str) -> bool:
    return program.reads(swap, name, whole_ramp)

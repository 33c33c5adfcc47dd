"""The logsumexp of each query's scores: softmax's normalizer, which sigmoid attention has to do without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnswap.attention.chunked import row_blocks
from attnswap.attention.dense import scores, sink_column
from attnswap.swaps.base import Terms

if TYPE_CHECKING:
    from attnswap.attention.problem import Problem  # which gives its logsumexp by way of this module


@torch.no_grad()
def logsumexp(problem: Problem, power: float = 1.0) -> Tensor:
    """Returns the logsumexp of a call's scores as the model made them, without the swap's own terms.

    Args:
        problem: The call.
        power: Multiplies the scores, and with them the model's own sinks.

    Returns:
        Shape (batch, heads, queries), in the computing dtype, without gradients; 0 for a row that sees no key.
    """
    problem = problem.regular()
    if _stock_serves(problem):
        return _stock(problem, power)
    parts = []
    for block in row_blocks(problem):
        visible = problem.visibility.mask(block.start, block.stop, block.k0, block.k1)
        s = scores(problem, Terms(), block).masked_fill(~visible, -torch.inf)
        sinks = sink_column(problem, block)
        if sinks is not None:
            s = torch.cat([s, sinks.expand(*s.shape[:3], 1)], dim=-1)
        total = (s if power == 1 else power * s).logsumexp(-1)
        parts.append(total.masked_fill(total.isneginf(), 0.0))
    return torch.cat(parts, dim=2)


def _stock_serves(problem: Problem) -> bool:
    """Whether torch's kernel for the CPU, which returns what it divided by, takes this call."""
    plain = problem.softcap is None and problem.sinks is None and problem.content is None
    plain = plain and problem.visibility.bias is None and problem.visibility.plain_causal
    # It answers for 16 bits in fp32 and has no fp64 form of that number.
    return plain and problem.query.device.type == "cpu" and problem.dtype == torch.float32 and not _tracing()


def _tracing() -> bool:
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def _stock(problem: Problem, power: float) -> Tensor:
    key = problem.key.repeat_interleave(problem.groups, 1)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(problem.query, key, key, 0.0, True, scale=power * problem.scaling)[1].to(problem.dtype)

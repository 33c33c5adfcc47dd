"""Any swap in bounded memory: rows are computed in chunks and recomputed in the backward pass."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnswap.attention.dense import Block, attend_block
from attnswap.attention.problem import Problem
from attnswap.swaps.base import Terms

CHUNK_ELEMENTS = 1 << 24
"""Scores held at once (64 MiB in fp32)."""


def row_blocks(problem: Problem, elements: int = CHUNK_ELEMENTS) -> list[Block]:
    """Cuts the queries into blocks whose scores stay below ``elements``, keys outside the visible span dropped."""
    visibility = problem.visibility
    batch, heads = problem.query.shape[:2]
    rows = max(1, elements // max(1, batch * heads * visibility.k_length))
    rows = rows if rows < 64 else rows - rows % 64
    blocks = []
    for start in range(0, visibility.q_length, rows):
        stop = min(start + rows, visibility.q_length)
        blocks.append(Block(start, stop, *visibility.key_span(start, stop)))
    return blocks


def attend(problem: Problem) -> Tensor:
    """Computes a swap with memory linear in the number of keys, forward and backward.

    Returns:
        Output (batch, heads, queries, value_dim) in the dtype of the values.
    """
    terms, p = problem.terms(), problem.maths_parameters()

    def rows(query: Tensor, key: Tensor, value: Tensor, block: Block, terms: Terms) -> Tensor:
        return attend_block(problem, terms, block, p)[0].to(value.dtype)

    blocks = row_blocks(problem)
    recompute = torch.is_grad_enabled() and len(blocks) > 1
    outs = []
    for block in blocks:
        args = (problem.query, problem.key, problem.value, block, terms)
        outs.append(checkpoint(rows, *args, use_reentrant=False) if recompute else rows(*args))
    return torch.cat(outs, 2)

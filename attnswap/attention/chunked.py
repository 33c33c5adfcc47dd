"""Any swap in bounded memory: rows are computed in chunks and recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnswap.attention.dense import Block, attend_block, block_roots
from attnswap.attention.modes import mode_of

if TYPE_CHECKING:
    from attnswap.attention.problem import Problem  # which gives its logsumexp by way of this module

CHUNK_ELEMENTS = 1 << 24
"""Scores held at once (64 MiB in fp32)."""


def row_blocks(problem: Problem, elements: int | None = None) -> list[Block]:
    """Cuts the queries into blocks whose scores stay below ``elements``, keys outside the visible span dropped."""
    visibility = problem.visibility
    batch, heads = problem.query.shape[:2]
    rows = max(1, (elements or CHUNK_ELEMENTS) // max(1, batch * heads * visibility.k_length))
    rows = rows if rows < 64 else rows - rows % 64
    blocks = []
    for i in range(-(-visibility.q_length // rows)):  # torch.compile keeps the length open and fixes the count alone
        start, stop = i * rows, min((i + 1) * rows, visibility.q_length)
        blocks.append(Block(start, stop, *visibility.key_span(start, stop)))
    return blocks


def by_blocks(
    problem: Problem, rows: Callable[..., Tensor], ahead: Callable[[Block], Any] = lambda block: None
) -> Tensor:
    """Computes the output block by block; where gradients are wanted a block is computed again in the backward pass.

    Args:
        problem: The call.
        rows: Computes the output of a block.
        ahead: Computes what ``rows`` takes beside the block and what is kept for the backward pass.
    """
    blocks = row_blocks(problem)
    # A block that is computed again would have left the transform, if there is one.
    if torch.is_grad_enabled() and len(blocks) > 1 and mode_of(problem.tensors()) is None:
        return torch.cat([checkpoint(rows, block, ahead(block), use_reentrant=False) for block in blocks], 2)
    return torch.cat([rows(block, ahead(block)) for block in blocks], 2)


def attend(problem: Problem) -> Tensor:
    """Computes a swap with memory linear in the number of keys, forward and backward.

    Returns:
        Output (batch, heads, queries, value_dim) in the dtype of the values.
    """
    problem = problem.regular()
    terms, p = problem.shared()
    return by_blocks(
        problem,
        lambda block, known: attend_block(problem, terms, p, block, known)[0].to(problem.value.dtype),
        lambda block: block_roots(problem, terms, p, block),
    )

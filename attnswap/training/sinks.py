"""A loss on attention sinks: heads that give much of their weight to the first token of a text.

Only the weight above a threshold costs anything, since a head may have reasons to read the first token.
"""

import torch
from torch import Tensor

from attnswap.attention.dense import Block, attend_block
from attnswap.attention.problem import Problem
from attnswap.evaluation.structure import FIRST_QUERY
from attnswap.surgery.call import LayerCall

FREE_WEIGHT = 0.2
"""Mean weight on the first token that costs nothing. It is below :data:`attnswap.evaluation.structure.SINK`."""
QUERIES = 64
"""Queries per layer whose weights are computed: fused kernels do not return weights, so this is done a second time."""


class SinkLoss:
    """The mean weight above the threshold, over swapped heads and layers; an observer of every slot's problem.

    Each forward uses some neighbouring queries at a random place.

    Args:
        text_mask: Which positions are text and not padding, shape (batch, tokens).
    """

    def __init__(self, text_mask: Tensor) -> None:
        self.text_mask = text_mask
        self.means: list[Tensor] = []

    def __call__(self, call: LayerCall, slot: str, problem: Problem) -> None:
        """Adds the loss of one slot. The forward must be of complete windows, without a KV cache."""
        if call.slots[slot].phase == "before":
            return
        problem = problem.regular().staged
        visibility = problem.visibility
        length = visibility.q_length
        start = int(torch.randint(max(1, length - QUERIES + 1), ()))
        stop = min(start + QUERIES, length)
        block = Block(start, stop, *visibility.key_span(start, stop))
        weights = attend_block(problem, *problem.shared(), block)[1]
        n = visibility.n.expand(len(weights), -1, -1)[:, :1]
        is_first = n[..., None, block.k0 : block.k1] == 1  # the first token of a document sees only itself
        text_mask = self.text_mask[:, None, start:stop].to(n.device)
        rows = (n[..., start:stop] > FIRST_QUERY) & text_mask  # earlier queries see too few keys
        first_weight = ((weights * is_first).sum(-1) * rows).sum((0, 2)) / rows.sum((0, 2)).clamp(min=1)
        self.means.append((first_weight - FREE_WEIGHT).clamp(min=0).mean())

    def mean(self) -> Tensor | None:
        """Returns the mean over layers, or None if no layer computes a swap."""
        return torch.stack(self.means).mean() if self.means else None

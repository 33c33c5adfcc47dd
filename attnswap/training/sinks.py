"""How much attention goes to the first token of a text, as a loss: heads that rest there are sinks.

Only what a head gives it beyond a share that makes no sink of it costs anything, since the first token may be read for
what it says.
"""

import torch
from torch import Tensor

from attnswap.attention.dense import Block, attend_block
from attnswap.attention.problem import Problem
from attnswap.evaluation.structure import FIRST_QUERY
from attnswap.surgery.call import LayerCall

SPARED = 0.2
"""What a head may give the first token at no cost; above :data:`attnswap.evaluation.structure.SINK` it is a sink."""
ROWS = 64
"""Queries of each layer that are looked at, which the fused kernels do not show the weights of."""


class Sinks:
    """How far the swapped heads of each layer are sinks, a mean over heads: each head by some neighbouring queries.

    Args:
        read: Which positions are text, shape (batch, tokens).
    """

    def __init__(self, read: Tensor) -> None:
        self.read = read
        self.means: list[Tensor] = []

    def __call__(self, call: LayerCall, slot: str, problem: Problem) -> None:
        """Takes one slot's problem, of whole windows without cached keys; called by the seam."""
        if call.slots[slot].phase == "before":
            return
        visibility = problem.visibility
        length = visibility.q_length
        start = int(torch.randint(max(1, length - ROWS + 1), ()))
        stop = min(start + ROWS, length)
        block = Block(start, stop, *visibility.key_span(start, stop))
        problem = problem.regular()
        weights = attend_block(problem, problem.terms, block, problem.maths_parameters())[1]
        n = visibility.n.expand(len(weights), -1, -1)[:, :1]
        first = n[..., None, block.k0 : block.k1] == 1  # it sees itself alone
        read = self.read[:, None, start:stop].to(n.device)
        rows = (n[..., start:stop] > FIRST_QUERY) & read  # those before say little of a head
        given = ((weights * first).sum(-1) * rows).sum((0, 2)) / rows.sum((0, 2)).clamp(min=1)
        self.means.append((given - SPARED).clamp(min=0).mean())

    def mean(self) -> Tensor | None:
        """Returns the mean over layers, or None where nothing is swapped."""
        return torch.stack(self.means).mean() if self.means else None

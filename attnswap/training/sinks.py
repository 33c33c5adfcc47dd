"""How much attention goes to the first token of a text, as a loss: heads that rest there are sinks."""

import torch
from torch import Tensor

from attnswap.attention.dense import Block, attend_block
from attnswap.attention.problem import Problem
from attnswap.surgery.call import LayerCall

FEW = 64
"""Queries that see no more keys than this say little of a head, as in :mod:`attnswap.evaluation.structure`."""
ROWS = 64
"""Queries of each layer that are looked at, which the fused kernels do not show the weights of."""


class FirstWeights:
    """The mean weight on the first token, over the swapped heads and some neighbouring queries, of each layer."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def __call__(self, call: LayerCall, slot: str, problem: Problem) -> None:
        """Takes one slot's problem, of whole windows without cached keys; called by the seam."""
        visibility = problem.visibility
        length = visibility.q_length
        start = int(torch.randint(max(1, length - ROWS + 1), ()))
        stop = min(start + ROWS, length)
        block = Block(start, stop, *visibility.key_span(start, stop))
        problem = problem.regular()
        weights = attend_block(problem, problem.terms, block, problem.maths_parameters())[1]
        n = visibility.n.expand(len(weights), -1, -1)[:, :1]
        first = n[..., None, block.k0 : block.k1] == 1  # it sees itself alone
        rows = (n[..., start:stop] > FEW).expand(weights.shape[:3])
        self.means.append(((weights * first).sum(-1) * rows).sum() / rows.sum().clamp(min=1))

    def mean(self) -> Tensor | None:
        """Returns the mean over layers, or None where nothing is swapped."""
        return torch.stack(self.means).mean() if self.means else None

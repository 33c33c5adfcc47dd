"""What swaps predict of their rows, held against what the rows are, as a loss beside the others."""

import torch
from torch import Tensor

from attnswap.attention.problem import Problem
from attnswap.surgery.call import LayerCall


class Errors:
    """The squared errors of one forward."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def __call__(self, call: LayerCall, slot: str, problem: Problem) -> None:
        """Takes one slot's problem; called by the seam."""
        if call.slots[slot].phase == "before" or not problem.swap.needs_logsumexp:
            return
        error = problem.swap.regression(problem.call(with_logsumexp=True))
        if error is not None:
            seen = (problem.visibility.n > 0).to(error.dtype).expand_as(error)
            self.means.append((error * seen).sum() / seen.sum().clamp(min=1))

    def mean(self) -> Tensor | None:
        """Returns the mean over layers, or None where nothing is predicted."""
        return torch.stack(self.means).mean() if self.means else None

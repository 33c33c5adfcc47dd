"""What swaps predict of their rows, held against what the rows are, as a loss beside the others."""

import torch
from torch import Tensor

from attnswap.attention.problem import Problem
from attnswap.errors import ConfigError
from attnswap.surgery.call import LayerCall


class Errors:
    """The squared errors of one forward.

    Args:
        read: Which positions are text, shape (batch, tokens).
    """

    def __init__(self, read: Tensor) -> None:
        self.read = read
        self.means: list[Tensor] = []

    def __call__(self, call: LayerCall, slot: str, problem: Problem) -> None:
        """Takes one slot's problem; called by the seam."""
        if not problem.swap.needs_logsumexp:
            return
        error = problem.swap.regression(problem.call(with_logsumexp=True))
        if error is not None:
            read = self.read[:, None].to(error.device)
            seen = ((problem.visibility.n > 0) & read).to(error.dtype).expand_as(error)
            self.means.append((error * seen).sum() / seen.sum().clamp(min=1))

    def mean(self) -> Tensor:
        """Returns the mean over layers.

        Raises:
            ConfigError: None of the swaps predicts anything.
        """
        if not self.means:
            raise ConfigError(
                "loss.regression: no swap of this model learns a prediction by it (sigmoid with bias: predicted does): "
                "leave it out"
            )
        return torch.stack(self.means).mean()

"""A loss on the predictions that some swaps make of a row's statistics, such as its logsumexp."""

import torch
from torch import Tensor

from attnswap.attention.problem import Problem
from attnswap.errors import ConfigError
from attnswap.surgery.call import LayerCall


class RegressionLoss:
    """The mean squared error of the swaps' predictions in one forward; an observer of every slot's problem.

    Args:
        text_mask: Which positions are text and not padding, shape (batch, tokens).
    """

    def __init__(self, text_mask: Tensor) -> None:
        self.text_mask = text_mask
        self.means: list[Tensor] = []

    def __call__(self, call: LayerCall, slot: str, problem: Problem) -> None:
        """Adds the error of one slot."""
        if not problem.swap.needs_logsumexp:
            return
        error = problem.swap.regression(problem.call(with_logsumexp=True))
        if error is not None:
            text_mask = self.text_mask[:, None].to(error.device)
            counted = ((problem.visibility.n > 0) & text_mask).to(error.dtype).expand_as(error)
            self.means.append((error * counted).sum() / counted.sum().clamp(min=1))

    def mean(self) -> Tensor:
        """Returns the mean over layers.

        Raises:
            ConfigError: No swap of the model makes such predictions.
        """
        if not self.means:
            raise ConfigError(
                "loss.regression: no swap of this model makes predictions that it could train (sigmoid with "
                "bias: predicted does): set the weight to 0"
            )
        return torch.stack(self.means).mean()

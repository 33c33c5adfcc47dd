"""A loss over logits that exist for a chunk of positions at a time, with its gradient worked out on the way forward.

The head runs once: each chunk's logits are turned into the loss of their rows and at once into gradients of the hidden
states and of the head's own parameters, and forgotten. The backward pass only scales what is already there.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

ROWS = 16
"""Rows of logits that losses work on at once: what a core's cache holds of a vocabulary of 50k."""

IGNORED = -100
"""The label of a position that is not learned."""


class RowLoss(Protocol):
    """What a row of logits costs."""

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Returns the loss of each row, fp32 (rows,), and its gradient (rows, vocabulary) in the logits' dtype.

        Args:
            logits: Shape (rows, vocabulary).
            rows: Which rows of the whole these are.
        """


class CrossEntropy:
    """The negative log-likelihood of labels.

    Args:
        targets: Labels, -100 where there is none, shape (rows,).
    """

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """See :class:`RowLoss`."""
        return in_blocks(self._block, logits, self.targets[rows])

    def _block(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits.float().log_softmax(-1)
        labelled = (targets != IGNORED).to(log_p.dtype)
        chosen = targets.clamp(min=0)[:, None]
        nll = -log_p.gather(1, chosen)[:, 0] * labelled
        gradient = log_p.exp_().scatter_add_(1, chosen, torch.full_like(nll[:, None], -1.0)).mul_(labelled[:, None])
        return nll, gradient.to(logits.dtype)


def in_blocks(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Any:
    """Applies a function of rows to a few rows at a time, which stay in the cache that way."""
    if tensors[0].device.type != "cpu":
        return function(*tensors)
    parts = [function(*block) for block in zip(*(t.split(ROWS) for t in tensors), strict=True)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def head_loss(
    hidden: Tensor, head: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], loss: RowLoss, chunk: int
) -> tuple[Tensor, Tensor]:
    """Computes the summed loss of rows of hidden states, ``chunk`` rows of logits at a time.

    Args:
        hidden: Hidden states, shape (rows, width).
        head: Turns some of them into logits (rows, vocabulary).
        parameters: The trained parameters that the head may use.
        loss: What a row costs.
        chunk: Rows whose logits exist at the same time.

    Returns:
        The sum, differentiable once, and the loss of each row, shape (rows,).
    """
    trained = [p for p in parameters if p.requires_grad]
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained))
    return _HeadLoss.apply(hidden, head, loss, chunk, differentiate, *trained)  # type: ignore[no-any-return]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        loss: RowLoss,
        chunk: int,
        differentiate: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        losses, of_hidden = [], []
        of_parameters: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].detach().requires_grad_(differentiate)
            with torch.set_grad_enabled(differentiate):
                logits = head(part)
            values, gradient = loss(logits.detach(), rows)
            losses.append(values)
            if differentiate:
                first, *others = torch.autograd.grad(logits, (part, *parameters), gradient, allow_unused=True)
                of_hidden.append(first)
                for i, found in enumerate(others):
                    known = of_parameters[i]
                    of_parameters[i] = found if known is None or found is None else known.add_(found)
        ctx.of_hidden = torch.cat(of_hidden) if differentiate else None
        ctx.of_parameters = of_parameters
        rows_of_loss = torch.cat(losses)
        ctx.mark_non_differentiable(rows_of_loss)
        return rows_of_loss.sum(), rows_of_loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        if ctx.of_hidden is None:
            raise RuntimeError("the gradients of this loss were used up: it can be differentiated once")
        scale, parts = upstream[0], (ctx.of_hidden, *ctx.of_parameters)
        ctx.of_hidden = ctx.of_parameters = None
        first, *others = (None if part is None else part.mul_(scale.to(part.dtype)) for part in parts)
        return first, None, None, None, None, *others

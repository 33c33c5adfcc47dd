"""A loss over the logits of a language model head, with one chunk of positions in memory at a time.

The gradient is computed in the forward pass: from each chunk of logits follow the loss of its rows and the gradients of
the hidden states and of the head's parameters, then the logits are freed. The backward pass only scales the gradients.
So the head runs once. Recomputing the logits in the backward pass would run it twice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnswap.training.packing import IGNORED

BLOCK_ROWS = 16
"""Rows of logits that a loss works on at once on a CPU: with a vocabulary of 50k they fit into a core's cache."""


class RowLoss(Protocol):
    """A loss for each row of logits."""

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Returns the loss of each row, fp32 (rows,), and its gradient (rows, vocabulary) in the logits' dtype.

        Args:
            logits: Shape (rows, vocabulary).
            rows: The position of these rows among all rows.
        """


class CrossEntropy:
    """The negative log-likelihood of labels.

    Args:
        targets: Labels, shape (rows,); -100 for no label.
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
    """Applies a function of rows to a few rows at a time, which then stay in the cache of a CPU core."""
    if tensors[0].device.type != "cpu":
        return function(*tensors)
    parts = [function(*block) for block in zip(*(t.split(BLOCK_ROWS) for t in tensors), strict=True)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def head_loss(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    modules: list[nn.Module],
    loss: RowLoss,
    chunk: int,
    *,
    sharded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Computes the sum of a loss over rows of hidden states, with ``chunk`` rows of logits in memory at a time.

    Args:
        hidden: Hidden states, shape (rows, width).
        head: Computes the logits (rows, vocabulary) of some rows.
        modules: The modules whose parameters the head may use.
        loss: The loss of each row.
        chunk: Rows of logits in memory at a time.
        sharded: The head is sharded by FSDP, whose hooks need an ordinary backward pass. Then the head runs again in
            the backward pass (activation checkpointing).

    Returns:
        The sum, which can be differentiated once, and the loss of each row, shape (rows,).
    """
    if sharded:
        parts = [
            checkpoint(_rows_loss, hidden[i : i + chunk], head, loss, i, use_reentrant=False, preserve_rng_state=False)
            for i in range(0, len(hidden), chunk)
        ]
        sums, rows = zip(*parts, strict=True)
        return torch.stack(sums).sum(), torch.cat(rows)
    owners = [
        (module, name)
        for top in modules
        for module in top.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    trained = [module._parameters[name] for module, name in owners]
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained))
    return _HeadLoss.apply(hidden, head, loss, chunk, owners if differentiate else None, *trained)  # type: ignore[no-any-return]


def _rows_loss(part: Tensor, head: Callable[[Tensor], Tensor], loss: RowLoss, start: int) -> tuple[Tensor, Tensor]:
    return _RowsLoss.apply(head(part), loss, slice(start, start + len(part)))  # type: ignore[no-any-return]


class _RowsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: RowLoss, rows: slice) -> tuple[Tensor, Tensor]:
        values, ctx.gradient = loss(logits, rows)
        ctx.mark_non_differentiable(values)
        return values.sum(), values

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        return ctx.gradient.mul_(upstream[0].to(ctx.gradient.dtype)), None, None


@contextmanager
def _parameters_replaced(owners: list[tuple[nn.Module, str]], leaves: list[Tensor]) -> Iterator[None]:
    """Replaces parameters by other tensors.

    The gradients that are computed in the forward pass must not reach the parameters: DDP has hooks there, which expect
    one backward pass.
    """
    kept = [module._parameters[name] for module, name in owners]
    for (module, name), leaf in zip(owners, leaves, strict=True):
        module._parameters[name] = leaf  # type: ignore[assignment]
    try:
        yield
    finally:
        for (module, name), parameter in zip(owners, kept, strict=True):
            module._parameters[name] = parameter


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        loss: RowLoss,
        chunk: int,
        owners: list[tuple[nn.Module, str]] | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        losses, hidden_gradients = [], []
        gradients: list[Tensor | None] = [None] * len(parameters)
        differentiate = owners is not None
        leaves = [p.detach().requires_grad_() for p in parameters] if differentiate else []
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].detach().requires_grad_(differentiate)
            with torch.set_grad_enabled(differentiate), _parameters_replaced(owners or [], leaves):
                logits = head(part)
            values, gradient = loss(logits.detach(), rows)
            losses.append(values)
            if differentiate:
                of_part, *others = torch.autograd.grad(logits, (part, *leaves), gradient, allow_unused=True)
                hidden_gradients.append(of_part)
                for i, found in enumerate(others):
                    known = gradients[i]
                    gradients[i] = found if known is None or found is None else known.add_(found)
        ctx.hidden_gradient = torch.cat(hidden_gradients) if differentiate else None
        ctx.gradients = gradients
        rows_of_loss = torch.cat(losses)
        ctx.mark_non_differentiable(rows_of_loss)
        return rows_of_loss.sum(), rows_of_loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        if ctx.hidden_gradient is None:
            raise RuntimeError(
                "the chunked loss can be differentiated only once: compute it again for another backward"
            )
        scale, parts = upstream[0], (ctx.hidden_gradient, *ctx.gradients)
        ctx.hidden_gradient = ctx.gradients = None  # scaled in place below
        first, *others = (None if part is None else part.mul_(scale.to(part.dtype)) for part in parts)
        return first, None, None, None, None, *others

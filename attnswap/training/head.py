"""A loss over logits that exist for a chunk of positions at a time, with its gradient worked out on the way forward.

The head runs once: each chunk's logits are turned into the loss of their rows and at once into gradients of the hidden
states and of the head's own parameters, and forgotten. The backward pass only scales what is already there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnswap.training.packing import IGNORED

ROWS = 16
"""Rows of logits that losses work on at once: what a core's cache holds of a vocabulary of 50k."""


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
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    modules: list[nn.Module],
    loss: RowLoss,
    chunk: int,
    *,
    sharded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Computes the summed loss of rows of hidden states, ``chunk`` rows of logits at a time.

    Args:
        hidden: Hidden states, shape (rows, width).
        head: Turns some of them into logits (rows, vocabulary).
        modules: The modules whose parameters the head may use.
        loss: What a row costs.
        chunk: Rows whose logits exist at the same time.
        sharded: FSDP watches the head, and must see its one backward pass where it expects it: the head runs once more
            then, in place of gradients on the way forward.

    Returns:
        The sum, differentiable once, and the loss of each row, shape (rows,).
    """
    if sharded:
        parts = [
            checkpoint(_rows_loss, hidden[i : i + chunk], head, loss, i, use_reentrant=False, preserve_rng_state=False)
            for i in range(0, len(hidden), chunk)
        ]
        sums, rows = zip(*parts, strict=True)
        return torch.stack(sums).sum(), torch.cat(rows)
    places = [
        (module, name)
        for top in modules
        for module in top.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    trained = [module._parameters[name] for module, name in places]
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained))
    chosen = places if differentiate else None
    return _HeadLoss.apply(hidden, head, loss, chunk, chosen, *trained)  # type: ignore[no-any-return]


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
def _leaves(places: list[tuple[nn.Module, str]], leaves: list[Tensor]) -> Iterator[None]:
    """Puts other tensors in the place of parameters.

    The gradients taken on the way forward must not reach the parameters themselves: data-parallel engines wait there
    for the one backward pass.
    """
    kept = [module._parameters[name] for module, name in places]
    for (module, name), leaf in zip(places, leaves, strict=True):
        module._parameters[name] = leaf  # type: ignore[assignment]
    try:
        yield
    finally:
        for (module, name), parameter in zip(places, kept, strict=True):
            module._parameters[name] = parameter


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        loss: RowLoss,
        chunk: int,
        places: list[tuple[nn.Module, str]] | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        losses, of_hidden = [], []
        of_parameters: list[Tensor | None] = [None] * len(parameters)
        differentiate = places is not None
        leaves = [p.detach().requires_grad_() for p in parameters] if differentiate else []
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].detach().requires_grad_(differentiate)
            with torch.set_grad_enabled(differentiate), _leaves(places or [], leaves):
                logits = head(part)
            values, gradient = loss(logits.detach(), rows)
            losses.append(values)
            if differentiate:
                first, *others = torch.autograd.grad(logits, (part, *leaves), gradient, allow_unused=True)
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

"""How kernels of our own tell torch about their gradients, which are not differentiated again."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnswap.attention.modes import mode_of
from attnswap.attention.operands import apart
from attnswap.errors import DerivativeError

DIFFERENTIABLE = ("row_scale", "row_bias", "key_bias", "sinks", "params")
"""What the backward operators compute on demand, after the gradients of query, key and value."""


ONCE = 'this attention kernel is differentiated once, and backward; for {} use backend="dense" or "chunked"'


class _Last(torch.autograd.Function):
    """Passes gradients on, and raises where they are differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the first tensors, which are computed from the others."""
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Raises DerivativeError."""
        raise DerivativeError(ONCE.format("second derivatives"))


def refuse_modes(sources: Iterable[Tensor]) -> None:
    """Raises DerivativeError in a backward pass that is itself transformed or differentiated in forward mode."""
    mode = mode_of(sources)
    if mode is not None:
        raise DerivativeError(ONCE.format(f"{mode} of its backward pass"))


def refuse_second(found: Sequence[Tensor | None], sources: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Makes second derivatives raise, by way of whatever they are asked for.

    Without it autograd would take gradients for constants, and count only what else connects them to the input.

    Args:
        found: The gradients a backward pass computed.
        sources: What they were computed from, the output's gradient among it.

    Returns:
        The same gradients; connected to their sources where a graph of the backward pass is made.
    """
    tensors = [x for x in found if x is not None]
    if not tensors or not torch.is_grad_enabled():
        return tuple(found)
    marked = iter(_Last.apply(len(tensors), *tensors, *sources))
    return tuple(None if x is None else next(marked) for x in found)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what :func:`gradients` needs.

    The forward operators give output, shifts, inverse denominators and, where it is not empty, a tensor that the
    backward operator reads in place of the output.
    """
    out, shifts, inverses, mean = output
    ctx.save_for_backward(
        mean if mean.numel() else out, shifts, inverses, *(x for x in inputs if isinstance(x, Tensor))
    )
    ctx.places = [isinstance(x, Tensor) for x in inputs]
    ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)


def gradients(operator: Callable[..., Sequence[Tensor]], order: Sequence[str]) -> Callable[..., tuple[Any, ...]]:
    """Returns the backward formula of a forward operator.

    Args:
        operator: The backward operator: of the output's gradient, output, shifts, inverse denominators, a flag for
            each of :data:`DIFFERENTIABLE`, and the forward operator's arguments.
        order: Names of those arguments.
    """

    def backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        out, shifts, inverses, *tensors = ctx.saved_tensors
        left = iter(tensors)
        inputs = [next(left) if is_tensor else x for is_tensor, x in zip(ctx.places, ctx.plain, strict=True)]
        if grad is None:
            return (None,) * len(inputs)
        wanted = [int(ctx.needs_input_grad[order.index(name)]) for name in DIFFERENTIABLE]
        grad = apart(grad)
        refuse_modes((grad, *tensors))
        with torch.no_grad():
            found = operator(grad, out, shifts, inverses, wanted, *inputs)
        named: dict[str, Tensor] = dict(zip(("query", "key", "value", *DIFFERENTIABLE), found, strict=True))
        asked = [
            named[name].to(x.dtype) if needed and name in named else None
            for name, x, needed in zip(order, inputs, ctx.needs_input_grad, strict=True)
        ]
        return refuse_second(asked, (grad, *tensors))

    return backward


def empty_gradients(given: Mapping[str, Any], wanted: Sequence[int]) -> list[Tensor]:
    """Returns tensors of the shapes, dtypes and layout that a backward operator gives back, for tracing."""
    query, key, value = given["query"], given["key"], given["value"]
    batch, heads, queries, width = query.shape
    rows, keys = (batch, heads, queries), (batch, heads, key.shape[2])
    shapes = [rows, rows, keys, (heads,), (heads, given["params"].shape[1])]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    small = zip(shapes, wanted, strict=True)
    return [
        query.new_empty(batch, queries, heads, width).transpose(1, 2),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        *(query.new_empty(shape if want else (0,), dtype=dtype) for shape, want in small),
    ]

"""How the operators of our own kernels, native and Triton, tell torch about their gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnswap.attention.operands import apart

DIFFERENTIABLE = ("row_scale", "row_bias", "key_bias", "sinks", "params")
"""What the backward operators compute on demand, after the gradients of query, key and value."""


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
        found = operator(grad, out, shifts, inverses, wanted, *inputs)
        named: dict[str, Tensor] = dict(zip(("query", "key", "value", *DIFFERENTIABLE), found, strict=True))
        return tuple(
            named[name].to(x.dtype) if needed and name in named else None
            for name, x, needed in zip(order, inputs, ctx.needs_input_grad, strict=True)
        )

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

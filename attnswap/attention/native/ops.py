"""The engine's two operators as torch sees them: their shapes, and the gradient of one by the other."""

from typing import Any

import torch
from torch import Tensor

from attnswap.attention.native import build

DIFFERENTIABLE = ("row_scale", "row_bias", "key_bias", "sinks", "params")
ORDER = (
    *("path", "query", "key", "value", "first", "last", "keep", "mask", "bias", "row_scale", "row_bias", "key_bias"),
    *("sinks", "params", "count", "scaling", "softcap", "tolerance", "training"),
)
"""The operators' arguments, described in ``engine.cpp``."""


def forward(*arguments: Any) -> Tensor:
    """Computes the output; differentiable.

    Args:
        *arguments: In the order of :data:`ORDER`.

    Returns:
        Shape (batch, heads, queries, value_dim).
    """
    _register()
    training = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
    return torch.ops.attnswap_native.forward(*arguments, training)[0]


_registered = False


def _register() -> None:
    """Adds shapes and gradients to the operators, once the engine is loaded."""
    global _registered
    if _registered:
        return
    torch.library.register_fake("attnswap_native::forward", _fake_forward)
    torch.library.register_fake("attnswap_native::backward", _fake_backward)
    torch.library.register_autograd("attnswap_native::forward", _backward, setup_context=_setup)
    _registered = True


def _fake_forward(path: str, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, heads, queries, _ = query.shape
    shape = (batch, queries, heads, value.shape[3])
    mean = query.new_empty(shape).transpose(1, 2) if rest[-1] and build.is_row(path) else query.new_empty(0, 0, 0, 0)
    rows = (batch, heads, queries)
    return query.new_empty(shape).transpose(1, 2), query.new_empty(rows), query.new_empty(rows), mean


def _fake_backward(
    grad: Tensor, out: Tensor, shifts: Tensor, inverses: Tensor, wanted: list[int], path: str, *rest: Any
) -> list[Tensor]:
    given = dict(zip(ORDER[1:], rest, strict=True))
    query, key, value = given["query"], given["key"], given["value"]
    batch, heads, queries, width = query.shape
    rows, keys = (batch, heads, queries), (batch, heads, key.shape[2])
    shapes = [rows, rows, keys, (heads,), (heads, given["params"].shape[1])]
    return [
        query.new_empty(batch, queries, heads, width).transpose(1, 2),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        *(query.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, shifts, inverses, mean = output
    ctx.save_for_backward(
        mean if mean.numel() else out, shifts, inverses, *(x for x in inputs if isinstance(x, Tensor))
    )
    ctx.places = [isinstance(x, Tensor) for x in inputs]
    ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    out, shifts, inverses, *tensors = ctx.saved_tensors
    left = iter(tensors)
    inputs = [next(left) if is_tensor else x for is_tensor, x in zip(ctx.places, ctx.plain, strict=True)]
    if grad is None:
        return (None,) * len(inputs)
    wanted = [int(ctx.needs_input_grad[ORDER.index(name)]) for name in DIFFERENTIABLE]
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    found = torch.ops.attnswap_native.backward(grad, out, shifts, inverses, wanted, *inputs)
    gradients: dict[str, Tensor] = dict(zip(("query", "key", "value", *DIFFERENTIABLE), found, strict=True))
    return tuple(
        gradients[name].to(x.dtype) if needed and name in gradients else None
        for name, x, needed in zip(ORDER, inputs, ctx.needs_input_grad, strict=True)
    )

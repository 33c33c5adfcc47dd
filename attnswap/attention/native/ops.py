"""The engine's two operators as torch sees them: their shapes, and the gradient of one by the other."""

from typing import Any

import torch
from torch import Tensor

from attnswap.attention.autograd import empty_gradients, gradients, save_inputs
from attnswap.attention.lazy import constant, once
from attnswap.attention.native import build

ORDER = (
    *("path", "query", "key", "value", "kv_heads", "first", "last", "keep", "mask", "bias", "row_scale", "row_bias"),
    *("key_bias", "sinks", "params", "count", "scaling", "softcap", "tolerance", "training"),
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
    if training or torch.compiler.is_compiling():
        return torch.ops.attnswap_native.forward(*arguments, training)[0]
    with torch._C._AutoDispatchBelowAutograd():  # its Python layer takes as long as a short call
        return torch.ops.attnswap_native.forward(*arguments, training)[0]


@constant
@once
def _register() -> None:
    """Adds shapes and gradients to the operators, once the engine is loaded."""
    torch.library.register_fake("attnswap_native::forward", _fake_forward)
    torch.library.register_fake("attnswap_native::backward", _fake_backward)
    backward = gradients(torch.ops.attnswap_native.backward, ORDER)
    torch.library.register_autograd("attnswap_native::forward", backward, setup_context=save_inputs)


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    given = dict(zip(ORDER, arguments, strict=True))
    query, dtype = given["query"], given["params"].dtype
    batch, heads, queries, _ = query.shape
    shape = (batch, queries, heads, given["value"].shape[3])
    kept = given["training"] and (build.is_row(given["path"]) or query.dtype != dtype)
    mean = query.new_empty(shape if kept else (0, 0, 0, 0), dtype=dtype)
    rows = query.new_empty((batch, heads, queries), dtype=dtype)
    return query.new_empty(shape).transpose(1, 2), rows, torch.empty_like(rows), mean.transpose(1, 2) if kept else mean


def _fake_backward(
    grad: Tensor, out: Tensor, shifts: Tensor, inverses: Tensor, wanted: list[int], path: str, *rest: Any
) -> list[Tensor]:
    return empty_gradients(dict(zip(ORDER[1:], rest, strict=True)), wanted)

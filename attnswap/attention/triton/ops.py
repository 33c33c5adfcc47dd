"""The operators as torch sees them: what they compute, their shapes, and the gradient of one by the other."""

from typing import Any

import torch
from torch import Tensor

from attnswap.attention.autograd import DIFFERENTIABLE, empty_gradients, gradients, save_inputs
from attnswap.attention.triton.saved import has_mean

ORDER = (
    *("program", "shifted", "threshold", "query", "key", "value", "first", "last", "keep", "mask", "bias", "row_scale"),
    *("row_bias", "key_bias", "sinks", "params", "count", "scaling", "softcap", "tolerance", "training"),
)
"""The operators' arguments: printed maths, whether it takes a shift, and whether that is a threshold; the tensors;
(batch or 1, queries) spans of keys, int32; what hides keys between, (batch, keys) and (batch or 1, heads or 1, queries,
keys); an additive mask; a_i in fp32 and b_i in fp64, (batch, heads, queries); c_j in fp64, (batch, heads, keys); sinks
(heads,); the numbers of each head, (heads, numbers); n as (batch or 1, heads or 1, queries); the scaling; the soft cap,
0 where there is none; the part of a row that decayed tiles may be left out for, 0 for none; whether a gradient will be
asked for."""


@torch.library.custom_op("attnswap_triton::forward", mutates_args=())
def forward(
    program: str,
    shifted: bool,
    threshold: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    keep: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    row_bias: Tensor | None,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    params: Tensor,
    count: Tensor,
    scaling: float,
    softcap: float,
    tolerance: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes output, shifts, inverse denominators and what the backward reads for the output; differentiable.

    Returns:
        Output (batch, heads, queries, value_dim); shift and 1 / Z of each row, fp32 (batch, heads, queries); an fp32
        tensor of the output's shape, empty where the backward reads the output itself.
    """
    from attnswap.attention.triton import launch

    given = locals()
    kernel, filled = launch.forward({name: given[name] for name in ORDER})
    kernel.run()
    return filled


@torch.library.custom_op("attnswap_triton::backward", mutates_args=())
def backward(
    grad: Tensor,
    out: Tensor,
    shifts: Tensor,
    inverses: Tensor,
    wanted: list[int],
    program: str,
    shifted: bool,
    threshold: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    keep: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    row_bias: Tensor | None,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    params: Tensor,
    count: Tensor,
    scaling: float,
    softcap: float,
    tolerance: float,
    training: bool,
) -> list[Tensor]:
    """Computes the gradients of query, key, value and everything :data:`DIFFERENTIABLE` that is wanted."""
    from attnswap.attention.triton import launch

    given = locals()
    call = {name: given[name] for name in ORDER}
    asked = {name: bool(want) for name, want in zip(DIFFERENTIABLE, wanted, strict=True)}
    by_queries, by_keys, found = launch.backward(call, grad, (out, shifts, inverses), asked)
    by_queries.run()
    by_keys.run()
    if found["sinks"] is not None:
        found["sinks"] = found["sinks"].sum((0, 2))
    if found["params"] is not None:
        found["params"] = found["params"].sum((0, 2))[:, : params.shape[1]]
    none = query.new_empty(0, dtype=torch.float32)
    return [none.clone() if x is None else x.contiguous() if x.ndim < 4 else x for x in found.values()]


@forward.register_fake
def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = dict(zip(ORDER, arguments, strict=True))
    query = call["query"]
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, call["value"].shape[3]).transpose(1, 2)
    rows = query.new_empty((batch, heads, queries), dtype=torch.float32)
    none = query.new_empty((0, 0, 0, 0), dtype=torch.float32)
    mean = torch.empty_like(out, dtype=torch.float32) if has_mean(call) else none
    return out, rows, torch.empty_like(rows), mean


@backward.register_fake
def _fake_backward(
    grad: Tensor, out: Tensor, shifts: Tensor, inverses: Tensor, wanted: list[int], *arguments: Any
) -> list[Tensor]:
    return empty_gradients(dict(zip(ORDER, arguments, strict=True)), wanted)


forward.register_autograd(gradients(backward, ORDER), setup_context=save_inputs)

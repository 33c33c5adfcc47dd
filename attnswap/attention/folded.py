"""Swaps that are softmax over a scaled query, a biased key or a scaled value, on the stock kernel."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnswap.attention.chunked import by_blocks
from attnswap.attention.dense import Block, bias
from attnswap.attention.modes import mode_of, transformed
from attnswap.attention.problem import Problem

_LONG = 512  # queries from which it is worth a loop over heads


def refusal(problem: Problem) -> str | None:
    """Says why the stock kernel cannot compute this call, or None where it can."""
    if not problem.swap.softmax_weighted:
        return f'the weights of "{problem.swap.name}" are not softmax\'s'
    if problem.softcap is not None:
        return "the model caps its scores, which a scale of the query does not go around"
    if problem.sinks is not None and not _on_own_kernel(problem):
        return "the model has sinks, and the stock kernel does not"
    mode = mode_of(problem.tensors())
    return None if mode is None else f"the stock kernel takes no part in {mode}"


def is_stock(problem: Problem) -> bool:
    """Whether a call is what the stock kernel computed before: the same mask, and no bias of the swap's own."""
    return refusal(problem) is None and problem.terms.key_bias is None and not _learns_scale_in_16_bits(problem)


def _learns_scale_in_16_bits(problem: Problem) -> bool:
    """Whether the gradient of a scale is wanted that the stock kernel for the CPU gives too roughly.

    It rounds the scaled tensor, the weights and ``dO . O`` to 16 bits; summed over a row's scores that is up to a tenth
    of the scale's gradient. Kernels of our own hold all of it in fp32, and take less time there.
    """
    if problem.query.dtype == problem.dtype or problem.query.device.type != "cpu":
        return False
    scales = (problem.terms.query_scale, problem.terms.value_scale)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in scales)


def _on_own_kernel(problem: Problem) -> bool:
    """Whether the model's own kernel serves: it adds no bias of the swap's, and without sinks that of a row cancels."""
    if problem.stock is None or problem.terms.key_bias is not None:
        return False
    return problem.sinks is None or problem.terms.query_bias is None


class _ByHead(torch.autograd.Function):
    """Scales a 16-bit query in fp32 one head at a time: fp32 copies of all heads leave the cache and take memory."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, factor: Tensor) -> Tensor:
        """Multiplies query (batch, heads, queries, head_dim) by factor (batch, heads, queries, 1)."""
        ctx.save_for_backward(query, factor)
        out = torch.empty_like(query)
        for head in range(query.shape[1]):
            out[:, head] = query[:, head].to(factor.dtype) * factor[:, head]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Returns the gradients of query and factor."""
        query, factor = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled() or transformed():  # which see no tensor that is filled part by part
            grad = grad.to(factor.dtype)
            return (grad * factor).to(query.dtype), (grad * query).sum(-1, keepdim=True)
        of_query = torch.empty_like(query) if wanted[0] else None
        of_factor = torch.empty_like(factor) if wanted[1] else None
        for head in range(query.shape[1]):
            one = grad[:, head].to(factor.dtype)
            if of_query is not None:
                of_query[:, head] = one * factor[:, head]
            if of_factor is not None:
                of_factor[:, head] = (one * query[:, head]).sum(-1, keepdim=True)
        return of_query, of_factor


def _scaled(query: Tensor, factor: Tensor) -> Tensor:
    """Multiplies in the dtype of the factor and rounds to that of the query."""
    if query.dtype == factor.dtype or query.shape[2] < _LONG or torch.compiler.is_compiling():
        return (query.to(factor.dtype) * factor).to(query.dtype)
    return _ByHead.apply(query, factor.expand(*query.shape[:3], 1))


def attend(problem: Problem) -> Tensor:
    """Computes a softmax-weighted swap with the model's own kernel, or ``scaled_dot_product_attention``.

    A key bias goes in as an additive mask, one chunk of rows at a time, because the difference of two large
    cumulative sums must be formed in fp64; folding it into the query and key loses 1e-3 at 8k tokens.

    Returns:
        Output (batch, heads, queries, value_dim) in the dtype of the values.
    """
    problem = problem.regular()
    terms, visibility = problem.terms, problem.visibility
    query, value = problem.query, problem.scaled_value()
    if terms.query_scale is not None:
        query = _scaled(query, terms.query_scale.to(problem.dtype)[..., None])
    if problem.stock is not None and _on_own_kernel(problem):
        return problem.stock(query, problem.key, value)
    stock = functools.partial(
        scaled_dot_product_attention,
        dropout_p=problem.dropout,
        scale=problem.scaling,
        enable_gqa=problem.groups > 1,
    )
    unbiased = terms.key_bias is None and visibility.bias is None
    if unbiased and visibility.plain_causal:
        return stock(query, problem.key, value, is_causal=True)
    if unbiased and visibility.plain_full:
        return stock(query, problem.key, value)

    def rows(block: Block, *_: None) -> Tensor:
        keys = slice(block.k0, block.k1)
        visible = mask = visibility.mask(block.start, block.stop, block.k0, block.k1)
        if not unbiased:
            mask = torch.where(visible, bias(problem, terms, block), -torch.inf)
        mask = mask.expand(query.shape[0], -1, -1, -1)
        out = stock(query[:, :, block.start : block.stop], problem.key[:, :, keys], value[:, :, keys], attn_mask=mask)
        # The stock kernel leaves rows without a visible key undefined.
        return torch.where(visible.any(-1, keepdim=True), out, 0.0)

    return by_blocks(problem, rows)

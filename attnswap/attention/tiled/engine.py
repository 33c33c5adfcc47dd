"""Attention over tiles in plain torch, forward and backward, in memory linear in the length."""

import functools
from typing import Any

import torch
from torch import Tensor

from attnswap.attention.autograd import DIFFERENTIABLE, refuse_modes, refuse_second
from attnswap.attention.codegen import parameters, trace
from attnswap.attention.tiled.scores import SMALLEST, Inputs, Setup, Tiles
from attnswap.attention.tiled.tape import Tape
from attnswap.swaps.base import Numbers, Swap

SLOPES = ("weight", "weight_slope", "norm_slope")


@functools.cache
def tape(swap: Swap, whole: bool, *names: str) -> Tape:
    """Returns the operations that compute some trees of a swap."""
    trees = trace(swap, whole)
    return Tape({name: trees[name] for name in names})


def symbols(swap: Swap, params: Tensor) -> dict[str, Tensor]:
    """Returns the per-head numbers as the maths takes them, (heads, 1, 1)."""
    return {name: params[:, i, None, None] for i, name in enumerate(parameters(swap))}


def forward(setup: Setup, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a call.

    Returns:
        Output (batch, heads, queries, value_dim), shift and 1 / Z (batch, heads, queries, 1), in the computing dtype.
    """
    swap, steps = setup.swap, tape(setup.swap, setup.whole, "weight", "norm")
    call = Tiles(setup, inputs, steps.buffers)
    numbers = symbols(swap, inputs.params)
    out = inputs.params.new_empty(call.batch, call.queries, call.heads, call.wide).transpose(1, 2)
    shifts, inverses = call.per_row(0.0, call.queries), call.per_row(0.0, call.queries)
    for i0, i1, tiles in call.blocks():
        query = call.rows(inputs.query, i0, i1) * setup.scaling
        shift, total = _first_shift(call, numbers, i1 - i0), call.per_row(0.0, i1 - i0)
        acc = query.new_zeros(*query.shape[:2], call.wide)
        by_head = acc.view(call.batch, call.heads, i1 - i0, call.wide)
        for tile in tiles:
            s = call.content(query, tile, 0)
            hidden = call.finish(s, tile)
            if swap.shifted:
                highest = (s if hidden is None else s.masked_fill_(hidden, -torch.inf)).amax(-1, keepdim=True)
                higher = torch.maximum(shift, highest)
                factor = torch.where(higher > shift, torch.exp(shift - higher), 1.0)
                by_head.mul_(factor)
                total, shift = total * factor, higher
            found = _run(call, steps, s, shift, numbers)
            if "norm" not in steps.zeros:
                total = total + _hide(found["norm"], s, hidden).sum(-1, keepdim=True)
            weight = _hide(found["weight"], s, hidden).view(*query.shape[:2], -1)
            torch.baddbmm(acc, weight, call.keyed(inputs.value, tile), out=acc)
        shift = _finite(shift)
        total = total + _rest(setup, inputs.sinks, inputs.params, shift, (i0, i1))
        inverse = torch.where(total > 0, 1 / total, total * 0)  # NaN stays NaN
        out[:, :, i0:i1] = by_head * inverse
        shifts[:, :, i0:i1], inverses[:, :, i0:i1] = shift, inverse
    return out, shifts, inverses


def _first_shift(call: Tiles, numbers: dict[str, Tensor], rows: int) -> Tensor:
    """Returns the shift before any key is seen."""
    swap, sinks = call.setup.swap, call.inputs.sinks
    if not swap.shifted:
        return call.per_row(0.0, rows)
    shift = call.per_row(-torch.inf, rows)
    floor = swap.shift_floor(Numbers(**numbers))
    for least in (floor, None if sinks is None else sinks[:, None, None]):
        if least is not None:
            shift = torch.maximum(shift, least if isinstance(least, Tensor) else shift.new_tensor(least))
    return shift


def _finite(shift: Tensor) -> Tensor:
    return torch.where(shift.isneginf(), 0.0, shift)  # a row that has seen no key yet


def _rest(setup: Setup, sinks: Tensor | None, params: Tensor, shift: Tensor, rows: tuple[int, int]) -> Any:
    """Returns what the denominator of some rows holds beside their keys."""
    numbers = Numbers(**symbols(setup.swap, params))
    n = setup.visibility.n[..., slice(*rows), None].to(shift.dtype)
    rest = setup.swap.null(shift, n, numbers)
    return rest if sinks is None else rest + setup.swap.norm(sinks[:, None, None], shift, numbers)


def _run(call: Tiles, steps: Tape, s: Tensor, shift: Tensor, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Evaluates a swap on a tile; what it gives for hidden keys means nothing."""
    shift = _finite(shift)
    if call.inputs.key_bias is not None and s.dtype == torch.float32:
        torch.maximum(s, shift + SMALLEST, out=s)
    return steps.run({"s": s, "shift": shift, **numbers}, call.memory)


def _hide(x: Tensor, s: Tensor, hidden: Tensor | None) -> Tensor:
    """Returns a result as a tile with nothing at hidden keys; a formula need not read the score."""
    x = x if x.shape == s.shape else x.expand_as(s).contiguous()
    return x if hidden is None else x.masked_fill_(hidden, 0.0)


class Attend(torch.autograd.Function):
    """The call as autograd sees it: of the setup, and of the fields of :class:`Inputs` in order."""

    @staticmethod
    def forward(ctx: Any, setup: Setup, *tensors: Any) -> Tensor:
        """Computes the output in the computing dtype."""
        out, shifts, inverses = forward(setup, Inputs(*tensors))
        ctx.setup = setup
        ctx.save_for_backward(out, shifts, inverses, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients of all that wants one."""
        out, shifts, inverses, *tensors = ctx.saved_tensors
        names = ("query", "key", "value", *DIFFERENTIABLE)
        wanted = {name for name, needed in zip(names, ctx.needs_input_grad[1:], strict=True) if needed}
        sources = (grad, *(x for x in tensors if x is not None))
        refuse_modes(sources)
        with torch.no_grad():
            found = backward(ctx.setup, Inputs(*tensors), (out, shifts, inverses), grad, wanted)
        given = dict(zip(names, tensors, strict=True))
        asked = [found[n].to(given[n].dtype) if n in wanted else None for n in names]
        return (None, *refuse_second(asked, sources))


def backward(
    setup: Setup, inputs: Inputs, results: tuple[Tensor, Tensor, Tensor], grad: Tensor, wanted: set[str]
) -> dict[str, Tensor]:
    """Computes gradients from the results of :func:`forward`: of query, key and value, and of others as wanted."""
    swap, (out, shifts, inverses) = setup.swap, results
    steps = tape(swap, setup.whole, *SLOPES)
    keeps = setup.softcap is not None or "row_scale" in wanted
    call = Tiles(setup, inputs, steps.buffers + 2)
    dots_at, caps_at = steps.buffers, steps.buffers + 1
    numbers, kv = symbols(swap, inputs.params), (call.batch * call.kv_heads, call.keys)
    found = {"query": torch.empty_like(out[..., :1].expand(*out.shape[:3], inputs.query.shape[3]))}
    found |= {"key": grad.new_zeros(*kv, inputs.key.shape[3]), "value": grad.new_zeros(*kv, call.wide)}
    rows_of, keys_of = (call.batch, call.heads, call.queries), (call.batch, call.heads, call.keys)
    shapes = {"row_scale": rows_of, "row_bias": rows_of, "key_bias": keys_of, "params": inputs.params.shape}
    found |= {name: grad.new_zeros(shape) for name, shape in shapes.items() if name in wanted}
    deltas = (grad * out).sum(-1, keepdim=True) * inverses
    for i0, i1, tiles in call.blocks():
        rows = slice(i0, i1)
        query, shift, delta = call.rows(inputs.query, i0, i1) * setup.scaling, shifts[:, :, rows], deltas[:, :, rows]
        upstream = call.rows(grad[:, :, rows] * inverses[:, :, rows], 0, i1 - i0)
        dq = torch.zeros_like(query)
        for tile in tiles:
            keys = slice(tile.k0, tile.k1)
            s = call.content(query, tile, 0)
            caps = call.memory[caps_at][: s.numel()].view(s.shape).copy_(s) if keeps else None
            hidden = call.finish(s, tile)
            dots = call.product(upstream, call.keyed(inputs.value, tile), tile, dots_at)
            if "params" in wanted:
                found["params"] += _by_params(call, s, shift, hidden, dots, delta)
            parts = _run(call, steps, s, shift, numbers)
            _slope(steps, parts, dots, delta)
            _hide(dots, dots, hidden)
            _sum_terms(found, dots, caps, rows, keys)
            if inputs.row_scale is not None:
                dots *= inputs.row_scale[..., rows, None]
            if setup.softcap is not None and caps is not None:
                dots *= caps.div_(setup.softcap).square_().neg_().add_(1)
            ds, weight = (x.view(*query.shape[:2], -1) for x in (dots, _hide(parts["weight"], dots, hidden)))
            dk, dv = found["key"][:, keys], found["value"][:, keys]
            torch.baddbmm(dk, ds.transpose(1, 2), query, out=dk)
            torch.baddbmm(dv, weight.transpose(1, 2), upstream, out=dv)
            torch.baddbmm(dq, ds, call.keyed(inputs.key, tile), out=dq)
        found["query"][:, :, rows] = dq.view(call.batch, call.heads, i1 - i0, -1) * setup.scaling
    for name in ("key", "value"):
        found[name] = found[name].view(call.batch, call.kv_heads, call.keys, -1)
    return _add_rest(found, call, shifts, deltas, wanted)


def _slope(steps: Tape, parts: dict[str, Tensor], dots: Tensor, delta: Tensor) -> None:
    """Makes ``w' (dO.v) - d' (dO.O)`` of the dot products, in place."""
    if parts["weight_slope"] is parts["norm_slope"]:
        dots.sub_(delta).mul_(parts["weight_slope"])
        return
    dots.mul_(parts["weight_slope"])
    if "norm_slope" not in steps.zeros:
        dots.addcmul_(parts["norm_slope"], delta, value=-1)


def _sum_terms(found: dict[str, Tensor], ds: Tensor, caps: Tensor | None, rows: slice, keys: slice) -> None:
    """Adds the gradients of what the score is made of beside the product."""
    if "row_bias" in found:
        found["row_bias"][:, :, rows] += ds.sum(-1)
    if "key_bias" in found:
        found["key_bias"][:, :, keys] += ds.sum(2)
    if "row_scale" in found and caps is not None:
        found["row_scale"][:, :, rows] += (ds * caps).sum(-1)


def _by_params(call: Tiles, s: Tensor, shift: Tensor, hidden: Tensor | None, dots: Tensor, delta: Tensor) -> Tensor:
    """Returns the gradient of the per-head numbers by way of a tile's weights, (heads, numbers)."""
    swap, sums = call.setup.swap, []
    for name in parameters(swap):
        steps = tape(swap, call.setup.whole, f"weight_by_{name}", f"norm_by_{name}")
        spare = Tiles(call.setup, call.inputs, steps.buffers)
        copy = spare.memory[0][: s.numel()].view(s.shape).copy_(s)
        weight, norm = _run(spare, steps, copy, shift, symbols(swap, call.inputs.params)).values()
        sums.append(_hide(weight * dots - norm * delta, s, hidden).sum((0, 2, 3)))
    return torch.stack(sums, 1)


def _add_rest(
    found: dict[str, Tensor], call: Tiles, shifts: Tensor, deltas: Tensor, wanted: set[str]
) -> dict[str, Tensor]:
    """Adds the gradients by way of the null and the sinks, which few rows of numbers carry: autograd forms them."""
    leaves = {n: getattr(call.inputs, n).detach().requires_grad_() for n in ("sinks", "params") if n in wanted}
    if not leaves:
        return found
    with torch.enable_grad():
        tensors = {"sinks": call.inputs.sinks, "params": call.inputs.params, **leaves}
        rest = _rest(call.setup, tensors["sinks"], tensors["params"], shifts, (0, call.queries))
        total = (-deltas * rest).sum() + sum(0 * leaf.sum() for leaf in leaves.values())
    for name, slope in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        found[name] = found[name] + slope if name in found else slope
    return found

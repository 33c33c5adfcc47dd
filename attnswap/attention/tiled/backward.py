"""The backward pass over tiles in plain torch, and the call as autograd sees it."""

from typing import Any

import torch
from torch import Tensor

from attnswap.attention.autograd import DIFFERENTIABLE
from attnswap.attention.codegen import parameters
from attnswap.attention.tiled.formula import centred, hide, less, rest_of, symbols, tape
from attnswap.attention.tiled.forward import forward
from attnswap.attention.tiled.scores import Inputs, Setup, Tile, Tiles
from attnswap.attention.tiled.tape import Tape

SLOPES = ("weight", "weight_slope", "norm_slope")


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
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients of all that wants one."""
        out, shifts, inverses, *tensors = ctx.saved_tensors
        names = ("query", "key", "value", *DIFFERENTIABLE)
        wanted = {name for name, needed in zip(names, ctx.needs_input_grad[1:], strict=True) if needed}
        found = backward(ctx.setup, Inputs(*tensors), (out, shifts, inverses), grad, wanted)
        given = dict(zip(names, tensors, strict=True))
        return (None, *(found[n].to(given[n].dtype) if n in wanted else None for n in names))


def backward(
    setup: Setup, inputs: Inputs, results: tuple[Tensor, Tensor, Tensor], grad: Tensor, wanted: set[str]
) -> dict[str, Tensor]:
    """Computes gradients from the results of :func:`forward`: of query, key and value, and of others as wanted."""
    out, shifts, inverses = results
    call = Backward(setup, inputs, wanted)
    deltas = (grad * out).sum(-1, keepdim=True) * inverses
    for i0, i1, tiles in call.blocks():
        rows = slice(i0, i1)
        call.block(i0, i1, tiles, shifts[:, :, rows], deltas[:, :, rows], grad[:, :, rows] * inverses[:, :, rows])
    return _add_rest(call.gradients(), call, shifts, deltas, wanted)


class Backward(Tiles):
    """A backward pass.

    The columns behind queries and keys (see :class:`Tiles`) give the gradients of the biases in the same products.
    """

    def __init__(self, setup: Setup, inputs: Inputs, wanted: set[str]) -> None:
        self.steps = tape(setup.swap, setup.whole, *SLOPES)
        super().__init__(setup, inputs, self.steps.buffers + 2)
        self.dots_at, self.content_at = self.steps.buffers, self.steps.buffers + 1
        self.numbers, self.centred = symbols(setup.swap, inputs.params), centred(setup.swap, setup.whole)
        new, kv = inputs.params.new_zeros, (self.batch * self.kv_heads, self.keys)
        self.key_grad, self.value_grad = new(*kv, self.depth + self.added), new(*kv, self.wide)
        rows, keys = (self.batch, self.heads, self.queries), (self.batch, self.heads, self.keys)
        shapes = {"row_scale": rows, "row_bias": rows, "key_bias": keys, "params": inputs.params.shape}
        self.found = {name: new(shape) for name, shape in shapes.items() if name in wanted}
        self.found["query"] = new(self.batch, self.queries, self.heads, self.depth).transpose(1, 2)

    def block(self, i0: int, i1: int, tiles: list[Tile], shift: Tensor, delta: Tensor, upstream: Tensor) -> None:
        """Adds what some rows give; ``upstream`` is the gradient of their unnormalized output."""
        query, upstream = self.query(i0, i1), self.rows(upstream)
        dq = torch.zeros_like(query)
        for tile in tiles:
            keys, caps, hidden = slice(tile.k0, tile.k1), None, None
            if self.folds and self.centred and not tile.partial:
                s = self.shifted(query, tile, shift)
            else:
                s = self.content(query, tile, 0)
                if self.setup.softcap is not None:
                    caps = self.memory[self.content_at][: s.numel()].view(s.shape).copy_(s)
                hidden = self.finish(s, tile)
                s = less(self, s, shift)
            dots = self.product(upstream, self.value, tile, self.dots_at)
            if "params" in self.found:
                self.found["params"] += self._by_params(s, shift, hidden, dots, delta)
            parts = self.steps.run({"s": s, "shift": shift, **self.numbers}, self.memory)
            _slope(self.steps, parts, dots, delta)
            hide(dots, dots, hidden)
            if caps is not None:
                self._through_cap(dots, caps, slice(i0, i1), keys)
            ds, weight = (x.view(*query.shape[:2], -1) for x in (dots, hide(parts["weight"], dots, hidden)))
            dk, dv = self.key_grad[:, keys], self.value_grad[:, keys]
            torch.baddbmm(dk, ds.transpose(1, 2), query, out=dk)
            torch.baddbmm(dv, weight.transpose(1, 2), upstream, out=dv)
            torch.baddbmm(dq, ds, self.key[:, keys], out=dq)
        self._finish_rows(dq.view(self.batch, self.heads, i1 - i0, -1), slice(i0, i1))

    def _through_cap(self, ds: Tensor, caps: Tensor, rows: slice, keys: slice) -> None:
        """Takes a tile's slopes from its scores to its capped products, and the gradients of what lies between."""
        assert self.setup.softcap is not None
        if "row_bias" in self.found:
            self.found["row_bias"][:, :, rows] += ds.sum(-1)
        if "key_bias" in self.found:
            self.found["key_bias"][:, :, keys] += ds.sum(2)
        if "row_scale" in self.found:
            self.found["row_scale"][:, :, rows] += (ds * caps).sum(-1)
        if self.inputs.row_scale is not None:
            ds *= self.inputs.row_scale[..., rows, None]
        ds *= caps.div_(self.setup.softcap).square_().neg_().add_(1)

    def _finish_rows(self, dq: Tensor, rows: slice) -> None:
        """Takes the gradients of some rows from their products with the keys."""
        by_query = dq[..., : self.depth] * self.setup.scaling
        if self.setup.softcap is None:
            if "row_bias" in self.found:
                self.found["row_bias"][:, :, rows] = dq[..., self.depth]
            if "row_scale" in self.found:
                self.found["row_scale"][:, :, rows] = (by_query * self.inputs.query[:, :, rows]).sum(-1)
            if self.inputs.row_scale is not None:
                by_query *= self.inputs.row_scale[..., rows, None]
        self.found["query"][:, :, rows] = by_query

    def _by_params(self, s: Tensor, shift: Tensor, hidden: Tensor | None, dots: Tensor, delta: Tensor) -> Tensor:
        """Returns the gradient of the per-head numbers by way of a tile's weights, (heads, numbers)."""
        swap, sums = self.setup.swap, []
        for name in parameters(swap):
            steps = tape(swap, self.setup.whole, f"weight_by_{name}", f"norm_by_{name}")
            memory = [s.clone(), *(torch.empty_like(s) for _ in range(steps.buffers - 1))]
            found = steps.run({"s": memory[0], "shift": shift, **self.numbers}, [x.flatten() for x in memory])
            weight, norm = found.values()
            sums.append(hide(weight * dots - norm * delta, s, hidden).sum((0, 2, 3)))
        return torch.stack(sums, 1)

    def gradients(self) -> dict[str, Tensor]:
        """Returns what all blocks gave."""
        by_key = self.key_grad.view(self.batch, self.kv_heads, self.keys, -1)
        if "key_bias" in self.found and self.setup.softcap is None:
            columns = by_key[..., self.depth + 1 :].transpose(2, 3)
            self.found["key_bias"] = columns.reshape(self.batch, self.heads, self.keys)
        value = self.value_grad.view(self.batch, self.kv_heads, self.keys, -1)
        return {**self.found, "key": by_key[..., : self.depth], "value": value}


def _slope(steps: Tape, parts: dict[str, Tensor], dots: Tensor, delta: Tensor) -> None:
    """Makes ``w' (dO.v) - d' (dO.O)`` of the dot products, in place."""
    if parts["weight_slope"] is parts["norm_slope"]:
        dots.sub_(delta).mul_(parts["weight_slope"])
        return
    dots.mul_(parts["weight_slope"])
    if "norm_slope" not in steps.zeros:
        dots.addcmul_(parts["norm_slope"], delta, value=-1)


def _add_rest(
    found: dict[str, Tensor], call: Tiles, shifts: Tensor, deltas: Tensor, wanted: set[str]
) -> dict[str, Tensor]:
    """Adds the gradients by way of the null and the sinks, which few rows of numbers carry: autograd forms them."""
    leaves = {n: getattr(call.inputs, n).detach().requires_grad_() for n in ("sinks", "params") if n in wanted}
    if not leaves:
        return found
    with torch.enable_grad():
        tensors = {"sinks": call.inputs.sinks, "params": call.inputs.params, **leaves}
        rest = rest_of(call.setup, tensors["sinks"], tensors["params"], shifts, (0, call.queries))
        total = (-deltas * rest).sum() + sum(0 * leaf.sum() for leaf in leaves.values())
    for name, slope in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        found[name] = found[name] + slope if name in found else slope
    return found

"""The forward pass over tiles in plain torch, in memory linear in the length."""

import torch
from torch import Tensor

from attnswap.attention.tiled.formula import centred, finite, hide, less, rest_of, symbols, tape
from attnswap.attention.tiled.scores import Inputs, Setup, Tile, Tiles
from attnswap.swaps.base import Numbers

LARGEST = 1e10
"""Sums of weights above this ask for a larger shift; products of them and of values still fit fp32."""


def forward(setup: Setup, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a call.

    Returns:
        Output (batch, heads, queries, value_dim), shift and 1 / Z (batch, heads, queries, 1), in the computing dtype.
    """
    call = Forward(setup, inputs)
    out = inputs.params.new_empty(call.batch, call.queries, call.heads, call.wide).transpose(1, 2)
    shifts, inverses = call.per_row(0.0, call.queries), call.per_row(0.0, call.queries)
    for i0, i1, tiles in call.blocks():
        acc, total, shift = call.block(i0, i1, tiles)
        shift = finite(shift)
        total = total + rest_of(setup, inputs.sinks, inputs.params, shift, (i0, i1))
        inverse = torch.where(total > 0, 1 / total, total * 0)  # NaN stays NaN
        out[:, :, i0:i1] = acc * inverse
        shifts[:, :, i0:i1], inverses[:, :, i0:i1] = shift, inverse
    return out, shifts, inverses


class Forward(Tiles):
    """A forward pass.

    A block starts with the keys nearest to it, and later ones seldom score far above those. So their scores are formed
    less the shift found so far, in the product itself, and only a tile whose weights come out too large is done again
    with a look at its largest score. Where the weights are their own norm, a column of ones among the values sums them.
    """

    def __init__(self, setup: Setup, inputs: Inputs) -> None:
        self.steps = tape(setup.swap, setup.whole, "weight", "norm")
        self.counted = self.steps.results["weight"] == self.steps.results["norm"]
        super().__init__(setup, inputs, self.steps.buffers, self.counted)
        self.numbers, self.centred = symbols(setup.swap, inputs.params), centred(setup.swap, setup.whole)

    def block(self, i0: int, i1: int, tiles: list[Tile]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the unnormalized output of some rows, the sum of their norms, and the shift of both."""
        swap, query = self.setup.swap, self.query(i0, i1)
        shift, total = _first_shift(self, self.numbers, i1 - i0), self.per_row(0.0, i1 - i0)
        acc = query.new_zeros(self.batch, self.heads, i1 - i0, self.value.shape[2])
        known = not swap.shifted
        for tile in tiles:
            if known and self.folds and self.centred and not tile.partial:
                part, sums = self.weigh(self.shifted(query, tile, shift), tile, shift, None)
                if not swap.shifted or sums.max() < LARGEST:  # not so of NaN
                    acc, total = acc.add_(part), total + sums
                    continue
            s = self.content(query, tile, 0)
            hidden = self.finish(s, tile)
            if swap.shifted:
                highest = (s if hidden is None else s.masked_fill_(hidden, -torch.inf)).amax(-1, keepdim=True)
                higher = torch.maximum(shift, highest)
                factor = torch.where(higher > shift, torch.exp(shift - higher), 1.0)
                acc, total, shift, known = acc.mul_(factor), total * factor, higher, True
            part, sums = self.weigh(less(self, s, shift), tile, shift, hidden)
            acc, total = acc.add_(part), total + sums
        return acc[..., : self.wide], total, shift

    def weigh(self, s: Tensor, tile: Tile, shift: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns a tile's weighted sum of values, and that of its norms (batch, heads, rows, 1)."""
        found = self.steps.run({"s": s, "shift": finite(shift), **self.numbers}, self.memory)
        sums = None if self.counted else hide(found["norm"], s, hidden).sum(-1, keepdim=True)
        weight = hide(found["weight"], s, hidden).view(self.batch * self.kv_heads, -1, s.shape[3])
        part = torch.bmm(weight, self.value[:, tile.k0 : tile.k1]).view(*s.shape[:3], -1)
        return part, part[..., self.wide :] if sums is None else sums


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

"""One call cut into tiles: what each holds in its buffers, which keys its rows see, and its scores."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnswap.attention.visibility import Visibility
from attnswap.swaps.base import Swap

ROWS, KEYS = 128, 512
"""Queries and keys in a tile: with all heads, a few tiles fill a cache."""
SMALLEST = -60.0
"""Scores are held this close to the shift: what lies below adds nothing, and subnormal products are slow."""


@dataclass(frozen=True)
class Tile:
    """Queries ``i0`` to ``i1`` against keys ``k0`` to ``k1``; ``partial`` if some row does not see all of them."""

    i0: int
    i1: int
    k0: int
    k1: int
    partial: bool


@dataclass(frozen=True)
class Setup:
    """What a call is made of beside tensors that gradients flow to."""

    swap: Swap
    whole: bool
    visibility: Visibility
    scaling: float
    softcap: float | None


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call: b_i and c_j in fp64, everything else but queries, keys and values in the computing dtype.

    Attributes:
        query: Shape (batch, heads, queries, head_dim).
        key: Shape (batch, kv heads, keys, head_dim).
        value: Shape (batch, kv heads, keys, value_dim).
        row_scale: a_i, shape (batch, heads, queries).
        row_bias: b_i, of the same shape.
        key_bias: c_j, shape (batch, heads, keys).
        sinks: Shape (heads,).
        params: The numbers of each head, shape (heads, numbers).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    row_scale: Tensor | None
    row_bias: Tensor | None
    key_bias: Tensor | None
    sinks: Tensor | None
    params: Tensor


class Tiles:
    """A call's tiles and their scores.

    Queries lie as (batch * kv heads, groups * rows, width), so that a product serves all heads of a key/value head at
    once, and no key is repeated.
    """

    def __init__(self, setup: Setup, inputs: Inputs, buffers: int) -> None:
        self.setup, self.inputs, self.dtype = setup, inputs, inputs.params.dtype
        self.batch, self.heads, self.queries, _ = inputs.query.shape
        self.kv_heads, self.keys = inputs.key.shape[1:3]
        self.groups, self.wide = self.heads // self.kv_heads, inputs.value.shape[3]
        size = self.batch * self.heads * min(ROWS, self.queries) * min(KEYS, self.keys)
        self.memory = [inputs.params.new_empty(size) for _ in range(buffers)]

    def per_row(self, fill: float, rows: int) -> Tensor:
        """Returns a number for each row of a block, (batch, heads, rows, 1)."""
        return self.inputs.params.new_full((self.batch, self.heads, rows, 1), fill)

    def blocks(self) -> Iterator[tuple[int, int, list[Tile]]]:
        """Yields each block of queries with the tiles that some row of it sees, the nearest first.

        Keys that every row sees and those at the fringes lie in tiles of their own: few need a mask.
        """
        visibility = self.setup.visibility
        first, last = visibility.spans
        holes = visibility.holes is not None or visibility.dense is not None
        for i0 in range(0, self.queries, ROWS):
            i1 = min(i0 + ROWS, self.queries)
            starts, ends = first[:, i0:i1], last[:, i0:i1]
            some = ends > starts
            lowest = int(starts.where(some, self.keys).min())
            highest = int(ends.where(some, 0).max())
            inner = sorted((min(max(int(starts.max()), lowest), highest), min(max(int(ends.min()), lowest), highest)))
            seen_by_all = not holes and int(starts.max()) < int(ends.min())
            parts = [(lowest, inner[0], True), (inner[0], inner[1], not seen_by_all), (inner[1], highest, True)]
            tiles = [
                Tile(i0, i1, max(k1 - KEYS, start), k1, partial)
                for start, end, partial in reversed(parts)
                for k1 in range(end, start, -KEYS)
            ]
            yield i0, i1, tiles

    def rows(self, x: Tensor, i0: int, i1: int) -> Tensor:
        """Returns rows of (batch, heads, queries, width) in the layout of products, in the computing dtype."""
        part = x[:, :, i0:i1].to(self.dtype)
        return part.reshape(self.batch * self.kv_heads, self.groups * (i1 - i0), x.shape[3])

    def keyed(self, x: Tensor, tile: Tile) -> Tensor:
        """Returns a tile's keys or values as (batch * kv heads, keys, width), in the computing dtype."""
        part = x[:, :, tile.k0 : tile.k1].to(self.dtype)
        return part.reshape(self.batch * self.kv_heads, tile.k1 - tile.k0, x.shape[3])

    def product(self, left: Tensor, right: Tensor, tile: Tile, buffer: int) -> Tensor:
        """Multiplies rows with a tile's keys or values, transposed, into a buffer: (batch, heads, rows, keys)."""
        shape = (left.shape[0], left.shape[1], tile.k1 - tile.k0)
        out = self.memory[buffer][: shape[0] * shape[1] * shape[2]].view(shape)
        torch.bmm(left, right.transpose(1, 2), out=out)
        return out.view(self.batch, self.heads, tile.i1 - tile.i0, shape[2])

    def content(self, query: Tensor, tile: Tile, buffer: int) -> Tensor:
        """Computes ``cap(scaling q.k)``; ``query`` is already scaled."""
        s = self.product(query, self.keyed(self.inputs.key, tile), tile, buffer)
        cap = self.setup.softcap
        return s if cap is None else s.div_(cap).tanh_().mul_(cap)

    def finish(self, s: Tensor, tile: Tile) -> Tensor | None:
        """Turns content into scores ``a_i cap(z) + b_i + c_j + B_ij`` in place; returns the mask of a partial tile."""
        inputs, visibility, rows = self.inputs, self.setup.visibility, slice(tile.i0, tile.i1)
        if inputs.row_scale is not None:
            s *= inputs.row_scale[..., rows, None]
        if inputs.key_bias is not None:
            self._add_gates(s, tile, inputs.key_bias)
        elif inputs.row_bias is not None:
            s += inputs.row_bias[..., rows, None].to(self.dtype)
        if visibility.bias is not None:
            s += visibility.bias[:, :, rows, tile.k0 : tile.k1].to(self.dtype)
        if not tile.partial:
            return None
        return ~visibility.mask(tile.i0, tile.i1, tile.k0, tile.k1)

    def _add_gates(self, s: Tensor, tile: Tile, keys: Tensor) -> None:
        """Adds ``b_i + c_j``: sums that grow without bound meet in fp64, key by key or at the tile's last key."""
        own = self.inputs.row_bias
        rows = 0.0 if own is None else own[..., tile.i0 : tile.i1, None]
        centre = keys[..., None, tile.k1 - 1 : tile.k1]
        near = keys[..., None, tile.k0 : tile.k1]
        if tile.partial:
            s += (rows + near).to(self.dtype)
        else:
            s += (near - centre).to(self.dtype)
            s += (rows + centre).to(self.dtype)

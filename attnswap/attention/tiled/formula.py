"""A swap's maths on a tile: lists of operations, scores less their shift, and what denominators hold beside keys."""

import functools
from typing import Any

import torch
from torch import Tensor

from attnswap.attention.codegen import parameters, trace
from attnswap.attention.tiled.scores import Setup, Tiles, floored
from attnswap.attention.tiled.tape import Tape
from attnswap.swaps.base import Numbers, Swap
from attnswap.swaps.expression import Expr, symbol

DIFFERENCE = symbol("s") - symbol("shift")


@functools.cache
def centred(swap: Swap, whole: bool) -> bool:
    """Whether a swap's maths reads the score only as ``s - shift``."""
    trees = trace(swap, whole)
    return not swap.shifted or all(_reads_difference(tree) for name, tree in trees.items() if name != "floor")


def _reads_difference(tree: Expr) -> bool:
    if tree == DIFFERENCE or tree.op == "constant":
        return True
    return tree != symbol("s") if tree.op == "symbol" else all(_reads_difference(x) for x in tree.args)


def _of_difference(tree: Expr) -> Expr:
    """Rewrites a tree so that ``s`` stands for ``s - shift``."""
    if tree == DIFFERENCE:
        return symbol("s")
    return tree if tree.op in ("symbol", "constant") else Expr(tree.op, tuple(_of_difference(x) for x in tree.args))


@functools.cache
def tape(swap: Swap, whole: bool, *names: str) -> Tape:
    """Returns the operations that compute some trees of a swap, of ``s - shift`` in place of ``s`` if it is centred."""
    trees = trace(swap, whole)
    rewrite = _of_difference if swap.shifted and centred(swap, whole) else lambda tree: tree
    return Tape({name: rewrite(trees[name]) for name in names})


def symbols(swap: Swap, params: Tensor) -> dict[str, Tensor]:
    """Returns the per-head numbers as the maths takes them, (heads, 1, 1)."""
    return {name: params[:, i, None, None] for i, name in enumerate(parameters(swap))}


def less(call: Tiles, s: Tensor, shift: Tensor) -> Tensor:
    """Returns scores as the tape of their swap reads them, in place: less their shift if it is centred."""
    if not call.setup.swap.shifted:
        return s if call.inputs.key_bias is None else floored(s)
    shift = finite(shift)
    if not centred(call.setup.swap, call.setup.whole):
        return s
    s.sub_(shift)
    return s if call.inputs.key_bias is None else floored(s)


def hide(x: Tensor, s: Tensor, hidden: Tensor | None) -> Tensor:
    """Returns a result as a tile with nothing at hidden keys; a formula need not read the score."""
    x = x if x.shape == s.shape else x.expand_as(s).contiguous()
    return x if hidden is None else x.masked_fill_(hidden, 0.0)


def finite(shift: Tensor) -> Tensor:
    """Returns 0 for the shift of a row that has seen no key yet."""
    return torch.where(shift.isneginf(), 0.0, shift)


def rest_of(setup: Setup, sinks: Tensor | None, params: Tensor, shift: Tensor, rows: tuple[int, int]) -> Any:
    """Returns what the denominator of some rows holds beside their keys."""
    numbers = Numbers(**symbols(setup.swap, params))
    n = setup.visibility.n[..., slice(*rows), None].to(shift.dtype)
    rest = setup.swap.null(shift, n, numbers)
    return rest if sinks is None else rest + setup.swap.norm(sinks[:, None, None], shift, numbers)

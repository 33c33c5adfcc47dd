"""Which key/value head each query head reads, and how to pick heads, by a view where one will do."""

import math
from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor


def kv_heads_of(heads: Sequence[int], groups: int) -> tuple[int, ...]:
    """Returns the key/value head of each query head.

    Args:
        heads: Query heads in the order wanted.
        groups: Query heads per key/value head in the whole layer.
    """
    return tuple(h // groups for h in heads)


def regular_heads(kv_heads: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Returns key/value heads, repeated where they must be, that each serve the same number of query heads in a row.

    Args:
        kv_heads: The key/value head of each query head, such as (1, 1, 0, 0), (0, 0, 1) or (2, 0, 2).

    Returns:
        The key/value heads and how many query heads each serves: (1, 0) and 2, (0, 0, 1) and 1, (2, 0, 2) and 1.
    """
    groups = math.gcd(*(len(list(run)) for _, run in groupby(kv_heads)))
    return tuple(kv_heads[::groups]), groups


def pick(x: Tensor, heads: Sequence[int], dim: int = 1) -> Tensor:
    """Returns some heads of a tensor, in any order and as often as named.

    Args:
        x: A tensor with heads in dimension ``dim``.
        heads: At least one index.
        dim: Where the heads are.

    Returns:
        A view where the indices grow in even steps, else a copy. Gradients of a head that is named several times are
        added up in a fixed order, also on a GPU.
    """
    steps = {b - a for a, b in pairwise(heads)} or {1}
    step = steps.pop()
    if not steps and step > 0:
        whole = (slice(None),) * dim
        return x[(*whole, slice(heads[0], heads[-1] + 1, step))]
    parts = x.unbind(dim)
    return torch.stack([parts[h] for h in heads], dim)


def in_order(parts: Sequence[tuple[Sequence[int], Tensor]], dim: int) -> Tensor:
    """Puts the heads of several tensors into one.

    Args:
        parts: Heads, and a tensor that holds them in that order in dimension ``dim``; together each head once.
        dim: Where the heads are.

    Returns:
        All heads in ascending order, in one piece of memory unless there was but one part in that order.
    """
    if len(parts) == 1 and list(parts[0][0]) == sorted(parts[0][0]):
        return parts[0][1]
    pieces: dict[int, Tensor] = {}
    for heads, x in parts:
        lengths = _runs(heads)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        pieces |= {heads[start]: piece for start, piece in zip(starts, x.split(lengths, dim), strict=True)}
    return torch.cat([piece for _, piece in sorted(pieces.items(), key=lambda item: item[0])], dim)


def _runs(heads: Sequence[int]) -> list[int]:
    """Returns the lengths of the runs of consecutive heads."""
    lengths: list[int] = []
    for i, head in enumerate(heads):
        if i and head == heads[i - 1] + 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths

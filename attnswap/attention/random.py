"""Random numbers by counter: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

A number depends on the seed and on where it stands (batch row, head, query, key), and on nothing else: a block that is
computed again in the backward pass, or by another backend, reads the same ones.
"""

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Returns the upper and the lower 32 bits of a product, of 32-bit words in int64."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor  # both below 2^48
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> Tensor:
    """Returns the first of the four random words of each counter.

    Args:
        counter: Four words in int64, broadcastable with each other.
        seed: A number from 0 to 2^63 - 1, int64 of shape ().

    Returns:
        Words of 32 bits in int64.
    """
    a, b, c, d = torch.broadcast_tensors(*counter)
    k0, k1 = seed & WORD, seed >> 32
    for _ in range(ROUNDS):
        high0, low0 = _product(a, MULTIPLIERS[0])
        high1, low1 = _product(c, MULTIPLIERS[1])
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return a


def uniform_of(seed: Tensor, batch: int, heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Returns uniform random numbers in (0, 1) for a block of pairs.

    Args:
        seed: See :func:`philox`.
        batch: Number of rows of the batch.
        heads: Number of heads.
        queries: Index of each query among the keys, shape (queries,).
        keys: Index of each key, shape (keys,).

    Returns:
        fp64, shape (batch, heads, queries, keys); odd multiples of 2^-24, which fp32 holds exactly.
    """
    device = queries.device
    rows = torch.arange(batch, device=device)[:, None, None, None]
    head = torch.arange(heads, device=device)[:, None, None]
    word = philox((keys[None, None, None], queries[:, None], head, rows), seed)
    return ((word >> 9).double() + 0.5) * 2.0**-23

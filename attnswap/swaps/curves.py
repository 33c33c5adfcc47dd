"""Draw a swap's weight curve against softmax's, in the terminal."""

from typing import Any

import torch
from torch import Tensor

from attnswap.swaps.base import ModelInfo, Swap


def draw(swap: Swap, keys: int = 64, width: int = 50) -> None:
    """Prints the weight of the key before the last as its score moves; the others' scores are normally distributed.

    Args:
        swap: The swap, with its features at their initial values and per-token gates at 0.
        keys: How many keys the row sees.
        width: Length of the longest bar.
    """
    torch.manual_seed(0)
    others = torch.randn(keys - 1, dtype=torch.float64)
    print(f"{swap.name}: weight of one key among {keys} (#), softmax's (|)")
    for score in torch.arange(-3.0, 6.5, 0.5, dtype=torch.float64):
        row = torch.cat([others[:-1], score[None], others[-1:]])
        weight, softmax = float(_weights(swap, row)[-2]), float(row.softmax(0)[-2])
        bar = list("#" * round(weight * width) + " " * (width + 1 - round(weight * width)))
        bar[min(round(softmax * width), width)] = "|"
        print(f"{float(score):5.1f} {weight:7.4f} {''.join(bar)}")


def _weights(swap: Swap, row: Tensor) -> Tensor:
    """Returns the weights of the last query of a text whose scores are given."""
    from attnswap.attention.functional import weights_of  # which imports the swaps

    keys = len(row)
    swap = swap.bind(ModelInfo(1, 1, hidden=1, max_positions=keys, value_dim=1))
    sizes = {"head": (1,), "query": (1, 1, 1), "key": (1, 1, keys)}
    features: dict[str, Any] = {
        name: torch.full(sizes[f.per] + (() if f.width is None else (1,)), f.initial or 0.0, dtype=row.dtype)
        for name, f in swap.features().items()
    }
    key = row.reshape(1, 1, keys, 1)
    return weights_of(torch.ones_like(key[:, :, :1]), key, key, swap, is_causal=True, scaling=1.0, **features).flatten()

"""Draw a swap's weight curve against softmax's, in the terminal."""

import importlib
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
    # Looked up when a curve is drawn: apart from this, swaps know nothing of what computes them.
    attention_weights = importlib.import_module("attnswap.attention.functional").attention_weights
    keys = len(row)
    swap = swap.bind(ModelInfo(1, 1, hidden=1, max_positions=keys, value_dim=1))
    features: dict[str, Any] = {}
    for name, feature in swap.features().items():
        shape = feature.shape(1, 1, 1, keys, 1)
        start = feature.start([0]) if feature.per == "head" else torch.zeros(())
        features[name] = start.to(row.dtype).expand(shape)
    # Keys of one length, which the scores turn: swaps may read the angle alone.
    key = torch.stack([row, (8.0**2 - row**2).sqrt()], -1)[None, None]
    query = torch.tensor([[[[1.0, 0.0]]]], dtype=row.dtype)
    return attention_weights(query, key, key[..., :1], swap, is_causal=True, scaling=1.0, **features).flatten()

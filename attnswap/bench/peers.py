"""Other implementations to compare with: formulas in plain torch, and other packages if they are installed."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnswap.attention import attention
from attnswap.attention.dense import grouped_matmul
from attnswap.swaps import Swap

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """An implementation that computes the full matrix of scores.

    Attributes:
        make: Returns the causal attention function, given the number of query heads and of keys.
        score_matrices: Number of fp32 matrices of queries by keys in memory at once for each head, with a backward
            pass. Measured by ``extra_memory`` at 1024 tokens, and rounded up.
        package: The distribution that it needs, if any.
        module: The module of that distribution.
    """

    make: Callable[[int, int], Attention]
    score_matrices: int
    package: str | None = None
    module: str | None = None

    @property
    def version(self) -> str | None:
        """Version of the package."""
        return importlib.metadata.version(self.package) if self.package else None


def installed(peer: Peer) -> bool:
    """Whether the package of a peer is installed."""
    return peer.module is None or importlib.util.find_spec(peer.module) is not None


def _future(length: int) -> Tensor:
    """Returns the mask of the keys after each query, (queries, keys)."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    return grouped_matmul(query, key.transpose(-1, -2), groups) * query.shape[-1] ** -0.5


def _eager(heads: int, length: int) -> Attention:
    """Softmax by the dense reference."""
    return lambda query, key, value: attention(
        query, key, value, Swap(), is_causal=True, enable_gqa=True, backend="dense"
    )


def _naive_softpick(heads: int, length: int) -> Attention:
    """Softpick, directly by its formula."""
    future = _future(length)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raised = torch.expm1(_scores(query, key).masked_fill(future, 0.0))  # a masked key adds |e^0 - 1| = 0
        weights = raised.relu() / (raised.abs().sum(-1, keepdim=True) + 1e-6)
        return grouped_matmul(weights, value, query.shape[1] // key.shape[1])

    return attend


def _entmax(name: str) -> Callable[[int, int], Attention]:
    def make(heads: int, length: int) -> Attention:
        normalize: Callable[..., Tensor] = getattr(importlib.import_module("entmax"), name)
        future = _future(length)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            weights = normalize(_scores(query, key).masked_fill(future, -torch.inf), dim=-1)
            return grouped_matmul(weights, value, query.shape[1] // key.shape[1])

        return attend

    return make


def _x_transformers(**options: Any) -> Callable[[int, int], Attention]:
    def make(heads: int, length: int) -> Attention:
        attend = importlib.import_module("x_transformers.attend").Attend(causal=True, heads=heads, **options)
        return lambda query, key, value: attend(query, key, value)[0]

    return make


PEERS: dict[str, Peer] = {
    "eager softmax": Peer(_eager, 9),
    "naive softpick": Peer(_naive_softpick, 8),
    "entmax: entmax15": Peer(_entmax("entmax15"), 14, "entmax", "entmax"),
    "entmax: sparsemax": Peer(_entmax("sparsemax"), 9, "entmax", "entmax"),
    "x-transformers: Attend": Peer(_x_transformers(), 4, "x-transformers", "x_transformers"),
    "x-transformers: Attend sigmoid": Peer(_x_transformers(sigmoid=True), 4, "x-transformers", "x_transformers"),
}
"""Peers by name. Long calls are skipped, since the matrices of scores would be too large."""

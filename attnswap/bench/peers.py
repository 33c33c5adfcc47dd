"""Other implementations to compare with: formulas in plain torch, and other packages if they are installed."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnswap.attention import attention
from attnswap.attention.dense import grouped_matmul
from attnswap.swaps import Swap

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """Another implementation of attention.

    Attributes:
        make: Returns the causal attention function, given the number of query heads and of keys, and the device.
        score_matrices: Number of fp32 matrices of queries by keys in memory at once for each head, with a backward
            pass. Measured by ``extra_memory`` at 1024 tokens, and rounded up.
        package: The distribution that it needs, if any.
        module: The module of that distribution.
        devices: The types of device on which it is measured.
    """

    make: Callable[[int, int, str], Attention]
    score_matrices: int
    package: str | None = None
    module: str | None = None
    devices: tuple[str, ...] = ("cpu",)

    @property
    def version(self) -> str | None:
        """Version of the package."""
        return importlib.metadata.version(self.package) if self.package else None


def installed(peer: Peer) -> bool:
    """Whether the package of a peer is installed."""
    return peer.module is None or importlib.util.find_spec(peer.module) is not None


def _future(length: int, device: str) -> Tensor:
    """Returns the mask of the keys after each query, (queries, keys)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    return grouped_matmul(query, key.transpose(-1, -2), groups) * query.shape[-1] ** -0.5


def _eager(heads: int, length: int, device: str) -> Attention:
    """Softmax by the dense reference."""
    return lambda query, key, value: attention(
        query, key, value, Swap(), is_causal=True, enable_gqa=True, backend="dense"
    )


def _naive_softpick(heads: int, length: int, device: str) -> Attention:
    """Softpick, directly by its formula."""
    future = _future(length, device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raised = torch.expm1(_scores(query, key).masked_fill(future, 0.0))  # a masked key adds |e^0 - 1| = 0
        weights = raised.relu() / (raised.abs().sum(-1, keepdim=True) + 1e-6)
        return grouped_matmul(weights, value, query.shape[1] // key.shape[1])

    return attend


def _entmax(name: str) -> Callable[[int, int, str], Attention]:
    def make(heads: int, length: int, device: str) -> Attention:
        normalize: Callable[..., Tensor] = getattr(importlib.import_module("entmax"), name)
        future = _future(length, device)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            weights = normalize(_scores(query, key).masked_fill(future, -torch.inf), dim=-1)
            return grouped_matmul(weights, value, query.shape[1] // key.shape[1])

        return attend

    return make


def _x_transformers(**options: Any) -> Callable[[int, int, str], Attention]:
    def make(heads: int, length: int, device: str) -> Attention:
        attend = importlib.import_module("x_transformers.attend").Attend(causal=True, heads=heads, **options)
        return lambda query, key, value: attend(query, key, value)[0]

    return make


def _cudnn(heads: int, length: int, device: str) -> Attention:
    """Softmax by cuDNN."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return attend


def _flex(modify: Callable[[int, int, str], Callable[..., Tensor] | None]) -> Callable[[int, int, str], Attention]:
    """FlexAttention with a change of the scores, compiled on a GPU."""

    def make(heads: int, length: int, device: str) -> Attention:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        change = modify(heads, length, device)
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)
        compiled = torch.compile(flex_attention, dynamic=False) if device != "cpu" else flex_attention

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return compiled(query, key, value, score_mod=change, block_mask=mask, enable_gqa=True)  # type: ignore

        return attend

    return make


def _flex_ssmax(heads: int, length: int, device: str) -> Callable[..., Tensor]:
    """SSMax with s = 1/4 and b = 1 + 1/4: a factor of the query."""
    factor = 0.25 * torch.arange(1, length + 1, device=device).log() + 1.25
    return lambda score, b, h, q, k: score * factor[q]


def _flex_gate(heads: int, length: int, device: str) -> Callable[..., Tensor]:
    """The forgetting gate with log f = -1e-3: the difference of two sums of log gates."""
    sums = torch.full((heads, length), -1e-3, device=device).cumsum(1)
    return lambda score, b, h, q, k: score + sums[h, q] - sums[h, k]


GPU = ("cuda",)
PEERS: dict[str, Peer] = {
    "eager softmax": Peer(_eager, 9),
    "naive softpick": Peer(_naive_softpick, 8),
    "entmax: entmax15": Peer(_entmax("entmax15"), 14, "entmax", "entmax"),
    "entmax: sparsemax": Peer(_entmax("sparsemax"), 9, "entmax", "entmax"),
    "x-transformers: Attend": Peer(_x_transformers(), 4, "x-transformers", "x_transformers"),
    "x-transformers: Attend sigmoid": Peer(_x_transformers(sigmoid=True), 4, "x-transformers", "x_transformers"),
    "sdpa cudnn": Peer(_cudnn, 0, devices=GPU),
    "flex softmax": Peer(_flex(lambda heads, length, device: None), 0, devices=GPU),
    "flex ssmax": Peer(_flex(_flex_ssmax), 0, devices=GPU),
    "flex forgetting-gate": Peer(_flex(_flex_gate), 0, devices=GPU),
}
"""Peers by name. Long calls of those that hold whole matrices of scores are skipped.

FlexAttention cannot express sigmoid, softpick and entmax: its normalizer is softmax.
"""

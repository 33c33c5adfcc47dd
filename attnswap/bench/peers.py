"""Other implementations to compare with: formulas in plain torch, and other packages if they are installed."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnswap.attention import attention
from attnswap.attention.dense import grouped_matmul
from attnswap.bench.causal import causal_problem
from attnswap.swaps import ModelInfo, resolve
from attnswap.swaps.softmax import Softmax

if TYPE_CHECKING:
    from attnswap.bench.cases import Setting

Attention = Callable[..., Tensor]
"""A causal attention function of query, key, value, and of the features of :attr:`Peer.swap` by keyword."""


GPU = ("cuda",)


@dataclass(frozen=True)
class Peer:
    """Another implementation of attention.

    Attributes:
        make: Returns the attention function for a setting.
        score_matrices: Number of fp32 matrices of queries by keys in memory at once for each head, with a backward
            pass. Measured by ``extra_memory`` at 1024 tokens, and rounded up.
        package: The distribution that it needs, if any.
        module: The module of that distribution.
        devices: The types of device on which it is measured.
        swap: The config of the swap that it computes; empty: without features.
        fill: See :attr:`attnswap.bench.cases.Case.fill`.
    """

    make: Callable[["Setting"], Attention]
    score_matrices: int
    package: str | None = None
    module: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    swap: Mapping[str, Any] = field(default_factory=dict)
    fill: Mapping[str, float] = field(default_factory=dict)

    @property
    def version(self) -> str | None:
        """Version of the package."""
        return importlib.metadata.version(self.package) if self.package else None


def installed(peer: Peer) -> bool:
    """Whether the package of a peer is installed."""
    return peer.module is None or importlib.util.find_spec(peer.module) is not None


def _future(setting: "Setting") -> Tensor:
    """Returns the mask of the keys after each query, (queries, keys)."""
    return torch.ones(setting.length, setting.length, dtype=torch.bool, device=setting.device).triu(1)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    return grouped_matmul(query, key.transpose(-1, -2), groups) * query.shape[-1] ** -0.5


def _eager(setting: "Setting") -> Attention:
    """Softmax by the dense reference."""
    return lambda query, key, value: attention(
        query, key, value, Softmax(), is_causal=True, enable_gqa=True, backend="dense"
    )


def _naive_softpick(setting: "Setting") -> Attention:
    """Softpick, directly by its formula."""
    future = _future(setting)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raised = torch.expm1(_scores(query, key).masked_fill(future, 0.0))  # a masked key adds |e^0 - 1| = 0
        weights = raised.relu() / (raised.abs().sum(-1, keepdim=True) + 1e-6)
        return grouped_matmul(weights, value, query.shape[1] // key.shape[1])

    return attend


def _entmax(name: str) -> Callable[["Setting"], Attention]:
    def make(setting: "Setting") -> Attention:
        normalize: Callable[..., Tensor] = getattr(importlib.import_module("entmax"), name)
        future = _future(setting)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            weights = normalize(_scores(query, key).masked_fill(future, -torch.inf), dim=-1)
            return grouped_matmul(weights, value, query.shape[1] // key.shape[1])

        return attend

    return make


def _x_transformers(**options: Any) -> Callable[["Setting"], Attention]:
    def make(setting: "Setting") -> Attention:
        attend = importlib.import_module("x_transformers.attend").Attend(
            causal=True, heads=setting.shape.heads, **options
        )
        return lambda query, key, value: attend(query, key, value)[0]

    return make


def _cudnn(setting: "Setting") -> Attention:
    """Softmax by cuDNN."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return attend


def _compiles(device: str) -> bool:
    """Whether FlexAttention is compiled: torch has no compiled backward pass for the CPU."""
    return torch.device(device).type != "cpu"


def _flex(config: Mapping[str, Any]) -> Callable[["Setting"], Attention]:
    """A swap by FlexAttention, compiled on a GPU; without a config, softmax.

    FlexAttention changes scores one by one. The swap's own terms, which autograd differentiates, give it a factor for
    each query and a bias for each key.
    """

    def make(setting: "Setting") -> Attention:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length, shape = setting.length, setting.shape
        info = ModelInfo(shape.heads, shape.kv_heads, shape.heads * shape.head_dim, length, shape.head_dim)
        swap = resolve(config or "softmax").bind(info)
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=setting.device)

        def flex(query: Tensor, key: Tensor, value: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
            def change(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                score = score if scale is None else score * scale[b, h, q]
                return score if bias is None else score + bias[b, h, k]

            return flex_attention(query, key, value, score_mod=change, block_mask=mask, enable_gqa=True)  # type: ignore

        if _compiles(setting.device):
            # Past dynamo's limit of recompilations FlexAttention would run uncompiled: each setting begins anew.
            torch.compiler.reset()
            flex = torch.compile(flex, dynamic=False, fullgraph=True)

        def attend(query: Tensor, key: Tensor, value: Tensor, **features: Tensor) -> Tensor:
            terms = causal_problem(swap, query, key, value, features).terms
            rows = (query.shape[0], query.shape[1], length)
            given = (terms.query_scale, terms.key_bias)
            scale, bias = (None if x is None else x.float().expand(rows).contiguous() for x in given)
            return flex(query, key, value, scale, bias)

        return attend

    return make


def _flex_peer(config: Mapping[str, Any], fill: Mapping[str, float] | None = None) -> Peer:
    return Peer(_flex(config), 0, devices=GPU, swap=config, fill=fill or {})


PEERS: dict[str, Peer] = {
    "eager softmax": Peer(_eager, 9),
    "naive softpick": Peer(_naive_softpick, 8),
    "entmax: entmax15": Peer(_entmax("entmax15"), 14, "entmax", "entmax"),
    "entmax: sparsemax": Peer(_entmax("sparsemax"), 9, "entmax", "entmax"),
    "x-transformers: Attend": Peer(_x_transformers(), 4, "x-transformers", "x_transformers"),
    "x-transformers: Attend sigmoid": Peer(_x_transformers(sigmoid=True), 4, "x-transformers", "x_transformers"),
    "sdpa cudnn": Peer(_cudnn, 0, devices=GPU),
    "flex softmax": _flex_peer({}),
    "flex ssmax": _flex_peer({"name": "ssmax"}),
    "flex selective-temperature": _flex_peer({"name": "selective-temperature", "value": False}),
    "flex forgetting-gate": _flex_peer({"name": "forgetting-gate"}, {"log_forget": -1e-3}),
}
"""Peers by name. Long calls of those that hold whole matrices of scores are skipped.

FlexAttention cannot express sigmoid, softpick and entmax: its normalizer is softmax.
"""

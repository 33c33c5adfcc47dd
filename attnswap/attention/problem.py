"""One attention call, as every backend receives it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnswap.attention.heads import pick, regular_heads
from attnswap.attention.lazy import lazy
from attnswap.attention.modes import differentiated
from attnswap.attention.visibility import Visibility
from attnswap.errors import ConfigError, nearest
from attnswap.swaps.base import Call, Numbers, Swap, Terms


@dataclass(frozen=True)
class Problem:
    """The inputs of one attention computation.

    Attributes:
        swap: The swap that weighs the values.
        query: Shape (batch, heads, queries, head_dim).
        key: Shape (batch, kv heads, keys, head_dim); heads is a multiple of kv heads unless ``kv_heads`` is given.
        value: Shape (batch, kv heads, keys, value_dim).
        visibility: Which keys each query sees.
        features: Every feature the swap declares (see :func:`complete_features`).
        scaling: Multiplies the dot products.
        ramp: lambda: a number, or a tensor of shape () or (heads,).
        softcap: The model's own cap: scores become ``softcap * tanh(score / softcap)``.
        sinks: The model's own sink logits, shape (heads,) or (batch, heads, queries): a null key of value 0.
        dropout: Probability of dropping a weight.
        kv_heads: The key/value head that each query head reads, so that some heads of a layer share its keys and
            values as they lie; None: equal groups in order. Features per key/value head are then those of the heads
            it names, in the order in which it first names them.
        stock: The model's own softmax kernel for these heads, where there is a better one than torch's: of query, key
            and value as in a call without ``kv_heads``; scaling, visibility, sinks and dropout are those of this call.
        content: The scaled products of queries and keys, (batch, heads, queries, keys), where they are known already;
            only the dense reference takes it.
    """

    swap: Swap
    query: Tensor
    key: Tensor
    value: Tensor
    visibility: Visibility
    features: Mapping[str, Tensor]
    scaling: float
    ramp: float | Tensor = 1.0
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    kv_heads: tuple[int, ...] | None = None
    stock: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    content: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype scores and weights are computed in: fp64 for fp64 inputs, else fp32."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def groups(self) -> int:
        """Query heads per key/value head of a call without ``kv_heads``."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def whole(self) -> bool:
        """Whether lambda is the number 1, so that what it would blend with is left out."""
        return isinstance(self.ramp, float) and self.ramp == 1.0

    def tensors(self) -> list[Tensor]:
        """Returns everything a derivative may be asked by."""
        given = (self.query, self.key, self.value, self.ramp, self.sinks, self.content, self.visibility.bias)
        return [x for x in (*given, *self.features.values()) if isinstance(x, Tensor)]

    def scaled_value(self) -> Tensor:
        """Returns the values times the swap's own scale of them, in their dtype."""
        scale = self.terms.value_scale
        return self.value if scale is None else (self.value * scale[..., None]).to(self.value.dtype)

    def regular(self) -> "Problem":
        """Returns the call with its keys and values picked so that equal groups of query heads share one, in order."""
        if self.kv_heads is None:
            return self
        chosen, _ = regular_heads(self.kv_heads)
        named = list(dict.fromkeys(self.kv_heads))
        places = [named.index(h) for h in chosen]
        declared = self.swap.features()
        features = {
            name: pick(x, places, 0 if declared[name].per == "head" else 1) if declared[name].heads == "kv" else x
            for name, x in self.features.items()
        }
        key, value = pick(self.key, chosen), pick(self.value, chosen)
        return replace(self, key=key, value=value, features=features, kv_heads=None)

    def per_head(self, x: Any, trailing: int = 1) -> Any:
        """Returns a per-head tensor as (heads, 1, ...) in the computing dtype; numbers pass through."""
        if not isinstance(x, Tensor):
            return x
        x = x.to(self.dtype)
        return x.reshape(-1, *([1] * trailing)) if x.ndim else x

    @lazy
    def logsumexp(self) -> Tensor:
        """The logsumexp of each query's scores, (batch, heads, queries), without gradients."""
        from attnswap.attention.logsumexp import logsumexp

        return logsumexp(self)

    def call(self, *, with_logsumexp: bool = False) -> Call:
        """Returns what the swap sees of this call; ``with_logsumexp`` also where its terms do without."""
        features = {}
        for name, declared in self.swap.features().items():
            value = self.features[name]
            if declared.per == "head":
                features[name] = self.per_head(value)
                continue
            value = value.to(self.dtype)
            valid = self.visibility.token_valid if declared.per == "key" else None
            features[name] = value if valid is None else value.masked_fill(~valid[:, None], declared.padding)
        last = self.visibility.k_length - 1
        wanted = with_logsumexp or (self.swap.needs_logsumexp and not self.whole)
        return Call(
            n=self.visibility.n.to(self.dtype),
            features=features,
            ramp=self.per_head(self.ramp),
            position=self.visibility.positions().clamp(0, last) if last >= 0 else self.visibility.positions() * 0,
            logsumexp=self.logsumexp if wanted else None,
        )

    @lazy
    def terms(self) -> Terms:
        """The swap's terms for all queries and keys."""
        terms = self.swap.terms(self.call())
        bias = terms.key_bias
        # A gate that is shut leaves the stock kernel as it was, bit for bit.
        if bias is None or differentiated(bias) or torch.compiler.is_compiling():
            return terms
        open_at_last = bool(bias[..., -1:].any())  # which settles it, in a sum over tokens, without a look at all keys
        return terms if open_at_last or bool(bias.any()) else replace(terms, key_bias=None)

    def maths_parameters(self) -> Numbers:
        """The per-head values that the elementwise maths reads, as (heads, 1, 1), with the ramp among them."""
        return Numbers(**{name: self.per_head(value, 2) for name, value in self.numbers().items()})

    def numbers(self) -> dict[str, Any]:
        """The numbers the elementwise maths reads for each head: lambda as ``ramp``, and the per-head features."""
        heads = {k: self.features[k] for k, f in self.swap.features().items() if f.per == "head"}
        return {"ramp": self.ramp, **heads}


def complete_features(
    swap: Swap,
    features: Mapping[str, Tensor],
    query: Tensor,
    key: Tensor,
    kv_heads: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:
    """Checks the features of a call and fills in the ones that may be left out.

    Args:
        swap: The swap that will read them.
        features: What the caller gave.
        query: Shape (batch, heads, queries, head_dim).
        key: Shape (batch, kv heads, keys, head_dim).
        kv_heads: The key/value head of each query head; see :class:`Problem`.

    Returns:
        Every declared feature.

    Raises:
        ConfigError: A feature is unknown, missing without an initial value, or of the wrong shape.
    """
    declared = swap.features()
    for name in features:
        if name not in declared:
            known = ", ".join(declared) or "none"
            raise ConfigError(
                f'swap "{swap.name}" has no feature "{name}".{nearest(name, list(declared))} Features: {known}'
            )
    batch, heads, queries, _ = query.shape
    shared = key.shape[1] if kv_heads is None else len(set(kv_heads))
    complete = {}
    for name, feature in declared.items():
        count = heads if feature.heads == "query" else shared
        shape = {"head": (count,), "query": (batch, count, queries), "key": (batch, count, key.shape[2])}[feature.per]
        value = features.get(name)
        if value is None:
            if feature.per != "head" or feature.initial is None:
                raise ConfigError(f'swap "{swap.name}" needs the feature "{name}" of shape {shape}: {feature.what}')
            dtype = torch.promote_types(query.dtype, torch.float32)
            value = torch.full(shape, feature.initial, dtype=dtype, device=query.device)
        if not isinstance(value, Tensor):
            raise ConfigError(
                f'feature "{name}" of swap "{swap.name}" must be a tensor of shape {shape}, not {value!r}'
            )
        if feature.per == "head" and value.ndim == 0:
            value = value.expand(shape)
        if tuple(value.shape) != shape and not (value.ndim == 3 and value.shape == (1, *shape[1:])):
            raise ConfigError(f'feature "{name}" has shape {tuple(value.shape)}; swap "{swap.name}" takes {shape}')
        complete[name] = value
    return complete

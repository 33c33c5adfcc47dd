"""One attention call, as every backend receives it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnswap.attention.heads import pick, regular_heads
from attnswap.attention.lazy import lazy
from attnswap.attention.modes import differentiated
from attnswap.attention.random import uniform_of
from attnswap.attention.visibility import Visibility
from attnswap.errors import ConfigError, nearest
from attnswap.swaps.base import Call, Numbers, Pair, Swap, Terms


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
        seed: Of the random numbers that a swap reads, int64 of shape (); None: they are left out.
        origin: The call as it was before the swap's window and preparation; see :attr:`staged`.
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
    seed: Tensor | None = None
    origin: "Problem | None" = None

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
        origin = None if self.origin is None else self.origin.regular()
        return replace(self, key=key, value=value, features=features, kv_heads=None, origin=origin)

    @lazy
    def staged(self) -> "Problem":
        """The call behind the stages that come before the scores: the swap's window, and its preparation."""
        swap = self.swap
        if self.origin is not None or not swap.stages & {"window", "prepare", "finish"}:
            return self
        origin = self.regular() if swap.stages & {"prepare", "finish"} else self
        visibility = origin.visibility if swap.window is None else origin.visibility.narrowed(swap.window)
        made = replace(origin, visibility=visibility, origin=origin)
        if "prepare" not in swap.stages:
            return made
        prepared = swap.prepare(made.call())
        # The model's own kernel and scores are of other queries, keys and values.
        return replace(made, **vars(prepared), stock=None, content=None)

    def finished(self, out: Tensor) -> Tensor:
        """Returns the output of a staged call behind the stage that comes after the sums, in the values' dtype."""
        given = self.origin or self
        if "finish" in self.swap.stages:
            out = self.swap.finish(out.to(self.dtype), self.call())
        return out.to(given.value.dtype)

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

        return logsumexp(self.origin or self)  # what the model computed: without the swap's window and preparation

    def call(self, *, with_logsumexp: bool = False) -> Call:
        """Returns what the swap sees of this call; ``with_logsumexp`` also where its terms do without."""
        features = {}
        for name, declared in self.swap.features().items():
            value = self.features[name]
            if declared.per == "head":
                features[name] = self.per_head(value) if declared.width is None else value.to(self.dtype)
                continue
            value = value.to(self.dtype)
            valid = self.visibility.token_valid if declared.per == "key" else None
            if valid is not None:
                valid = valid[:, None] if declared.width is None else valid[:, None, :, None]
                value = value.masked_fill(~valid, declared.padding)
            features[name] = value
        last, given = self.visibility.k_length - 1, self.origin or self
        wanted = with_logsumexp or (self.swap.needs_logsumexp and not self.whole)
        index = self.visibility.key_index()
        return Call(
            n=self.visibility.n.to(self.dtype),
            features=features,
            ramp=self.per_head(self.ramp),
            key_index=index.clamp(0, last) if last >= 0 else index * 0,
            query=given.query,
            key=given.key,
            value=given.value,
            scaling=given.scaling,
            logsumexp=self.logsumexp if wanted else None,
        )

    def pair(self, start: int, stop: int, k0: int, k1: int) -> Pair:
        """Returns what the pair stage sees of queries ``start`` to ``stop`` and keys ``k0`` to ``k1``."""
        distance = self.visibility.distance(start, stop, k0, k1)
        if self.seed is None or not self.swap.random:
            return Pair(distance.to(self.dtype))
        index = self.visibility.key_index(start, stop)
        keys = torch.arange(k0, k1, device=index.device)
        uniform = uniform_of(self.seed, self.query.shape[0], self.query.shape[1], index, keys)
        return Pair(distance.to(self.dtype), uniform.to(self.dtype))

    @lazy
    def distance_table(self) -> Tensor | None:
        """The swap's bias by distance, (heads, distances) in the computing dtype, if it has one."""
        table = self.swap.distance_bias(self.call()) if "pair" in self.swap.stages else None
        return None if table is None else table.to(self.dtype)

    def distance_bias(self, pair: Pair) -> Tensor | None:
        """Returns the bias by distance of a block's pairs, broadcastable to its scores, if the swap has one."""
        table = self.distance_table
        if table is None:
            return None
        place = pair.distance.long()  # (batch or 1, 1, rows, keys)
        inside = (place >= 0) & (place < table.shape[1])
        each = table[:, place.clamp(0, table.shape[1] - 1)[:, 0]].transpose(0, 1)
        return torch.where(inside, each, 0.0)

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

    def shared(self) -> tuple[Terms, Numbers]:
        """Returns what all blocks of a call share: its terms, and its per-head values."""
        # Once it is known it is kept, so that it must not be asked for first where no gradients are recorded.
        _ = self.distance_table
        return self.terms, self.maths_parameters()

    def maths_parameters(self) -> Numbers:
        """The per-head values that the elementwise maths reads, as (heads, 1, 1), with the ramp among them."""
        return Numbers(**{name: self.per_head(value, 2) for name, value in self.numbers().items()})

    def numbers(self) -> dict[str, Any]:
        """The numbers the elementwise maths reads for each head: lambda as ``ramp``, and the per-head features."""
        declared = self.swap.features().items()
        heads = {k: self.features[k] for k, f in declared if f.per == "head" and f.width is None}
        return {"ramp": self.ramp, **heads}


def complete_features(
    swap: Swap,
    features: Mapping[str, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_heads: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:
    """Checks the features of a call and fills in the ones that may be left out.

    Args:
        swap: The swap that will read them.
        features: What the caller gave.
        query: Shape (batch, heads, queries, head_dim).
        key: Shape (batch, kv heads, keys, head_dim).
        value: Shape (batch, kv heads, keys, value_dim).
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
        shape = feature.shape(batch, count, queries, key.shape[2], value.shape[3])
        given = features.get(name)
        if given is None:
            if feature.per != "head" or feature.initial is None:
                raise ConfigError(f'swap "{swap.name}" needs the feature "{name}" of shape {shape}: {feature.what}')
            dtype = torch.promote_types(query.dtype, torch.float32)
            given = feature.start(range(count)).to(query.device, dtype).expand(shape)
        if not isinstance(given, Tensor):
            raise ConfigError(
                f'feature "{name}" of swap "{swap.name}" must be a tensor of shape {shape}, not {given!r}'
            )
        if feature.per == "head" and given.ndim == 0:
            given = given.expand(shape)
        if tuple(given.shape) != shape and not (feature.per != "head" and given.shape == (1, *shape[1:])):
            raise ConfigError(f'feature "{name}" has shape {tuple(given.shape)}; swap "{swap.name}" takes {shape}')
        complete[name] = given
    return complete

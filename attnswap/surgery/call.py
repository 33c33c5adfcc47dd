"""One forward of one attention module: its swaps, their features, and the KV cache."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from attnswap.attention.checks import ensure
from attnswap.attention.problem import Problem
from attnswap.attention.visibility import Visibility
from attnswap.errors import UnsupportedModelError
from attnswap.surgery.spec import Slot
from attnswap.surgery.state import append
from attnswap.swaps.base import ModelInfo

Observing = Callable[["LayerCall", str, Problem], None]
"""Takes the call, the name of a slot and its attention problem."""

Watching = Callable[["LayerCall", Tensor, Tensor, int], None]
"""Takes the call, the query (batch, heads, queries, head_dim), the output and the dimension of its heads."""


@dataclass
class LayerCall:
    """The data that an attention module's pre-hook hands to its attention function.

    Attributes:
        before: The attention implementation the model had.
        layer: Index of the layer.
        info: The layer's sizes, if it has swaps.
        slots: The static part of the layer's swaps by name; empty for a layer that was not selected.
        features: Each slot's features and ramp, of the new tokens.
        cache: The KV cache of this forward, if any.
        gains: While a patch is being verified: the swaps run, but what attention gives is our own softmax in their
            place, times one gain for each head, shape (heads,).
        cross: The module attends to another sequence.
        watch: Called with the query and the output of attention; see :class:`attnswap.training.watch.Watch`.
        observe: Called with each slot's problem; see :func:`attnswap.training.observing.observing`.
        served: Set by the attention function, so that the post-hook sees that it was called.
        full: The features of all keys, for modules that call their attention function more than once.
    """

    before: str
    layer: int
    info: ModelInfo | None = None
    slots: dict[str, Slot] = field(default_factory=dict)
    features: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    cache: Cache | None = None
    gains: Tensor | None = None
    cross: bool = False
    watch: "Watching | None" = None
    observe: "Observing | None" = None
    served: bool = False
    full: dict[str, dict[str, Tensor]] | None = None

    @property
    def observed(self) -> Callable[[str, Problem], None] | None:
        """Shows the observer a slot's problem, if there is one."""
        return None if self.observe is None else partial(self.observe, self)

    def find_layer(self, key: Tensor) -> None:
        """Sets the layer of the cache that this call wrote to: some models run one module several times over.

        Args:
            key: The keys as the cache returned them.
        """
        layers = [] if self.cache is None or torch.compiler.is_compiling() else self.cache.layers
        own = layers[self.layer] if 0 <= self.layer < len(layers) else None
        if getattr(own, "keys", None) is not key:
            self.layer = next((i for i, one in enumerate(layers) if getattr(one, "keys", None) is key), self.layer)

    def offset(self, queries: int, keys: int) -> Any:
        """Returns the key index of the first query.

        Static caches hand out keys that are not written yet; sliding ones have dropped the oldest.
        """
        written: Any = keys if self.cache is None else self.cache.get_seq_length(self.layer)
        if isinstance(written, Tensor) and torch.compiler.is_compiling():
            return written.clamp(max=keys) - queries
        return min(int(written), keys) - queries

    def all_features(self, visibility: Visibility) -> dict[str, dict[str, Tensor]]:
        """Returns each slot's features, those per key of all keys: past ones come from beside the cache.

        Padding is blanked before it is stored, with a mark: later masks need not say which past tokens were padding.

        Raises:
            UnsupportedModelError: A mask shows a token that was stored as padding.
        """
        if self.full is not None:
            return {name: dict(values) for name, values in self.full.items()}
        features = {name: dict(values) for name, values in self.features.items()}
        places = [
            (slot, name, feature.padding)
            for slot, static in self.slots.items()
            for name, feature in static.swap.features().items()
            if feature.per == "key"
        ]
        if not places or self.cache is None:
            return features
        new = {f"{slot}.{name}": features[slot][name] for slot, name, _ in places}
        first = next(iter(new.values()))
        blank = torch.zeros_like(first[:, :1], dtype=torch.bool)
        if visibility.token_valid is not None:
            blank = ~visibility.token_valid[:, None, visibility.key_index()].expand_as(blank)
            new = {key: new[key].masked_fill(blank, padding) for key, (_, _, padding) in zip(new, places, strict=True)}
        new["padding"] = blank.to(first.dtype)
        *full, was_blank = append(self.cache, self.layer, new, visibility.k_length)
        shown = visibility.dense is not None and visibility.shows(was_blank[:, 0] > 0)
        ensure(
            ~shown if isinstance(shown, Tensor) else not shown,
            "the attention mask shows a token that no query saw when it entered the KV cache, so that it was taken for "
            "padding. Let every token see itself, or run without a cache",
            error=UnsupportedModelError,
        )
        for (slot, name, _), part in zip(places, full, strict=True):
            features[slot][name] = part
        self.full = features
        return {name: dict(values) for name, values in features.items()}

"""Per-token gates beside the KV cache.

Attention functions see keys and values after the cache has been updated, so what a gate computed for past tokens
must be kept too. It lives in a stock cache layer of the matching kind, hung on the layer it belongs to, whose class
is replaced by a subclass that forwards what happens to the cache: beams reordered, tokens cropped, batches repeated.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from attnswap.attention.checks import ensure
from attnswap.errors import UnsupportedModelError

FORWARDED = (
    "reorder_cache",
    "crop",
    "reset",
    "batch_repeat_interleave",
    "batch_select_indices",
    "activate_past_recording",
)
"""What a side layer follows. Not offloading: gates are small, and stay where they are needed."""


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """Returns the cache among the arguments of an attention module's forward."""
    for value in (*kwargs.values(), *args):
        if isinstance(value, EncoderDecoderCache):
            return value.self_attention_cache
        if isinstance(value, Cache):
            return value
    return None


def append(cache: Cache, layer: int, new: dict[str, Tensor], keys: int) -> list[Tensor]:
    """Stores the gates of new tokens and returns those of every key.

    Args:
        cache: The cache whose layer ``layer`` already holds the new tokens' keys.
        layer: Index of the layer.
        new: Gates of the new tokens by name, shape (batch, gates, tokens).
        keys: Length of the keys that the attention function received.

    Returns:
        In the same order the gates of all keys, shape (batch, gates, keys).

    Raises:
        UnsupportedModelError: Some tokens of the cache went through other swaps or none, or it is of a kind without
            a per-token side store.
    """
    main: Any = cache.layers[layer]
    kinds = {name: gates.shape[1] for name, gates in new.items()}
    side = getattr(main, "attnswap_side", None)
    column = torch.cat(list(new.values()), 1)[..., None]
    ensure(
        getattr(main, "attnswap_kinds", kinds) == kinds and _follows(side, main, column.shape[2]),
        f"the KV cache of layer {layer} holds tokens that went through other swaps or none, so their gates are "
        "unknown; start from an empty cache",
        error=UnsupportedModelError,
    )
    if side is None:
        if torch.compiler.is_compiling():  # without fullgraph this forward then runs in eager mode
            raise UnsupportedModelError(
                "torch.compile cannot add gates to a new KV cache: run the first forward with a cache (the prompt) "
                "without torch.compile, and compile those that follow"
            )
        side = _make_side(main)
        main.attnswap_side, main.attnswap_kinds = side, kinds
        main.__class__ = _with_side(main.__class__)
    full = side.update(column, column[..., :0])[0][..., 0]
    if full.shape[2] != keys:
        raise UnsupportedModelError(f"layer {layer} attends to {keys} keys, but its KV cache has {full.shape[2]}")
    return list(full.split(list(kinds.values()), 1))


def _follows(side: Any, main: Any, new: int) -> bool | Tensor:
    """Whether a side layer holds every token of its cache layer but the new ones, which the cache layer has already."""
    if torch.compiler.is_compiling() and isinstance(side, StaticSlidingWindowLayer):
        # Two Python integers that always differ by a constant would be two symbols of the graph, of which the compiler
        # declares one: the side's count is derived from the cache's, and the counts that are tensors are compared.
        side.cumulative_length_int = main.cumulative_length_int - new
        full = main.cumulative_length_int > main.max_cache_len
        return True if full else side.cumulative_length + new == main.cumulative_length
    return (0 if side is None else side.get_seq_length()) + new == main.get_seq_length()


def _make_side(main: Any) -> Any:
    if not isinstance(main, CacheLayerMixin):
        raise UnsupportedModelError(f"a cache layer of type {type(main).__name__} cannot hold per-token gates")
    if isinstance(main, StaticSlidingWindowLayer):
        return StaticSlidingWindowLayer(main.max_cache_len, sliding_window=main.max_cache_len)
    if isinstance(main, StaticLayer):
        return StaticLayer(main.max_cache_len)
    if isinstance(main, DynamicSlidingWindowLayer):
        side = DynamicSlidingWindowLayer(main.sliding_window)
        side.record_past = main.record_past
        return side
    return DynamicLayer()


@functools.cache
def _with_side(base: type) -> type:
    """Returns a subclass of a cache layer's class that does to the side layer whatever is done to the layer."""

    def forwarded(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = getattr(base, name)(self, *args, **kwargs)
            getattr(self.attnswap_side, name)(*args, **kwargs)
            return result

        return method

    methods = {name: forwarded(name) for name in FORWARDED if hasattr(base, name)}
    methods["__reduce__"] = lambda self: (_rebuild, (base,), self.__dict__)
    # Without the empty layer type, defining the class would enter it into transformers' own tables.
    return type(base.__name__, (base,), {"_layer_type": None, "__module__": base.__module__, **methods})


def _rebuild(base: type) -> Any:
    """Makes an empty cache layer with a side, for copying and pickling: its class cannot be found by name."""
    return object.__new__(_with_side(base))
